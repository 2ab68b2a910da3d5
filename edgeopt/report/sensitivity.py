"""The layers' sensitivities on a terminal, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeopt.json_data import Plain, to_plain
from edgeopt.report.plot import save_bars
from edgeopt.report.units import quantity

if TYPE_CHECKING:
    from edgeopt.tuning.sensitivity import LayerSensitivity, Sensitivity

#: Layers shown on a terminal and in a picture; all of them are in the JSON.
MAX_ROWS = 25
MAX_BARS = 60


def sensitivity_document(sensitivity: Sensitivity) -> dict[str, Plain]:
    """All figures, for --json and --output."""
    plain = to_plain(sensitivity)
    assert isinstance(plain, dict)
    return {"sensitivity": plain}


def render_sensitivity(sensitivity: Sensitivity, console: Console) -> None:
    """Print the ranked layers: what quantizing each alone does, its time and its bytes."""
    plain = sensitivity.plain
    head = Text(f"{sensitivity.model}, {sensitivity.precision} in {sensitivity.runtime}", style="bold")
    console.print(head)
    figures = [f"SQNR {quantity(plain.sqnr_db, 'dB')}"]
    if plain.agreement is not None:
        figures.append(f"agreement {quantity(plain.agreement, 'fraction')}")
    if plain.drop is not None:
        figures.append(f"accuracy drop {quantity(plain.drop, 'fraction')}")
    console.print(f"All layers quantized: {', '.join(figures)}, on {plain.samples} samples")
    console.print(f"Each layer quantized alone, the rest float; {sensitivity.trials} files measured", style="dim")
    console.print()
    console.print(_table(sensitivity))
    left = len(sensitivity.layers) - MAX_ROWS
    if left > 0:
        share = sum(entry.share for entry in sensitivity.layers[MAX_ROWS:])
        console.print(f"... and {left} more with {quantity(share, 'fraction')} of the noise", style="dim")
    grouped = [entry for entry in sensitivity.layers[:MAX_ROWS] if len(entry.group) > 1]
    if grouped:
        console.print("* measured with its neighbours only; the group's figures, its share in equal parts", style="dim")
    if any(entry.int8_ms is not None for entry in sensitivity.layers):
        console.print(f"Times: {sensitivity.times}", style="dim")


def save_sensitivity_plot(sensitivity: Sensitivity, path: Path) -> None:
    """Bars of the layers' shares, the largest on top; .svg or .png. Raises UsageError as `save_bars` does."""
    shown = sensitivity.layers[:MAX_BARS]
    save_bars(
        path,
        [entry.layer for entry in shown],
        [100 * entry.share for entry in shown],
        title=f"{sensitivity.model}: who makes the noise ({sensitivity.precision}, {sensitivity.runtime})",
        axis="share of the layers' noise power, %",
    )


def _table(sensitivity: Sensitivity) -> Table:
    has_drop = sensitivity.plain.drop is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("type", overflow="fold")
    own, full = sensitivity.precision, "fp32"
    for heading in (
        "noise",
        "SQNR",
        "agree",
        *(("drop",) if has_drop else ()),
        f"ms {own}/{full}",
        f"KiB {own}/{full}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in sensitivity.layers[:MAX_ROWS]:
        cells = [quantity(entry.share, "fraction"), quantity(entry.sqnr_db, "dB"), _fraction(entry.agreement)]
        if has_drop:
            cells.append(_fraction(entry.drop))
        mark = " *" if len(entry.group) > 1 else ""
        table.add_row(Text(entry.layer + mark), Text(entry.type), *cells, _times(entry), _sizes(entry))
    return table


def _fraction(value: float | None) -> str:
    return "-" if value is None else quantity(value, "fraction")


def _times(entry: LayerSensitivity) -> str:
    return " / ".join("-" if ms is None else f"{ms:.3f}" for ms in (entry.int8_ms, entry.float_ms))


def _sizes(entry: LayerSensitivity) -> str:
    sizes = (entry.int8_bytes, entry.float_bytes)
    return " / ".join("-" if size is None else f"{size / 1024:.1f}" for size in sizes)
