"""What every step of a recipe did: a table for the terminal and a chart for the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from rich import box
from rich.table import Table

from edgeopt.report.units import quantity, three_digits
from edgeopt.types import Report, StepFigures

#: Costs that the chart shows as shares of the start, each with its heading.
_COSTS = {"macs": "MACs", "parameters": "parameters", "size_bytes": "file size", "latency_ms": "latency"}
_COLOURS = ("#9db4d0", "#5f88b5", "#3b6ea5", "#17375e")


def steps_table(steps: Sequence[StepFigures]) -> Table:
    """One row per step, the shipped file's last."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("after", no_wrap=True)
    shown = _accuracy(steps)
    for heading in (shown, "SQNR", "MACs", "params", "size", "latency"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        accuracy = step.score if shown == "score" else step.agreement
        table.add_row(
            step.step,
            "-" if accuracy is None else f"{accuracy:.4g}" if shown == "score" else quantity(accuracy, "fraction"),
            "-" if step.sqnr_db is None else quantity(step.sqnr_db, "dB"),
            count(step.macs),
            count(step.parameters),
            quantity(step.size_bytes, "bytes"),
            "-" if step.latency_ms is None else quantity(step.latency_ms, "ms"),
        )
    return table


def count(number: int | None) -> str:
    """12_345_678 -> "12.3 M"."""
    if number is None:
        return "-"
    for limit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{three_digits(number / limit)}{letter}"
    return str(number)


def draw_steps(report: Report) -> bytes:
    """The chart as .svg: accuracy above, costs as shares of the start below; the same bytes for the same figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps, names = report.steps, [step.step for step in report.steps]
    figure = Figure(figsize=(max(6.0, 1.4 * len(steps) + 3), 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    shown = _accuracy(steps)
    values = [step.score if shown == "score" else step.agreement for step in steps]
    if any(value is not None for value in values):
        above.plot(range(len(steps)), [float("nan") if v is None else v for v in values], "o-", color=_COLOURS[2])
        for index, value in enumerate(values):
            if value is not None:
                above.annotate(f"{value:.4g}", (index, value), (0, 6), textcoords="offset points", ha="center")
        above.margins(y=0.3)
    above.set_ylabel(f"{shown}, {steps[0].samples} samples")
    above.set_title(f"{report.model} for {report.target} ({report.runtime})", fontsize=10, parse_math=False)
    costs = [name for name in _COSTS if all(getattr(step, name) for step in steps)]
    width = 0.8 / max(len(costs), 1)
    for place, name in enumerate(costs):
        start = getattr(steps[0], name)
        left = [index + (place - (len(costs) - 1) / 2) * width for index in range(len(steps))]
        shares = [getattr(step, name) / start for step in steps]
        below.bar(left, shares, width * 0.92, label=_COSTS[name], color=_COLOURS[place])
    below.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--")
    below.set_ylabel("share of the start")
    below.set_xticks(range(len(steps)), names, parse_math=False)
    below.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.3)
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "edgeopt", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _accuracy(steps: Sequence[StepFigures]) -> str:
    return "score" if any(step.score is not None for step in steps) else "agreement"
