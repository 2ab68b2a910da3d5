"""Layer-by-layer comparisons on a terminal and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeopt.report.plot import save_lines
from edgeopt.report.units import quantity

if TYPE_CHECKING:
    from edgeopt.debugging import Debugging, LayerError

#: Below these widths the table leaves out the ranges, then the operators.
WIDE, WIDER = 110, 150
MAX_NAMES = 8
#: Agreement of outputs that is as good as equal; `Debugging` has 200 for identical ones.
EXACT_DB = 200.0


def render(result: Debugging, console: Console) -> None:
    """Print what was compared, one row per layer in A's order, where it diverges, and what could not be compared."""
    console.print(f"A: {result.a} ({result.runtime_a})", soft_wrap=True)
    console.print(f"B: {result.b} ({result.runtime_b})", soft_wrap=True)
    console.print()
    console.print(_table(result, console.width))
    console.print()
    console.print(_verdict(result), soft_wrap=True)
    for output in (o for o in result.outputs if o.sqnr_db is not None):
        console.print(f"Output {output.name}: {quantity(output.sqnr_db, 'dB')}", soft_wrap=True)
    for note in _notes(result):
        console.print(Text(note, style="dim"), soft_wrap=True)


def save_plot(result: Debugging, path: Path) -> None:
    """Draw SQNR along the depth of the network, of each layer's result and of what it computes from."""
    series = {
        "layer": [layer.sqnr_db for layer in result.layers],
        "its worst input": [
            float("nan") if layer.input_sqnr_db is None else layer.input_sqnr_db for layer in result.layers
        ],
    }
    divergence = result.first_divergence
    save_lines(
        path,
        [name(layer) for layer in result.layers],
        series,
        title=f"{Path(result.b).name} against {Path(result.a).name}, {_samples(result.samples)}",
        axis="SQNR, dB",
        marked=() if divergence is None else (divergence.index,),
    )


def name(layer: LayerError) -> str:
    """The layer's path, numbered where it has several results; the operator where the files name no layers."""
    shown = layer.layer or f"({layer.type_a})"
    return f"{shown}:{layer.occurrence}" if layer.occurrence else shown


def _table(result: Debugging, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer", overflow="fold")
    if width >= WIDER:
        table.add_column("A's operator", no_wrap=True)
        table.add_column("B's operator", no_wrap=True)
    for heading in ("SQNR", "input", "own error", "largest", "bias"):
        table.add_column(heading, justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("A's range", justify="right", no_wrap=True)
        table.add_column("B's range", justify="right", no_wrap=True)
    first = result.first_divergence.index if result.first_divergence is not None else None
    for index, layer in enumerate(result.layers):
        row = [name(layer)]
        if width >= WIDER:
            row += [layer.type_a, layer.type_b]
        row += [
            _db(layer.sqnr_db),
            "" if layer.input_sqnr_db is None else _db(layer.input_sqnr_db),
            f"{100 * layer.introduced:.0f} %",
            f"{layer.max_abs_error:.3g}",
            f"{layer.mean_error:+.2g}",
        ]
        if width >= WIDE:
            row += [f"{low:.3g} .. {high:.3g}" for low, high in (layer.range_a, layer.range_b)]
        table.add_row(*map(Text, row), style="bold red" if index == first else "")
    return table


def _verdict(result: Debugging) -> Text:
    if result.first_divergence is None:
        return Text.assemble(
            ("No layer diverges", "bold green"),
            f": none below {result.threshold_db:g} dB, none loses more than {result.max_drop_db:g} dB at once",
        )
    layer = result.layers[result.first_divergence.index]
    text = Text.assemble(("First divergence", "bold red"), f": {name(layer)} ({layer.type_b}), {_db(layer.sqnr_db)}")
    if result.first_divergence.reason == "low":
        text.append(f", below {result.threshold_db:g} dB")
    if layer.input_sqnr_db is not None:
        text.append(f"; its input has {_db(layer.input_sqnr_db)}, {100 * layer.introduced:.0f} % of the error is new")
    return text


def _notes(result: Debugging) -> list[str]:
    how = "name" if result.matched_by == "layer" else "order and size: the files have no layer names in common"
    notes = [f"On {_samples(result.samples)}; layers matched by {how}."]
    for letter, unmatched in (("A", result.unmatched_a), ("B", result.unmatched_b)):
        if unmatched:
            notes.append(f"Only in {letter}: {_some(unmatched)}.")
    for letter, agreement in (("A", result.instrumented_db_a), ("B", result.instrumented_db_b)):
        if agreement < EXACT_DB:
            notes.append(
                f"Looking inside {letter} kept some of its operators from being fused: its outputs are "
                f"{_db(agreement)} from those of the untouched file."
            )
    return notes


def _db(value: float) -> str:
    return "exact" if value >= EXACT_DB else quantity(value, "dB")


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count != 1 else ''}"


def _some(names: Sequence[str]) -> str:
    shown = [text or "(unnamed)" for text in names[:MAX_NAMES]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
