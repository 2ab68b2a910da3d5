"""The ranges of a network's activations, gathered in one pass with constant memory per tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from edgeopt.calibration import estimators
from edgeopt.calibration.histogram import Density, Histogram
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Array, EstimatorSpec, Finding

#: Values of one tensor and sample that enter its histogram; more are thinned out evenly. Extremes are always exact.
_HISTOGRAM_VALUES = 65_536
#: The same for min-max, which only counts how many values lie on the extremes.
_EXTREME_VALUES = 4_096

#: A tensor that stays within this is zero to any integer kernel.
_ZERO = 1e-8
#: Step given to such a tensor: the smallest that PyTorch's XNNPACK observers allow. A finer one would make
#: input scale x weight scale / output scale overflow in the kernels' requantization.
_ZERO_STEP = 2.0**-12

#: Magnitude that no activation reaches but "minus infinity" of an attention mask does.
_MASK = 1e9
#: Share of the values on one exact, non-zero extreme that is worth a finding.
_SATURATED = 0.3
#: A pile on one bound alone is a background (of a picture, of padding); what was cut off piles up on both (or at zero).
_BOTH_SIDES = 0.2
#: Halves of the data differ wildly when the mean of their samples' extremes moves by more than this share of the span
#: of both, or when one spans this many times as much as the other.
_HALVES_SHIFT, _HALVES_SPAN = 0.5, 2.0
_HALVES_MIN_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Range:
    """What an integer grid spans; min <= 0 <= max and min < max."""

    min: float
    max: float


@dataclass(slots=True)
class _Tensor:
    """What is kept of one tensor. `sums` holds each half's (number, sum of minima, sum of maxima) over updates."""

    lo: float = math.inf
    hi: float = -math.inf
    at_lo: int = 0
    at_hi: int = 0
    counted: int = 0
    histogram: Histogram | None = None
    sums: tuple[list[float], list[float]] = field(default_factory=lambda: ([0, 0.0, 0.0], [0, 0.0, 0.0]))


