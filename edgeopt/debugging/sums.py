"""The error of one layer as a few running sums, so that no sample has to be kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgeopt.types import Array
from edgeopt.validation.fidelity import SQNR_CAP_DB

#: Magnitude from which a value means "masked out" (minus infinity in attention masks): it is no signal.
_MASKED = 1e9


@dataclass(slots=True)
class ErrorSums:
    """Sums over the elements of one result, in float64; ranges are of finite, unmasked values."""

    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    low_a: float = math.inf
    high_a: float = -math.inf
    low_b: float = math.inf
    high_b: float = -math.inf
    broken: bool = False

    def add(self, a: Array, b: Array) -> None:
        """One sample: the reference and the other, of one shape."""
        wanted, given = a.astype(np.float64), b.astype(np.float64)
        is_signal = np.abs(wanted) < _MASKED  # false for NaN as well
        wanted, given = wanted[is_signal], given[is_signal]
        finite = np.isfinite(given)
        if not finite.all():
            self.broken = True
            wanted, given = wanted[finite], given[finite]
        if not wanted.size:
            return
        difference = given - wanted
        self.elements += difference.size
        self.signal += float(np.dot(wanted, wanted))
        self.noise += float(np.dot(difference, difference))
        self.error += float(difference.sum())
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.low_a, self.high_a = min(self.low_a, float(wanted.min())), max(self.high_a, float(wanted.max()))
        self.low_b, self.high_b = min(self.low_b, float(given.min())), max(self.high_b, float(given.max()))

    @property
    def sqnr_db(self) -> float:
        """Within +-SQNR_CAP_DB; the lower end where the other holds NaN or infinity, or the reference only zeros."""
        if self.broken or (self.noise > 0.0 and self.signal == 0.0):
            return -SQNR_CAP_DB
        if self.noise == 0.0:
            return SQNR_CAP_DB
        ratio = 10.0 * (math.log10(self.signal) - math.log10(self.noise))
        return min(max(ratio, -SQNR_CAP_DB), SQNR_CAP_DB)

    @property
    def mean_error(self) -> float:
        return self.error / self.elements if self.elements else 0.0

    @property
    def range_a(self) -> tuple[float, float]:
        return (self.low_a, self.high_a) if self.elements else (0.0, 0.0)

    @property
    def range_b(self) -> tuple[float, float]:
        return (self.low_b, self.high_b) if self.elements else (0.0, 0.0)
