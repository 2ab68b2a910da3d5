"""`edgeopt compare`: two files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, print_json, stdout, table, work
from edgeopt.config_keys import MOST_THREADS

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.comparison import Comparison
    from edgeopt.types import Measurement


def compare(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="A bundle, or a .tflite, .onnx or .pte file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What to hold against it.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Inputs, as for 'edgeopt export --evaluation'. Default: what the bundles hold, else made-up inputs.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_THREADS, help="Threads when timing.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Compare size, latency and outputs of two exported models in one run.

    Example: edgeopt compare dist/digits-android-int8 dist/digits-android-fp32
    """
    with work(context) as progress:
        progress.step("Opening the files")
        from edgeopt.pipeline import compare as run

        comparison = run(a, b, data=data, threads=threads, progress=progress)
    if json:
        print_json({"comparison": comparison})
    else:
        _show(comparison, stdout())


def _show(comparison: Comparison, console: Console) -> None:
    from edgeopt.report.units import quantity, title

    console.print(f"A: {comparison.a}", soft_wrap=True)
    console.print(f"B: {comparison.b}", soft_wrap=True)
    console.print()
    rows = table("", "A", "B", "B / A", right=("A", "B", "B / A"))
    for name, (first, second) in _pairs(comparison.measurements).items():
        ratio = f"{second.value / first.value:.2f}" if first and second and first.value else ""
        rows.add_row(title(name), _figure(first), _figure(second), ratio)
    console.print(rows)
    if comparison.emulated:
        both = len(comparison.emulated) > 1
        who = "both files run" if both else f"{comparison.emulated[0]} runs"
        console.print(f"Not timed: {who} in an emulator here, whose time says nothing about the device's.")
    if not comparison.outputs:
        return
    columns = ("B agrees with A", "SQNR", "largest difference")
    fidelity = table("output", *columns, right=columns)
    for output in comparison.outputs:
        agreement = "-" if output.agreement is None else quantity(output.agreement, "fraction")
        sqnr = "-" if output.sqnr_db is None else quantity(output.sqnr_db, "dB")
        fidelity.add_row(output.name, agreement, sqnr, f"{output.max_abs_error:.4g}")
    console.print()
    console.print(fidelity)
    console.print(f"On {comparison.samples} sample{'s' if comparison.samples != 1 else ''}.")


def _pairs(measurements: tuple[Measurement, ...]) -> dict[str, tuple[Measurement | None, Measurement | None]]:
    """Name -> the two files' measurements; None for a file that has none of that name."""
    by_name: dict[str, dict[str, Measurement]] = {}
    for measurement in measurements:
        by_name.setdefault(measurement.name, {})[measurement.subject] = measurement
    return {name: (sides.get("a"), sides.get("b")) for name, sides in by_name.items()}


def _figure(measurement: Measurement | None) -> str:
    from edgeopt.report.units import quantity, three_digits

    if measurement is None:
        return "-"
    text = quantity(measurement.value, measurement.unit)
    if measurement.spread is not None:
        low, high = (three_digits(bound) for bound in measurement.spread)
        text += f" [{low}-{high}]"
    return text
