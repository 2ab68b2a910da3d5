"""What runs where, on a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeopt.json_data import Plain, to_plain
from edgeopt.report.units import quantity

if TYPE_CHECKING:
    from edgeopt.compression.rewrites.base import Suggestion
    from edgeopt.coverage_values import Cell, CoverageReport, Fallback, Outcome, Row, TargetCoverage

#: Shown on a terminal; the JSON has them all.
_MAX_FALLBACKS = 12
_MAX_LAYERS = 4
_NAME_WIDTH, _CELL_WIDTH = 28, 6


def coverage_document(report: CoverageReport) -> dict[str, Plain]:
    """Everything, for --json."""
    plain = to_plain(report)
    assert isinstance(plain, dict)
    plain["recommended"] = list(report.recommended)
    return {"coverage": plain}


def render_coverage(report: CoverageReport, console: Console, *, by_layer: bool = False) -> None:
    """Print the targets, the table of layers against targets, what falls back and which rewrites help."""
    numbers = {target.target: number for number, target in enumerate(report.targets, 1)}
    console.print(Text(f"{report.model} on {len(report.targets)} targets", style="bold"))
    console.print(Text(f"Calibrated with {report.calibration}", style="dim"))
    console.print()
    console.print(_targets(report, numbers))
    for target in report.targets:
        for problem in (*((target.problem,) if target.problem is not None else ()), *target.warnings):
            console.print(Text(f"{numbers[target.target]} {target.target}: {problem}", style="yellow"))
    console.print()
    _print_rows(report.layers if by_layer else report.rows, report, numbers, console)
    _print_fallbacks(report.fallbacks, numbers, console)
    if report.outcomes:
        _print_outcomes(report, numbers, console)
    elif report.suggestions:
        _print_suggestions(report.suggestions, console)


def _targets(report: CoverageReport, numbers: Mapping[str, int]) -> Table:
    table = _table()
    for heading in ("#", "operators", "on CPU", *(("then",) if report.after else ()), "est."):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("told by", overflow="fold")
    later = {target.target: target for target in report.after}
    for target in report.targets:
        cells = [str(numbers[target.target]), *_totals(target)]
        if report.after:
            cells.append(_count(later[target.target].on_cpu))
        latency = "" if target.latency_ms is None else quantity(target.latency_ms, "ms")
        table.add_row(*cells, latency, target.target, Text(_told_by(target)))
    return table


def _totals(target: TargetCoverage) -> tuple[str, str]:
    if target.placement is None:
        return "-", "-"
    return str(len(target.placement.ops)), _count(target.on_cpu)


def _count(on_cpu: int | None) -> str:
    return "-" if on_cpu is None else str(on_cpu)


def _told_by(target: TargetCoverage) -> str:
    if target.placement is None:
        return "no result, see below"
    note = "predicted by" if target.placement.predicted else "told by"
    return f"{target.placement.accelerator}, {note} {target.placement.told_by}"


def _print_rows(rows: Sequence[Row], report: CoverageReport, numbers: Mapping[str, int], console: Console) -> None:
    """As many targets side by side as the terminal has room for, the rest below."""
    shown = [target.target for target in report.targets if target.placement is not None]
    room = max((console.width - _NAME_WIDTH - _CELL_WIDTH) // (_CELL_WIDTH + 1), 1)
    for start in range(0, len(shown), room):
        part = shown[start : start + room]
        table = _table()
        table.add_column("layers", overflow="fold", max_width=None if console.width > 140 else _NAME_WIDTH)
        table.add_column("all", justify="right", no_wrap=True)
        for name in part:
            table.add_column(str(numbers[name]), justify="right", no_wrap=True)
        for row in rows:
            if any(name in row.cells for name in part):
                cells = [_cell(row.cells.get(name)) for name in part]
                table.add_row(Text(row.name), str(row.count or ""), *cells)
        console.print(table)
    note = "12: all 12 on the accelerator; 10/12: two are not, or not whole; -: nothing of them is left in the file"
    console.print(Text(note, style="dim"))


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("-", style="dim")
    if cell.on == cell.all:
        return Text(str(cell.all), style="green")
    return Text(f"{cell.on}/{cell.all}", style="red" if cell.on == 0 else "yellow")


def _print_fallbacks(fallbacks: Sequence[Fallback], numbers: Mapping[str, int], console: Console) -> None:
    if not fallbacks:
        return
    console.print()
    console.print(Text("Falls back to the CPU", style="bold"))
    table = _table()
    for heading in ("operator", "times", "on"):
        table.add_column(heading, no_wrap=heading != "on", overflow="fold")
    table.add_column("why, and what would help", overflow="fold")
    for one in fallbacks[:_MAX_FALLBACKS]:
        most, least = max(one.counts.values()), min(one.counts.values())
        times = str(most) if most == least else f"{least}-{most}"
        where = " ".join(str(numbers[name]) for name in one.counts)
        table.add_row(Text(one.type), times, where, Text(f"{one.reason}; {one.fix}" if one.fix else one.reason))
    console.print(table)
    if len(fallbacks) > _MAX_FALLBACKS:
        console.print(Text(f"... and {len(fallbacks) - _MAX_FALLBACKS} more kinds; --json has them all", style="dim"))


def _print_suggestions(suggestions: Sequence[Suggestion], console: Console) -> None:
    console.print()
    console.print(Text("Rewrites to try with --apply-rewrites", style="bold"))
    for one in suggestions:
        console.print(Text(f"  {one.name}: {one.summary}; for {', '.join(one.helps)}; {_layers(one.layers)}"))


def _print_outcomes(report: CoverageReport, numbers: Mapping[str, int], console: Console) -> None:
    console.print()
    console.print(Text("Rewrites", style="bold"))
    for outcome in report.outcomes:
        console.print(Text(f"  {_outcome(outcome, numbers)}"))
    console.print()
    later = {target.target: target for target in report.after}
    for target in report.targets:
        new = later[target.target]
        if (target.on_cpu, target.problem) != (new.on_cpu, new.problem):
            then = new.problem if new.placement is None else f"{_count(new.on_cpu)} operators on the CPU"
            was = "took no file" if target.placement is None else f"{_count(target.on_cpu)}"
            console.print(Text(f"  {numbers[target.target]} {target.target}: {was} -> {then}"))
    recommended = report.recommended
    advice = f"Recommended: {', '.join(recommended)}" if recommended else "None of them helped a target"
    console.print(Text(advice, style="bold"))


def _outcome(outcome: Outcome, numbers: Mapping[str, int]) -> str:
    applied = outcome.applied
    what = f"{applied.suggestion.name}: {applied.suggestion.summary}; {_layers(applied.suggestion.layers)}"
    if applied.refused is not None:
        return f"{what}; refused: {applied.refused}"
    proof = f"keeps {quantity(applied.sqnr_db, 'dB')} of the float model (at least {applied.min_sqnr_db:g} dB wanted)"
    helped = " ".join(str(numbers[name]) for name in outcome.helped)
    return f"{what}; {proof}; {f'helps {helped}' if helped else 'helps no target here'}"


def _layers(layers: Iterable[str]) -> str:
    named = [layer or "(the model itself)" for layer in layers]
    more = f" and {len(named) - _MAX_LAYERS} more" if len(named) > _MAX_LAYERS else ""
    return f"in {', '.join(named[:_MAX_LAYERS])}{more}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
