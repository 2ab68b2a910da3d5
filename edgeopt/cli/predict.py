"""`edgeopt predict`: how long a file would take on a device's CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, stdout, table, work

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.prediction import Prediction, Survey
    from edgeopt.types import Format

_SHOWN = 10


def predict(
    context: typer.Context,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A .tflite, .onnx or .pte file, or a bundle.")],
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="A device, or a .toml file of your own. Default: all of them."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Threads of the runtime.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Estimate the latency on a device's CPU from the file alone: milliseconds with an interval, and what takes them.

    Example: edgeopt predict dist/digits-android-int8 --device pixel-4 --threads 4
    """
    with work(context) as progress:
        progress.step(f"Reading {artifact.name}")
        from edgeopt import prediction
        from edgeopt.device_profiles import list_devices, load_device

        path, format_, float_path = _files(artifact)
        surveyed, predicted, twin = None, None, None
        if device is None:
            surveyed = prediction.survey(path, format_, list_devices(), threads)
        else:
            profile = load_device(device)
            own = prediction.find_calibration(profile)
            predicted = prediction.predict(path, format_, profile, threads, own)
            twin = prediction.predict(float_path, format_, profile, threads, own) if float_path is not None else None
    if json:
        shown = {"devices": surveyed} if surveyed is not None else {"prediction": predicted, "float": twin}
        print_json({"file": str(path), "provenance": "estimated", **shown})
    elif surveyed is not None:
        _show_survey(surveyed, path, threads, stdout())
    elif predicted is not None:
        _show(predicted, twin, path, stdout())


def _files(artifact: Path) -> tuple[Path, Format, Path | None]:
    """The model, its format, and the float twin that a bundle holds."""
    from edgeopt.errors import UsageError
    from edgeopt.formats import SUFFIXES

    if artifact.is_dir() and artifact.suffix not in SUFFIXES:
        from edgeopt.bundle import open_bundle

        bundle = open_bundle(artifact)
        return bundle.model_path, bundle.format, bundle.float_path
    if artifact.suffix not in SUFFIXES:
        fix = "give a .tflite, .onnx or .pte file, or a bundle"
        raise UsageError("is not a model file", where=str(artifact), fix=fix)
    if not artifact.exists():
        raise UsageError("no such file", where=str(artifact))
    return artifact, SUFFIXES[artifact.suffix], None


def _show(prediction: Prediction, twin: Prediction | None, path: Path, console: Console) -> None:
    console.print(f"{path.name} on {prediction.device}, {_threads(prediction.threads)}", style="bold", soft_wrap=True)
    rows = {
        "Latency": f"{_ms(prediction.ms)}, estimated",
        "Interval": f"{_ms(prediction.low)} to {_ms(prediction.high)} ({prediction.coverage:.0%} of cases)",
        "Float": f"{_ms(twin.ms)}, estimated: {twin.ms / prediction.ms:.2f}x as long" if twin is not None else "",
        "Work": f"{prediction.macs / 1e6:.4g} million multiply-accumulates, {len(prediction.ops)} operators",
        "Limited by": ", ".join(f"{name} {share:.0%}" for name, share in prediction.limits.items() if share >= 0.005),
        "Basis": prediction.basis,
    }
    console.print(facts(rows))
    console.print()
    first = "Slowest operators"
    slowest = table(first, "Type", "ms", "Share", "Limited by", right=("ms", "Share"), fold=(first,))
    for op in prediction.slowest(_SHOWN):
        slowest.add_row(op.name, op.type, f"{op.ms:.3g}", f"{op.ms / prediction.ms:.0%}", op.limit)
    console.print(slowest)
    if prediction.findings:
        console.print()
    for finding in prediction.findings:
        where = f"{finding.where}: " if finding.where else ""
        console.print(f"note: {where}{finding.message}", soft_wrap=True)


def _show_survey(survey: Survey, path: Path, threads: int, console: Console) -> None:
    console.print(f"{path.name}, {_threads(threads)}, CPU: estimated", style="bold", soft_wrap=True)
    rows = table("Device", "ms", "Interval", "Figures", "Yours", right=("ms", "Figures", "Yours"))
    for prediction in survey.predictions:
        interval = f"{prediction.low:.3g} to {prediction.high:.3g}"
        own = str(prediction.calibration or "")
        rows.add_row(prediction.device, f"{prediction.ms:.3g}", interval, str(prediction.figures or ""), own)
    console.print(rows)
    console.print(
        "Figures: published latencies of the device that the model was fitted to. Others it knows by their cores."
    )
    for why, names in sorted(survey.skipped.items()):
        console.print(f"not {', '.join(names)}: {why}", soft_wrap=True)


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _ms(value: float) -> str:
    return f"{value:.3g} ms"
