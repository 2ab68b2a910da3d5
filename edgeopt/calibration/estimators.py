"""Range estimators: which part of an activation's values an integer grid should span.

Each takes the density of a tensor and the number of steps between the grid's ends, and returns (lo, hi) with
lo <= 0 <= hi inside the data's own extremes. A symmetric range is the one-sided range of the magnitudes, so it needs
no code of its own. The grid is that of every format here: q = clip(rint(x / s) + z) with s = (hi - lo) / steps.
"""

from __future__ import annotations

import numpy as np

from edgeopt.calibration.histogram import Density
from edgeopt.types import Array

#: A narrower range must lower the error by more than this share: a natural bound (ReLU6's 6) is kept unless it costs.
_WORTHWHILE = 0.01

_KL_CANDIDATES = 128

#: How an end moves inwards when the squared error is searched: down to 1 % of the extreme, then in finer steps.
_SHRINK, _SHRINKS, _REFINEMENTS = 0.93, 64, 17


def percentile(density: Density, percent: float) -> tuple[float, float]:
    """The range that keeps `percent` % of the values; what is cut is shared by the tails that there are.

    Interpolated linearly within a bin. Zero is always kept, so a tail with fewer values than its share ends at zero.
    """
    counts = density.all_counts()
    tails = int(density.lo < 0) + int(density.hi > 0)
    cut = density.total * (1.0 - percent / 100.0) / max(tails, 1)
    split = int(np.searchsorted(density.edges, 0.0))
    above = _quantile(density.edges[split:], counts[split:], density.at(density.hi), cut)
    below = _quantile(-density.edges[: split + 1][::-1], counts[:split][::-1], density.at(density.lo), cut)
    return 0.0 - below, above


def _quantile(edges: Array, counts: Array, at_end: int, cut: float) -> float:
    """Point with `cut` values beyond it, on a one-sided density that begins at zero and has an atom at its end."""
    if counts.sum() <= cut:
        return 0.0
    if cut <= at_end:
        return float(edges[-1])
    counts = np.append(counts[:-1], counts[-1] - at_end)
    beyond = at_end + np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
    # `beyond` falls from the total to what lies on the end; np.interp wants it rising.
    return float(np.interp(cut, beyond[::-1], edges[::-1]))


def entropy(density: Density, steps: int) -> tuple[float, float]:
    """The threshold T on the magnitude whose quantized distribution loses least information (KL divergence).

    After S. Migacz, "8-bit Inference with TensorRT" (GTC 2017): the values beyond T are counted into the outermost
    bins of the reference P; Q spreads each quantization level's values evenly over those of its bins that P occupies.
    Taken further here: the range is [max(lo, -T), min(hi, T)] with the real grid's levels, so one-sided data (ReLU)
    uses all levels, and an end closer to zero than T (hardswish's -0.375) stays exact. Exact zeros lose nothing at
    any T and take no part.
    """
    counts = density.all_counts()
    width = float(np.diff(density.edges).max())
    split = int(np.searchsorted(density.edges, 0.0))
    centres = (density.edges[:-1] + density.edges[1:]) / 2
    longest = max(split, counts.size - split)
    best, least = (density.lo, density.hi), np.inf
    for kept in np.unique(np.linspace(longest, 1, _KL_CANDIDATES).astype(int))[::-1]:
        first, last = max(split - kept, 0), min(split + kept, counts.size)
        if last - first <= steps:
            break
        lo, hi = max(density.lo, -kept * width), min(density.hi, kept * width)
        inside = counts[first:last]
        reference = inside.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        level = np.rint(centres[first:last] * (steps / (hi - lo))).astype(np.intp)
        divergence = _divergence(reference, _spread(inside, reference > 0, level - level[0]))
        if divergence < least:
            best, least = (lo, hi), divergence
    return best


def _spread(counts: Array, occupied: Array, level: Array) -> Array:
    """Each level's values, evenly over its occupied bins."""
    mass = np.bincount(level, weights=counts)
    bins = np.maximum(np.bincount(level, weights=occupied), 1)
    spread: Array = (mass / bins)[level] * occupied
    return spread


def _divergence(reference: Array, candidate: Array) -> float:
    """KL(P || Q), both over P's total; a bin that holds nothing but cut values counts as half a value in Q."""
    occupied = reference > 0
    if not occupied.any():
        return 0.0
    p = reference[occupied]
    q = np.maximum(candidate[occupied], 0.5)
    return float(np.sum(p * np.log(p / q)) / p.sum())


def mse(density: Density, steps: int) -> tuple[float, float]:
    """The range that minimises E[(x - Q(x))^2], rounding and clipping together.

    The rounding error grows with (hi - lo)^2 and each end's clipping error is convex in that end, so their sum is
    convex but for the ripple of the grid: searching one end after the other, coarse to fine, finds its minimum.
    """
    lo, hi = density.lo, density.hi
    least = _squared_error(density, lo, hi, steps)
    while True:
        before = least
        for end in ("hi", "lo"):
            (lo, hi), least = _search(density, (lo, hi), least, steps, end)
        if least >= before * (1 - _WORTHWHILE):
            return lo, hi


def _search(
    density: Density, current: tuple[float, float], least: float, steps: int, end: str
) -> tuple[tuple[float, float], float]:
    """Move one end of the range between zero and the data's extreme; returns the range and its error."""
    outermost = density.hi if end == "hi" else density.lo
    if outermost == 0.0:
        return current, least
    best, bound = current, least * (1 - _WORTHWHILE)
    ends = outermost * _SHRINK ** np.arange(_SHRINKS)
    for _ in range(2):
        ranges = [(current[0], float(x)) if end == "hi" else (float(x), current[1]) for x in ends]
        errors = [_squared_error(density, lo, hi, steps) for lo, hi in ranges]
        winner = int(np.argmin(errors))
        if errors[winner] < bound:
            best, least, bound = ranges[winner], errors[winner], errors[winner]
        ends = np.linspace(ends[max(winner - 1, 0)], ends[min(winner + 1, ends.size - 1)], _REFINEMENTS)
    return best, least


def _squared_error(density: Density, lo: float, hi: float, steps: int) -> float:
    """Sum over all values of (x - Q(x))^2, with values spread evenly within their bin; closed form, no sampling.

    In units of the step s, with u = x / s and the grid k0..k1: the antiderivative of (u - Q(u))^2 is
    (n - k0) / 12 + (r^3 + d^3) / 3, where n is the grid point nearest to u, r = clip(u) - n and d = u - clip(u).
    """
    step = (hi - lo) / steps
    first = round(lo / step)
    last = first + steps
    u = density.edges / step
    inside = np.clip(u, first, last)
    nearest = np.rint(inside)
    rest, beyond = inside - nearest, u - inside
    integral = (nearest - first) / 12 + (rest * rest * rest + beyond * beyond * beyond) / 3
    widths = np.diff(u)
    # Clipping the edges to the data's extremes can leave an outermost bin without width; its values are atoms.
    density_in_bins = np.divide(density.counts, widths, out=np.zeros_like(widths), where=widths > 0)
    total = float(np.dot(density_in_bins, np.diff(integral)))
    for value, count in density.atoms:
        scaled = value / step
        total += count * (scaled - min(max(round(scaled), first), last)) ** 2
    return total * step * step
