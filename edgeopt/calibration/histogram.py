"""A streaming histogram in constant memory whose result doesn't depend on the order of the data.

The bins lie on an absolute grid: bin k covers [k * w, (k + 1) * w), where the width w is a power of two. When a value
falls outside, w doubles (as often as needed) and neighbouring bins merge two by two, which is exact because bin k of
width w lies wholly in bin floor(k / 2) of width 2w. Scaling by a power of two is exact in floating point too, so the
final counts depend only on the values and the final width, and that only on the largest magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgeopt.types import Array

#: Bins on each side of zero. The largest magnitude lies in the outer half of them, so that at least 2048 are in use:
#: eight for each level of an 8-bit range.
BINS_PER_SIDE = 4096
_BITS = BINS_PER_SIDE.bit_length() - 1

#: Exponent below which the grid gets no finer: keeps 1 / w finite in float32. Smaller values are zero to any kernel.
_MIN_EXPONENT = -100


class Histogram:
    """Counts of float32 values on the grid described above, exact zeros aside.

    Zeros are counted apart because every quantizer here represents zero exactly: the half of a ReLU's output that is
    zero carries no error, and must not be mistaken for values spread over the bin [0, w).
    """

    def __init__(self) -> None:
        self.counts: Array = np.zeros(2 * BINS_PER_SIDE, dtype=np.int64)
        self.zeros = 0
        self._exponent = _MIN_EXPONENT

    @property
    def width(self) -> float:
        """Width of one bin."""
        return math.ldexp(1.0, self._exponent - _BITS)

    def add(self, values: Array, magnitude: float, weight: int) -> None:
        """Count a flat float32 array whose largest magnitude is at most `magnitude`, each value `weight` times."""
        self._make_room(magnitude)
        scaled = np.floor(values * np.float32(1.0 / self.width))
        bins = scaled.astype(np.intp)
        bins += BINS_PER_SIDE
        zeros = (values.size - int(np.count_nonzero(values))) * weight
        self.counts += np.bincount(bins, minlength=self.counts.size) * weight
        self.counts[BINS_PER_SIDE] -= zeros
        self.zeros += zeros

    def _make_room(self, magnitude: float) -> None:
        # frexp: magnitude < 2 ** exponent, and at least half of it.
        exponent = max(math.frexp(magnitude)[1], _MIN_EXPONENT) if magnitude else _MIN_EXPONENT
        if exponent <= self._exponent:
            return
        # After 12 doublings all that is left of a side is its innermost bin; further ones change nothing.
        doublings = min(exponent - self._exponent, _BITS)
        merged = self.counts.reshape(-1, 1 << doublings).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        first = BINS_PER_SIDE - (BINS_PER_SIDE >> doublings)
        self.counts[first : first + merged.size] = merged
        self._exponent = exponent


@dataclass(frozen=True, slots=True)
class Density:
    """How often which value occurs: what an estimator looks at.

    Attributes:
        lo, hi: exact extremes, widened to include zero.
        edges: bin boundaries, clipped to [lo, hi] (n + 1 of them), ascending.
        counts: values in each bin (n), without zeros and without those at the exact extremes.
        zeros: number of exact zeros.
        atoms: (value, count) of the exact extremes, where an activation function's bound piles values up; zero is
            never one of them.
    """

    lo: float
    hi: float
    edges: Array
    counts: Array
    zeros: int
    atoms: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, histogram: Histogram, lo: float, hi: float, at_lo: int, at_hi: int) -> Density:
        """Args: `lo`, `hi` are the exact extremes of the data, `at_lo` and `at_hi` how many values lie on them."""
        width = histogram.width
        first = math.floor(min(lo, 0.0) / width)
        last = max(math.floor(max(hi, 0.0) / width), 0)
        counts = histogram.counts[BINS_PER_SIDE + first : BINS_PER_SIDE + last + 1].astype(np.float64)
        atoms = []
        for value, count in {lo: at_lo, hi: at_hi}.items():
            if value != 0.0 and count:
                counts[math.floor(value / width) - first] -= count
                atoms.append((value, count))
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        edges = np.clip(np.arange(first, last + 2) * width, lo, hi)
        return cls(lo, hi, edges, counts, histogram.zeros, tuple(atoms))

    @property
    def total(self) -> float:
        return float(self.counts.sum()) + self.zeros + sum(count for _, count in self.atoms)

    def at(self, value: float) -> int:
        """How many values lie exactly on an extreme."""
        return sum(count for where, count in self.atoms if where == value)

    def all_counts(self) -> Array:
        """`counts` with the atoms put back into their bins."""
        counts = self.counts.copy()
        for value, count in self.atoms:
            counts[min(int(np.searchsorted(self.edges, value, side="right")) - 1, counts.size - 1)] += count
        return counts

    def folded(self) -> Density:
        """The density of the magnitude |x|; exact, since the grid is aligned at zero (bin k < 0 goes to -k - 1)."""
        split = int(np.searchsorted(self.edges, 0.0))
        negative, positive = self.counts[:split][::-1], self.counts[split:]
        size = max(negative.size, positive.size)
        counts = np.zeros(size)
        counts[: negative.size] += negative
        counts[: positive.size] += positive
        hi = max(self.hi, -self.lo)
        longer = self.edges[split:] if positive.size >= negative.size else -self.edges[: split + 1][::-1]
        edges = np.clip(longer, 0.0, hi)
        edges[-1] = hi
        atoms = tuple((abs(value), count) for value, count in self.atoms)
        return Density(0.0, hi, edges, counts, self.zeros, atoms)
