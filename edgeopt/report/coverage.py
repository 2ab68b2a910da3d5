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
#: Longer names wrap.
_NAME_WIDTH = 40
#: Between two columns; "all" with that on both sides.
_BETWEEN, _ALL_WIDTH = 2, 7


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
    console.print(Text(report.calibration, style="dim"))
    console.print()
    console.print(_targets(report, numbers))
    _print_problems(report.targets, numbers, console)
    _print_rows(report, numbers, console, by_layer)
    _print_fallbacks(report.fallbacks, numbers, console, "Falls back to the CPU")
    if report.outcomes:
        _print_outcomes(report, numbers, console)
    elif report.suggestions:
        _print_suggestions(report.suggestions, console)
    if report.after is not None:
        _print_rows(report.after, numbers, console, by_layer)
        _print_problems(report.after.targets, numbers, console)
        _print_fallbacks(report.after.fallbacks, numbers, console, "Still falls back to the CPU")


def _print_problems(targets: Iterable[TargetCoverage], numbers: Mapping[str, int], console: Console) -> None:
    for problem, names in _problems(targets).items():
        console.print(Text(f"{' '.join(str(numbers[name]) for name in names)}: {problem}", style="yellow"))


def _problems(targets: Iterable[TargetCoverage]) -> dict[str, list[str]]:
    """What is wrong -> the targets that it concerns."""
    found: dict[str, list[str]] = {}
    for target in targets:
        for problem in (*((target.problem,) if target.problem is not None else ()), *target.warnings):
            found.setdefault(problem, []).append(target.target)
    return found


def _targets(report: CoverageReport, numbers: Mapping[str, int]) -> Table:
    table = _table()
    for heading in ("#", "operators", "on CPU", *(("then",) if report.after is not None else ()), "est."):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("target", no_wrap=True)
    table.add_column("told by", overflow="fold")
    later = {target.target: target for target in report.after.targets} if report.after is not None else {}
    for target in report.targets:
        cells = [str(numbers[target.target]), *_totals(target)]
        if target.target in later:
            cells.append(_count(later[target.target].on_cpu))
        table.add_row(*cells, _latency(target, later.get(target.target)), target.target, Text(_told_by(target)))
    return table


def _latency(target: TargetCoverage, later: TargetCoverage | None) -> str:
    """Before and, where the model was rewritten, after."""
    known = [one.latency_ms for one in (target, later) if one is not None and one.latency_ms is not None]
    return " -> ".join(quantity(ms, "ms") for ms in known)


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


def _print_rows(report: CoverageReport, numbers: Mapping[str, int], console: Console, by_layer: bool) -> None:
    """As many targets side by side as the terminal has room for, the rest below."""
    rows = report.layers if by_layer else report.rows
    for part in _parts(rows, report, numbers, console.width):
        console.print()
        table = _table()
        table.add_column("layers", overflow="fold")
        table.add_column("all", justify="right", no_wrap=True)
        for name in part:
            table.add_column(str(numbers[name]), justify="right", no_wrap=True)
        for row in rows:
            if any(name in row.cells for name in part):
                cells = [_cell(row.cells.get(name)) for name in part]
                table.add_row(Text(row.name), str(row.count or ""), *cells)
        console.print(table)
    if rows:
        note = "12: all on the accelerator; 10/12: two are not; -: none left in the file"
        between = "; (add): between layers" if any(row.name.startswith("(") for row in rows) else ""
        console.print(Text(note + between, style="dim"))


def _parts(
    rows: Sequence[Row], report: CoverageReport, numbers: Mapping[str, int], width: int
) -> Iterable[Sequence[str]]:
    """Names of the targets with results, in groups that fit side by side."""
    room = width - min(max((len(row.name) for row in rows), default=0), _NAME_WIDTH) - _ALL_WIDTH
    part: list[str] = []
    used = 0
    for name in (target.target for target in report.targets if target.placement is not None):
        cells = [len(_cell(row.cells.get(name))) for row in rows]
        needed = max(*cells, len(str(numbers[name])), 0) + _BETWEEN
        if part and used + needed > room:
            yield part
            part, used = [], 0
        part.append(name)
        used += needed
    if part:
        yield part


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("-", style="dim")
    if cell.on == cell.all:
        return Text(str(cell.all), style="green")
    return Text(f"{cell.on}/{cell.all}", style="red" if cell.on == 0 else "yellow")


def _print_fallbacks(fallbacks: Sequence[Fallback], numbers: Mapping[str, int], console: Console, title: str) -> None:
    if not fallbacks:
        return
    console.print()
    console.print(Text(title, style="bold"))
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
    later = {target.target: target for target in report.after.targets} if report.after is not None else {}
    for target in report.targets:
        new = later.get(target.target, target)
        if (target.on_cpu, target.problem) != (new.on_cpu, new.problem):
            then = "no result" if new.placement is None else f"{_count(new.on_cpu)} operators on the CPU"
            was = "no result" if target.placement is None else _count(target.on_cpu)
            console.print(Text(f"  {numbers[target.target]} {target.target}: {was} -> {then}"))
    helpful = [
        f"{one.applied.suggestion.name} ({' '.join(str(numbers[name]) for name in one.helped)})"
        for one in report.outcomes
        if one.helped
    ]
    advice = f"Recommended: {', '.join(helpful)}" if helpful else "None of them helped a target"
    console.print(Text(advice, style="bold"))


def _outcome(outcome: Outcome, numbers: Mapping[str, int]) -> str:
    applied = outcome.applied
    what = f"{applied.suggestion.name}: {applied.suggestion.summary}; {_layers(applied.suggestion.layers)}"
    if applied.refused is not None:
        return f"{what}; refused: {applied.refused}"
    proof = f"proven equivalent, {quantity(applied.sqnr_db, 'dB')} (at least {applied.min_sqnr_db:g} dB)"
    helped = " ".join(str(numbers[name]) for name in outcome.helped)
    return f"{what}; {proof}; {f'helps {helped}' if helped else 'helps no target here'}"


def _layers(layers: Iterable[str]) -> str:
    named = [layer or "(the model itself)" for layer in layers]
    more = f" and {len(named) - _MAX_LAYERS} more" if len(named) > _MAX_LAYERS else ""
    return f"in {', '.join(named[:_MAX_LAYERS])}{more}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
