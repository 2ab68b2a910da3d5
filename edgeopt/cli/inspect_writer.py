"""`edgeopt inspect` of the bundle of a network that writes: its parts, and what the loop around them must know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.cli.console import facts, size, table, visible

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.bundle.generation_reader import GenerationBundle
    from edgeopt.types import FileSummary, Report


def show_writer(file: Path, bundle: GenerationBundle, parts: Mapping[str, FileSummary], console: Console) -> None:
    """The bundle must still be open. A part's operators are shown by inspecting that part alone."""
    from edgeopt.bundle.generation_manifest import PARTS

    manifest, generation, report = bundle.manifest, bundle.generation, bundle.report()
    missed = ", ".join(check.name for check in report.checks if not check.passed)
    unit = "frames" if "input_features" in _inputs(bundle) else "tokens"
    console.print(f"Bundle {file}", style="bold", soft_wrap=True)
    console.print(
        facts(
            {
                "Model": visible(bundle.name),
                "Target": f"{manifest.target}, aimed at {bundle.device}",
                "Status": bundle.status + (f": {missed}" if missed else ""),
                "Writes": f"{generation.task}, {generation.kind}, {generation.vocabulary} tokens known",
                "Reads": f"up to {generation.max_source} {unit}",
                "Cache": f"{generation.max_target} tokens, {generation.layers} layers",
                "Beams": str(bundle.beams),
                "Score": _score(bundle, report),
                "Tokenizer": "tokenizer.json" if bundle.tokenizer is not None else "none",
                "Golden texts": str(len(bundle.golden())),
                "Steps": ", ".join(step.step for step in manifest.history),
                "Tools": ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items())),
                "Size": size(bundle.size_bytes),
            }
        )
    )
    console.print()
    rows = table("Part", "File", "Precision", "Operators", "Size", right=("Operators", "Size"), fold=("File",))
    for name in PARTS[generation.kind]:  # as they run
        part = bundle.parts[name]
        model = f"{manifest.parts[name].folder}/{part.manifest.model.file}"
        rows.add_row(name, model, part.manifest.precision, str(len(parts[name].ops)), size(parts[name].size_bytes))
    console.print(rows)
    console.print()
    some = file / "decoder" if file.is_dir() else "its decoder, once it is unpacked"
    console.print(f"A part's tensors and operators: edgeopt inspect {some}", soft_wrap=True)


def _inputs(bundle: GenerationBundle) -> set[str]:
    return {tensor.name for part in bundle.parts.values() for tensor in part.manifest.model.signature.inputs}


def _score(bundle: GenerationBundle, report: Report) -> str:
    """What the metric said of the files that ship; empty without one."""
    from edgeopt.report.units import quantity

    found = {m.subject: m for m in report.measurements if m.name == bundle.metric}
    own = found.get("quantized", found.get("float"))
    if own is None:
        return ""
    before = found.get("float") if own.subject == "quantized" else None
    beside = f" (float network: {quantity(before.value, before.unit)})" if before is not None else ""
    return f"{bundle.metric} {quantity(own.value, own.unit)}{beside}"
