"""The report on a terminal. Every verdict is a word, so nothing is lost without colour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgeopt.report.phones import phones_table
from edgeopt.report.steps import steps_table
from edgeopt.report.units import quantity, three_digits, title
from edgeopt.types import DEVICE, PHONE, Check, Measurement, OpTiming, Placement, Report, UnquantizedOp

MAX_GROUPS = 6
MAX_NAMES = 2
#: Findings that tell what a recipe tried.
RECIPE_CODES = frozenset({"recipe-step", "mixed-precision"})
MAX_FINDINGS = 8
MAX_TIMINGS = 5
#: The summary of several targets leaves out its least telling column below this width.
WIDE = 100


def render(report: Report, console: Console) -> None:
    """Print one report: verdict, checks, figures, operators left in float, findings, what to try."""
    console.print(_verdict(report))
    samples, origin = report.evaluation.get("samples"), report.evaluation.get("origin")
    if samples and origin:
        console.print(Text(f"Evaluated on {samples} samples ({origin})", style="dim"))
    if emulates := report.evaluation.get("emulates"):
        console.print(Text(f"In place of the device: {emulates}", style="dim"))
    if report.checks:
        console.print(_checks(report.checks))
    if report.measurements:
        console.print(_figures(report))
    _print_phones(report, console, "On emulated Arm cores")
    if report.steps:
        console.print(Text("What each step did", style="bold"))
        console.print(Padding(steps_table(report.steps), (0, 0, 1, 2)))
    _print_list(console, "Not quantized or not delegated", _unquantized(report.unquantized_ops))
    if report.placement is not None:  # shown without any on the CPU, too
        _print_list(console, placed(report.placement), _fallbacks(report.placement))
        _print_list(console, "Slowest operators there (estimated)", _timings(_estimated(report.placement)))
    _print_list(console, "Slowest operators", _timings(report.op_timings))
    _print_list(console, "What the recipe tried", _findings(report, of_recipe=True))
    _print_list(console, "Findings", _findings(report, of_recipe=False))
    advice = [f"{title(c.name)}: {c.advice}" for c in report.checks if not c.passed and c.advice]
    _print_list(console, "What to try", advice)


def render_summary(reports: Sequence[Report], console: Console) -> None:
    """Print several reports side by side, one line each."""
    wide = console.width >= WIDE
    table = _table()
    table.add_column("target", overflow="fold")  # the one column that may give way
    table.add_column("", no_wrap=True)
    for heading in ("drop", *(("agree",) if wide else ()), "SQNR", "latency", "speed", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        checks = {check.name: check for check in report.checks}
        shown = [_measured(checks, report, "accuracy_drop")]
        if wide:
            shown.append(_measured(checks, report, "agreement"))
        shown += [_measured(checks, report, name) for name in ("sqnr_db", "latency_ms", "speedup", "size_bytes")]
        table.add_row(report.target, _word(report.status == "passed", "passed"), *shown)
    console.print(table)
    console.print()
    for report in (report for report in reports if report.status == "passed"):  # others are shown whole
        _print_phones(report, console, f"{report.target} on emulated Arm cores")


def _print_phones(report: Report, console: Console, heading: str) -> None:
    if phones := phones_table(report):
        console.print(Text(f"{heading} (instructions of one inference, 1 thread)", style="bold"))
        console.print(Padding(phones, (0, 0, 0, 2)))
        console.print()


def _verdict(report: Report) -> Text:
    passed = report.status == "passed"
    text = Text.assemble(("PASSED", "bold green") if passed else ("FAILED", "bold red"))
    text.append(f"  {report.model} for {report.target}", style="bold")
    text.append(f" (proven in {report.runtime})")
    failed = [title(check.name) for check in report.checks if not check.passed]
    if failed:
        text.append(f"; missed: {', '.join(failed)}")
    return text


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)


def _word(passed: bool, good: str = "ok") -> Text:
    return Text(good, style="green") if passed else Text("FAILED", style="bold red")


def _checks(checks: Sequence[Check]) -> Padding:
    table = _table()
    table.add_column("check", overflow="fold")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("")
    for check in (check for check in checks if check.limit is not None):
        limit = f"{check.op} {quantity(check.limit, check.unit)}"
        table.add_row(title(check.name), quantity(check.measured, check.unit), limit, _word(check.passed))
    return Padding(table, (1, 0, 1, 0))


def _figures(report: Report) -> Padding:
    """What the file is compared with beside the file itself, one row per thing measured."""
    rows: dict[tuple[str, str, int | None], dict[str, Measurement]] = defaultdict(dict)
    # The change of the latency says the speed-up; emulated phones have a table of their own.
    for measurement in (m for m in report.measurements if m.name != "speedup" and not m.runtime.startswith(PHONE)):
        rows[measurement.name, measurement.runtime, measurement.threads][measurement.subject] = measurement
    subjects = {measurement.subject for measurement in report.measurements}
    own = _own_subject(report)
    other = next((subject for subject in ("float", "source") if subject in subjects - {own}), None)
    table = _table()
    table.add_column("", no_wrap=True)
    for heading in (other, "shipped", "change") if other else ("measured",):
        table.add_column(heading, justify="right")
    for row in rows.values():
        shipped = row.get(own)
        label = _label(next(iter(row.values())), report)
        if other is None:
            table.add_row(label, _figure(shipped))
        else:
            table.add_row(label, _figure(row.get(other)), _figure(shipped), _change(row.get(other), shipped))
    return Padding(table, (0, 0, 1, 0))


def _own_subject(report: Report) -> str:
    """Who the shipped file is among the measurements: an fp32 file is its own float twin."""
    return "quantized" if any(m.subject == "quantized" for m in report.measurements) else "float"


def _label(measurement: Measurement, report: Report) -> Text:
    """Name and thread count; below it how the figure was obtained, where that matters."""
    label = Text(title(measurement.name))
    if measurement.threads is not None and measurement.unit in ("ms", "tokens/s"):
        label.append(f", {measurement.threads} thread{'s' if measurement.threads != 1 else ''}")
    if measurement.threads is not None or measurement.spread is not None or measurement.provenance != "measured-host":
        label.append(f"\n{_provenance(measurement, report)}", style="dim")
    return label


def _provenance(measurement: Measurement, report: Report) -> str:
    machine = report.evaluation.get("machine")
    match measurement.provenance:
        case "measured-host":
            place = f"host {machine.replace('_', '-')}" if isinstance(machine, str) else "host"
        case "measured-device":
            place = measurement.runtime.removeprefix(DEVICE)
        case other:
            predicted = measurement.name == "predicted_latency_ms"
            place = f"{other}, {measurement.runtime}" if predicted else other
    if measurement.repetitions is not None and measurement.unit == "ms":
        place += f", median of {measurement.repetitions}"
    return place


def _figure(measurement: Measurement | None) -> str:
    if measurement is None:
        return "-"
    text = quantity(measurement.value, measurement.unit)
    if measurement.spread is not None and measurement.unit in ("ms", "x", "tokens/s"):
        low, high = (three_digits(bound) for bound in measurement.spread)
        text += f" [{low}-{high}]"
    return text


def _change(reference: Measurement | None, shipped: Measurement | None) -> str:
    """Ratios for what should shrink, points for fractions; empty where there is nothing to compare."""
    if reference is None or shipped is None:
        return ""
    before, after = reference.value, shipped.value
    if shipped.unit == "fraction":
        return f"{100 * (after - before):+.2f} points"
    if shipped.unit not in ("ms", "bytes", "tokens/s") or before <= 0 or after <= 0:
        return ""
    if shipped.unit == "tokens/s":  # the one unit of which more is better
        before, after = after, before
    smaller, larger = ("smaller", "larger") if shipped.unit == "bytes" else ("faster", "slower")
    if after <= before:
        return f"{before / after:.2f}x {smaller}"
    return f"{after / before:.2f}x {larger}"


def _unquantized(ops: Sequence[UnquantizedOp]) -> list[str]:
    """Operators grouped by type and reason, the largest groups first, a few names each."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for op in ops:
        groups[op.type, op.reason].append(op.name)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    lines = [f"{len(names)} x {type_}: {reason} ({_named(names)})" for (type_, reason), names in largest]
    return _capped(lines, MAX_GROUPS, "kinds, all in report.json")


