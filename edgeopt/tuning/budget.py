"""What a search may spend, or must keep: read from the user's gates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edgeopt.tuning.trial import Score
from edgeopt.types import Gates

#: Latency of the most accurate file, by the plain quantized one's, where the user sets no limit.
DEFAULT_LATENCY_RATIO = 1.10
#: The same for its size: a large float layer may cost no time and yet double the download.
DEFAULT_SIZE_RATIO = 1.10
_ACCURACY = ("max_accuracy_drop", "min_agreement", "min_sqnr_db")
_COST = ("max_latency_ms", "min_speedup", "max_size_bytes")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a file costs to run.

    Attributes:
        ms, ratio: its latency, and that by the latency of the plain quantized file, timed in turns.
        size_bytes: of the file.
    """

    ms: float
    ratio: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits for a search; None is no limit.

    With a limit on accuracy the cheapest file that keeps all limits is wanted, cheapest by latency first and size
    second; without one, the most accurate.

    Attributes:
        max_accuracy_drop, min_agreement, min_sqnr_db, max_latency_ms, min_speedup, max_size_bytes: as in `Gates`.
        max_latency_ratio: by the plain quantized file's latency.
    """

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr_db: float | None = None
    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_size_bytes: int | None = None
    max_latency_ratio: float | None = None

    @classmethod
    def from_gates(cls, gates: Gates, chosen: frozenset[str]) -> Budget:
        """The budget that the user set.

        Args:
            gates: limits of the run. Those on cost hold whoever set them: a file that misses one is of no use.
            chosen: the gates that the user set himself. Only these make accuracy the goal; a target's own limit is a
                minimum that the most accurate file is expected to keep anyway.
        """
        accuracy = {name: getattr(gates, name) for name in _ACCURACY if name in chosen}
        cost = {name: getattr(gates, name) for name in _COST}
        is_limited = any(value is not None for value in accuracy.values())
        # "min_speedup" comes with every target and leaves too much room to be what was meant.
        is_limited |= any(cost[name] is not None and name in chosen for name in _COST)
        return cls(**accuracy, **cost, max_latency_ratio=None if is_limited else DEFAULT_LATENCY_RATIO)

    def beside(self, plain_size_bytes: int) -> Budget:
        """With the default limit on size, where the user set no limit at all."""
        if self.max_latency_ratio is None or self.max_size_bytes is not None:
            return self
        return replace(self, max_size_bytes=round(plain_size_bytes * DEFAULT_SIZE_RATIO))

    @property
    def wants_cheapest(self) -> bool:
        return any(getattr(self, name) is not None for name in _ACCURACY)

    @property
    def limits_size_only(self) -> bool:
        latency = (self.max_latency_ms, self.max_latency_ratio, self.min_speedup)
        return self.max_size_bytes is not None and all(limit is None for limit in latency) and not self.wants_cheapest

    def is_accurate(self, score: Score, with_margin: bool = False) -> bool:
        """Whether the score keeps the limits on accuracy.

        Without labels the share of changed answers stands for the drop, which it is a bound of: a metric of decisions
        can't change where no decision does.

        Args:
            with_margin: by one standard error of a share over that many samples, so that other samples of the same
                kind are likely to confirm it.
        """
        margin = _standard_errors(score, self.min_agreement) if with_margin else (0.0, 0.0)
        drop = 1 - score.agreement if score.drop is None and score.agreement is not None else score.drop
        kept = (
            _at_least(score.agreement, self.min_agreement, margin[0]),
            _at_least(score.sqnr_db, self.min_sqnr_db, 0.0),
            _at_least(_negative(drop), _negative(self.max_accuracy_drop), margin[1]),
        )
        return all(kept)

    def is_affordable(self, cost: Cost, float_ratio: float) -> bool:
        """Whether the cost keeps the limits; `float_ratio` is the float file's latency by the plain quantized one's."""
        return cost.ratio <= self.ratio_limit(cost, float_ratio) and self.fits(cost.size_bytes)

    def ratio_limit(self, cost: Cost, float_ratio: float) -> float:
        """The limits on latency as one, by the plain quantized file's latency; any measured cost gives the unit."""
        limits = [math.inf if self.max_latency_ratio is None else self.max_latency_ratio]
        if self.max_latency_ms is not None and cost.ms > 0:
            limits.append(self.max_latency_ms * cost.ratio / cost.ms)
        if self.min_speedup is not None:
            limits.append(float_ratio / self.min_speedup)
        return min(limits)

    def fits(self, size_bytes: int) -> bool:
        return self.max_size_bytes is None or size_bytes <= self.max_size_bytes


def _at_least(value: float | None, limit: float | None, margin: float) -> bool:
    """A limit on what can't be measured is not kept; gates say so too."""
    return limit is None or (value is not None and value >= min(limit + margin, max(limit, 1.0)) - 1e-9)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _standard_errors(score: Score, min_agreement: float | None) -> tuple[float, float]:
    """Of the agreement at its limit (binomial), and of the drop, which only disagreeing samples can change."""
    agreement = 0.0
    if min_agreement is not None:
        agreement = math.sqrt(min_agreement * (1 - min_agreement) / score.samples)
    disagreement = 1 - score.agreement if score.agreement is not None else 0.0
    return agreement, math.sqrt(disagreement / score.samples)
