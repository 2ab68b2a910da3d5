"""What a search for an assignment has measured, and which of it the budget picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeopt.tuning.budget import Budget, Cost
from edgeopt.tuning.trial import Score
from edgeopt.types import LayerRules

#: Latencies closer than this, by the plain file's, count as equal; bytes decide then.
SAME_LATENCY = 0.01


@dataclass(frozen=True, slots=True)
class Point:
    """One exported and measured file.

    Attributes:
        origin: how it was come by ("plain", "last layer float", "predicted", ...).
        rules: which layers are exempt, as the exporter took them.
        float_layers, int16_layers: the same layer by layer.
        confirmed: whether `cost` is from a longer measurement of its own.
    """

    origin: str
    rules: LayerRules
    float_layers: tuple[str, ...]
    int16_layers: tuple[str, ...]
    score: Score
    cost: Cost
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points of a search, the fastest first, and the verdict.

    Attributes:
        chosen: what the budget picks; where nothing keeps it, the most accurate of what comes nearest.
        met: whether `chosen` keeps the budget.
        float_ratio: latency of the float file by the plain quantized one's.
    """

    points: tuple[Point, ...]
    chosen: Point
    met: bool
    float_ratio: float

    @property
    def efficient(self) -> tuple[Point, ...]:
        """Points that no other beats in both latency and noise."""
        best = float("inf")
        kept = []
        for point in sorted(self.points, key=lambda p: (p.cost.ratio, p.score.noise)):
            if point.score.noise < best:
                best = point.score.noise
                kept.append(point)
        return tuple(kept)


def pick(points: Sequence[Point], budget: Budget, float_ratio: float) -> tuple[Point, bool]:
    """The point that the budget wants, and whether it keeps the budget."""
    affordable = [point for point in points if budget.is_affordable(point.cost, float_ratio)]
    if not affordable:
        return min(points, key=lambda p: (not budget.fits(p.score.size_bytes), p.cost.ratio)), False
    if not budget.wants_cheapest:
        return min(affordable, key=_noise), True
    safe = [point for point in affordable if budget.is_accurate(point.score, with_margin=True)]
    if safe:
        return min(safe, key=_price), True
    # Nothing is likely to keep the limit on other samples as well: take what is likeliest to.
    best = min(affordable, key=_noise)
    accurate = [point for point in affordable if budget.is_accurate(point.score)]
    if accurate:
        return min(accurate, key=_noise), True
    return best, False


def _noise(point: Point) -> float:
    return point.score.noise


def _price(point: Point) -> tuple[int, int, float]:
    return round(point.cost.ratio / SAME_LATENCY), point.score.size_bytes, point.score.noise