def placed(placement: Placement) -> str:
    """In one line: how much of the file runs on the accelerator, who says so, and whether that is a prediction."""
    total, left = len(placement.ops), len(placement.on_cpu)
    who = f"{'predicted by' if placement.predicted else 'says'} {placement.told_by}"
    return f"On {placement.accelerator}: {total - left} of {total} operators ({who})"


def _fallbacks(placement: Placement) -> list[str]:
    """Operators on the CPU grouped by type and reason, the largest groups first, with what would help."""
    groups: dict[tuple[str, str, str | None], list[str]] = defaultdict(list)
    for op in placement.on_cpu:
        groups[op.type, op.reason or "no reason told", op.fix].append(op.layer or op.name)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0][:2]))
    lines = [
        f"{len(names)} x {type_} on the CPU: {reason} ({_named(names)})" + (f"; {fix}" if fix else "")
        for (type_, reason, fix), names in largest
    ]
    return _capped(lines, MAX_GROUPS, "kinds, all in report.json") or ["none on the CPU"]


def _named(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _estimated(placement: Placement) -> tuple[OpTiming, ...]:
    return tuple(OpTiming(op.layer or op.name, op.type, op.ms) for op in placement.ops if op.ms is not None)


def _timings(timings: Sequence[OpTiming]) -> list[str]:
    total = sum(timing.ms for timing in timings)
    slowest = sorted(timings, key=lambda timing: -timing.ms)[:MAX_TIMINGS]
    return [f"{three_digits(t.ms)} ms ({t.ms / total:.0%})  {t.type}  {t.name}" for t in slowest if total > 0]


def _findings(report: Report, *, of_recipe: bool) -> list[str]:
    """A recipe's steps are a record, shown whole and in order; findings are warnings, each with its code."""
    chosen = [finding for finding in report.findings if (finding.code in RECIPE_CODES) == of_recipe]
    if of_recipe:
        return [f"{finding.where}: {finding.message}" for finding in chosen]
    lines = [f"{finding.where}: {finding.message} [{finding.code}]" for finding in chosen]
    return _capped(lines, MAX_FINDINGS, "findings, all in report.json")


def _capped(lines: list[str], limit: int, rest: str) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more {rest}"]


def _print_list(console: Console, heading: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    console.print(Text(heading, style="bold"))
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 2)))  # Text: names may hold [brackets]
    console.print()


def _measured(checks: dict[str, Check], report: Report, name: str) -> str:
    """A check's figure, or the shipped file's measurement of that name where no gate asked for it."""
    check = checks.get(name)
    if check is not None:
        return quantity(check.measured, check.unit) if check.measured is not None else "-"
    own = _own_subject(report)
    measurement = next((m for m in report.measurements if m.name == name and m.subject == own), None)
    return quantity(measurement.value, measurement.unit) if measurement is not None else "-"
