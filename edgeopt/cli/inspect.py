"""`edgeopt inspect`: what is in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, size, stdout, table, work

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from edgeopt.bundle import LoadedBundle
    from edgeopt.bundle.archive_whole import AnyBundle
    from edgeopt.types import FileSummary, QuantParams, Report, Signature


def inspect(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A .tflite, .onnx, .pte or .mlpackage file, or a bundle (.zip, too)."),
    ],
    every: Annotated[bool, typer.Option("--all", help="List each operator instead of counting them by type.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show what a model file or bundle holds: inputs and outputs, operators, quantization, delegation.

    Example: edgeopt inspect dist/digits-android-int8
    """
    with ExitStack() as stack:  # a .zip is unpacked until everything is shown
        with work(context) as progress:
            progress.step(f"Reading {file.name}")
            from edgeopt.bundle.archive import open_whole
            from edgeopt.formats import summarize

            is_bundle = (file.is_dir() and file.suffix != ".mlpackage") or file.suffix == ".zip"
            bundle = stack.enter_context(open_whole(file)) if is_bundle else None
            files = {name: summarize(path) for name, path in _files(file, bundle).items()}
        _show(file, bundle, files, every, json)


def _files(file: Path, bundle: AnyBundle | None) -> dict[str, Path]:
    """The model files there, by what they are called in the bundle."""
    from edgeopt.bundle.generation_reader import GenerationBundle

    if isinstance(bundle, GenerationBundle):
        return {name: part.model_path for name, part in bundle.parts.items()}
    return {"file": file if bundle is None else bundle.model_path}


def _show(file: Path, bundle: AnyBundle | None, files: Mapping[str, FileSummary], every: bool, json: bool) -> None:
    from edgeopt.bundle.generation_reader import GenerationBundle

    console = stdout()
    if json:
        shown: dict[str, object] = {"parts": files} if isinstance(bundle, GenerationBundle) else dict(files)
        print_json(shown | ({"manifest": bundle.manifest} if bundle is not None else {}))
        return
    if isinstance(bundle, GenerationBundle):
        from edgeopt.cli.inspect_writer import show_writer

        show_writer(file, bundle, files, console)
        return
    path = file
    if bundle is not None:
        _show_bundle(file, bundle, bundle.report(), console)
        path = file / bundle.manifest.model.file
    summary = files["file"]
    _show_file(summary, path, console)
    console.print()
    _show_signature(summary.signature, console)
    console.print()
    console.print(_each_operator(summary) if every else _operators_by_type(summary))


def _show_bundle(file: Path, bundle: LoadedBundle, report: Report, console: Console) -> None:
    manifest = bundle.manifest
    missed = ", ".join(check.name for check in report.checks if not check.passed)
    console.print(f"Bundle {file}", style="bold", soft_wrap=True)
    console.print(
        facts(
            {
                "Model": manifest.name,
                "Target": f"{manifest.target}, aimed at {manifest.device}",
                "Status": f"{manifest.status}" + (f": {missed}" if missed else ""),
                **_on_accelerator(report),
                **_on_devices(report),
                "Stayed float": f"{len(report.unquantized_ops)} operators" if report.unquantized_ops else "nothing",
                "Preprocessing": manifest.preprocessing.kind if manifest.preprocessing is not None else "none",
                "Labels": str(len(manifest.labels)) if manifest.labels else "none",
                "Golden vectors": str(len(manifest.golden)),
                "Steps": ", ".join(step.step for step in manifest.history),
                "Tools": ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items())),
                "Files": f"{len(manifest.files)}, every SHA-256 verified",
            }
        )
    )
    console.print()


def _on_accelerator(report: Report) -> dict[str, str]:
    """What is on record of a file for an accelerator; nothing of others."""
    from edgeopt.report import placed
    from edgeopt.report.units import quantity

    rows: dict[str, str] = {}
    if report.placement is not None:
        rows["Placement"] = placed(report.placement)
        latency = next((m for m in report.measurements if m.name == "latency_ms" and m.provenance == "estimated"), None)
        if latency is not None:
            rows["Latency"] = f"{quantity(latency.value, latency.unit)}, estimated"
    emulates = report.evaluation.get("emulates")
    if isinstance(emulates, str):
        rows["Proven in"] = f"{report.runtime}: {emulates}"
    return rows


def _on_devices(report: Report) -> dict[str, str]:
    """What `edgeopt device run` measured and added to the report; nothing where it never ran."""
    from edgeopt.report.units import quantity
    from edgeopt.types import DEVICE

    told = [
        f"{m.runtime.removeprefix(DEVICE)}: {quantity(m.value, m.unit)}"
        for m in report.measurements
        if m.name == "latency_ms" and m.runtime.startswith(DEVICE)
    ]
    failed = [check.name for check in report.checks if f"@{DEVICE}" in check.name and not check.passed]
    return {"Measured on": ", ".join((*told, *(f"failed {name}" for name in failed)))} if told or failed else {}


def _show_file(summary: FileSummary, path: Path, console: Console) -> None:
    console.print(f"File {path}", style="bold", soft_wrap=True)
    rows = {"Format": summary.format, "Size": size(summary.size_bytes), "SHA-256": summary.sha256}
    console.print(facts({**rows, **summary.metadata}))


def _show_signature(signature: Signature, console: Console) -> None:
    rows = table("", "Name", "Type", "Shape", "Quantization", fold=("Name", "Quantization"))
    for role, tensors in (("in", signature.inputs), ("out", signature.outputs)):
        for tensor in tensors:
            shape = "x".join(str(dimension) for dimension in tensor.shape) or "scalar"
            rows.add_row(role, tensor.native_name, tensor.dtype, shape, _quantization(tensor.quantization))
    console.print(rows)


def _quantization(params: QuantParams | None) -> str:
    if params is None:
        return ""
    if len(params.scale) > 1:
        return f"{len(params.scale)} scales along axis {params.axis}"
    return f"scale {params.scale[0]:.6g}, zero point {params.zero_point[0]}"


def _operators_by_type(summary: FileSummary) -> Table:
    counts: Counter[tuple[str, str, str]] = Counter()
    weights: Counter[tuple[str, str, str]] = Counter()
    for op in summary.ops:
        kind = (op.type, op.dtype, op.delegate or "-")
        counts[kind] += 1
        weights[kind] += op.weight_bytes
    rows = table("Operator", "Type", "Delegate", "Count", "Weights", right=("Count", "Weights"), fold=("Operator",))
    for kind in sorted(counts, key=lambda kind: (-weights[kind], -counts[kind], kind)):
        rows.add_row(*kind, str(counts[kind]), size(weights[kind]) if weights[kind] else "")
    rows.add_section()
    rows.add_row("total", "", "", str(len(summary.ops)), size(sum(weights.values())))
    return rows


def _each_operator(summary: FileSummary) -> Table:
    rows = table("Name", "Operator", "Type", "Delegate", "Weights", right=("Weights",), fold=("Name",))
    for op in summary.ops:
        rows.add_row(op.name, op.type, op.dtype, op.delegate or "-", size(op.weight_bytes) if op.weight_bytes else "")
    return rows
