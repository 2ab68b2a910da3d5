"""What a search tried and found, as findings for the report."""

from __future__ import annotations

from collections.abc import Iterator

from edgeopt.tuning.effort import FULL, effort_for
from edgeopt.tuning.frontier import Frontier, Point
from edgeopt.tuning.recipe import Step, Tuned
from edgeopt.tuning.trial import Score
from edgeopt.types import Finding

_NAMES = 4
_SHORTENED = (
    "a conversion to {} takes many seconds, so fewer assignments were tried than in other formats; keep-float with the "
    "worst layers of `edgeopt sensitivity` may find a better one"
)


def findings(tuned: Tuned) -> tuple[Finding, ...]:
    """One finding "recipe-step" for each thing that was tried, one "mixed-precision" for each file that no other
    beats in both latency and accuracy, "search-shortened" where the format is slow to convert to, and
    "budget-not-met" where nothing keeps the budget."""
    return tuple(_findings(tuned))


def _findings(tuned: Tuned) -> Iterator[Finding]:
    for step in tuned.steps:
        yield Finding("recipe-step", step.name, _step(step))
    if tuned.frontier is not None:
        for point in tuned.frontier.efficient:
            chosen = " (chosen)" if point == tuned.frontier.chosen else ""
            yield Finding("mixed-precision", f"{_layers(point)}{chosen}", figures(point))
    if tuned.sensitivity is not None and effort_for(tuned.sensitivity.format) != FULL:
        yield Finding("search-shortened", "mixed precision", _SHORTENED.format(tuned.sensitivity.format))
    if not tuned.met:
        yield Finding("budget-not-met", "recipe", _shortfall(tuned))


def _step(step: Step) -> str:
    parts = [step.outcome if step.score is None else f"{step.outcome}: {_score(step.score)}"]
    if step.gain_db is not None:
        parts.append(f"{step.gain_db:+.2f} dB")
    if step.note:
        parts.append(step.note)
    return ", ".join(parts)


def _score(score: Score) -> str:
    parts = []
    if score.sqnr_db is not None:
        parts.append(f"SQNR {score.sqnr_db:.2f} dB")
    if score.agreement is not None:
        parts.append(f"agreement {100 * score.agreement:.2f} %")
    if score.drop is not None:
        parts.append(f"drop {100 * score.drop:.2f} points")
    return ", ".join(parts)


def figures(point: Point) -> str:
    """A point of the frontier in words."""
    mib = point.cost.size_bytes / (1 << 20)
    return f"{point.cost.ratio:.2f}x the plain latency, {mib:.2f} MiB, {_score(point.score)}"


def _layers(point: Point) -> str:
    parts = []
    for layers, precision in ((point.float_layers, "float"), (point.int16_layers, "16-bit activations")):
        if layers:
            rest = f" and {len(layers) - _NAMES} more" if len(layers) > _NAMES else ""
            parts.append(f"{', '.join(layers[:_NAMES])}{rest} {precision}")
    return "; ".join(parts) or "all layers quantized"


def _shortfall(tuned: Tuned) -> str:
    frontier: Frontier | None = tuned.frontier
    if frontier is None:
        return f"nothing that was tried keeps the budget; the best gives {_score(tuned.after)}"
    shown = "; ".join(figures(point) for point in frontier.efficient)
    return f"no assignment keeps the budget; the frontier, fastest first: {shown}"