class ActivationRanges:
    """Fed with every activation of every calibration sample, it says which range each tensor should be quantized to.

    The same samples in any order give the same ranges, for every estimator.

    Args:
        spec: the estimator and its parameter.
        symmetric: whether ranges are [-a, a] (zero point 0); else both ends are free.
        bits: width of the integers that the ranges are for; the entropy and MSE estimators depend on it.
        total: number of samples to come, so that the two halves of the data can be compared.

    Raises:
        UsageError: when the percentile is not above 50 and at most 100.
    """

    def __init__(self, spec: EstimatorSpec, *, symmetric: bool, bits: int = 8, total: int) -> None:
        if not 50.0 < spec.percentile <= 100.0:
            raise UsageError(
                f"{spec.percentile} is no percentile to keep", where="percentile", fix="give one such as 99.99"
            )
        self._spec = spec
        self._symmetric = symmetric
        self._steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        self._total = total
        self._samples = 0
        self._tensors: dict[str, _Tensor] = {}

    def update(self, name: str, values: Array) -> None:
        """Take note of one tensor of the current sample, of any shape and real type, possibly empty.

        Raises:
            DataError: when it holds NaN or Inf (as float32).
        """
        tensor = self._tensors.setdefault(name, _Tensor())
        if values.size == 0:
            return
        flat = _as_float32(values)
        lo, hi = float(flat.min()), float(flat.max())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise DataError(
                f"holds {'NaN' if math.isnan(lo) or math.isnan(hi) else 'Inf'} in calibration sample {self._samples}",
                where=f"activation {name!r}",
                fix="check that sample and the weights, or keep that layer in float",
            )
        self._count(tensor, flat, lo, hi)
        sums = tensor.sums[0 if self._samples < self._total // 2 else 1]
        sums[0] += 1
        sums[1] += lo
        sums[2] += hi

    def next_sample(self) -> None:
        """Say that the current sample is complete."""
        self._samples += 1

    def ranges(self) -> dict[str, Range]:
        """The range of every tensor seen, by name. Each includes zero and is never empty."""
        return {name: self._range(tensor) for name, tensor in self._tensors.items()}

    def findings(self) -> tuple[Finding, ...]:
        """What looks unhealthy: `constant-activation`, `saturated-activation`, `mask-like-activation` and
        `activation-halves-differ`.
        """
        found = []
        for name, tensor in self._tensors.items():
            for code, message in _worries(tensor):
                found.append(Finding(code=code, where=name, message=message))
        return tuple(found)

    def _count(self, tensor: _Tensor, flat: Array, lo: float, hi: float) -> None:
        histogram_wanted = self._spec.name != "min-max"
        values, weight = _thin(flat, _HISTOGRAM_VALUES if histogram_wanted else _EXTREME_VALUES)
        if lo <= tensor.lo:
            at_lo = int(np.count_nonzero(values == np.float32(lo))) * weight
            tensor.at_lo = tensor.at_lo + at_lo if lo == tensor.lo else at_lo
            tensor.lo = lo
        if hi >= tensor.hi:
            at_hi = int(np.count_nonzero(values == np.float32(hi))) * weight
            tensor.at_hi = tensor.at_hi + at_hi if hi == tensor.hi else at_hi
            tensor.hi = hi
        tensor.counted += values.size * weight
        if histogram_wanted:
            tensor.histogram = tensor.histogram or Histogram()
            tensor.histogram.add(values, max(-lo, hi), weight)

    def _range(self, tensor: _Tensor) -> Range:
        lo, hi = min(tensor.lo, 0.0), max(tensor.hi, 0.0)
        if hi - lo < _ZERO:
            hi = self._steps * _ZERO_STEP
            return Range(-hi, hi) if self._symmetric else Range(0.0, hi)
        if tensor.histogram is not None:
            density = Density.of(tensor.histogram, tensor.lo, tensor.hi, tensor.at_lo, tensor.at_hi)
            lo, hi = self._estimate(density.folded() if self._symmetric else density)
        if self._symmetric:
            bound = max(-lo, hi)
            return Range(-bound, bound)
        return Range(lo, hi)

    def _estimate(self, density: Density) -> tuple[float, float]:
        match self._spec.name:
            case "percentile":
                lo, hi = estimators.percentile(density, self._spec.percentile)
            case "entropy":
                lo, hi = estimators.entropy(density, self._steps)
            case "mse":
                lo, hi = estimators.mse(density, self._steps)
            case "min-max":
                lo, hi = density.lo, density.hi
        # A percentile of a tensor that is nearly always zero can be zero at both ends.
        return (lo, hi) if hi - lo >= _ZERO else (density.lo, density.hi)


def _as_float32(values: Array) -> Array:
    """Flat, in memory order (which spares a copy of transposed arrays), as float32."""
    flat = values.ravel(order="K")
    if flat.dtype == np.float32:
        return flat
    with np.errstate(over="ignore"):
        converted: Array = flat.astype(np.float32)
    return converted


def _thin(flat: Array, limit: int) -> tuple[Array, int]:
    """Every n-th value, and n. The stride shares no factor with the size, so no channel is passed over."""
    if flat.size <= limit:
        return flat, 1
    stride = -(-flat.size // limit)
    while math.gcd(stride, flat.size) != 1:
        stride += 1
    return flat[::stride], stride


def _worries(tensor: _Tensor) -> list[tuple[str, str]]:
    if not tensor.counted:
        return [("constant-activation", "never held a value")]
    if tensor.lo == tensor.hi:
        return [("constant-activation", f"is {tensor.lo:g} everywhere in all calibration samples")]
    found = []
    if max(-tensor.lo, tensor.hi) >= _MASK:
        reach = tensor.lo if -tensor.lo > tensor.hi else tensor.hi
        found.append(("mask-like-activation", f"reaches {reach:.3g} as attention masks do; keep its layer in float"))
    shares = [count / tensor.counted for count in (tensor.at_lo, tensor.at_hi)]
    for bound, share in zip((tensor.lo, tensor.hi), shares, strict=True):
        if bound != 0.0 and share >= _SATURATED and min(shares) >= _BOTH_SIDES:
            found.append(("saturated-activation", f"{share:.0%} of its values lie exactly on its bound {bound:g}"))
    if message := _halves_worry(*tensor.sums):
        found.append(("activation-halves-differ", message))
    return found


def _halves_worry(first: list[float], second: list[float]) -> str | None:
    if first[0] + second[0] < _HALVES_MIN_SAMPLES or not first[0] or not second[0]:
        return None
    (lo1, hi1), (lo2, hi2) = ((sums[1] / sums[0], sums[2] / sums[0]) for sums in (first, second))
    span = max(hi1, hi2) - min(lo1, lo2)
    shift = max(abs(lo1 - lo2), abs(hi1 - hi2))
    narrow, wide = sorted((hi1 - lo1, hi2 - lo2))
    if span < _ZERO or (shift <= _HALVES_SHIFT * span and wide <= _HALVES_SPAN * narrow):
        return None
    halves = f"{lo1:.3g}..{hi1:.3g} per sample in the first half of the data, {lo2:.3g}..{hi2:.3g}"
    return f"spans {halves} in the second"
