"""Is the calibration data fit to calibrate with? Looks at the model's inputs before anything is quantized."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from edgeopt.errors import DataError
from edgeopt.types import Array, Finding, Sample, TensorSpec

#: Below this, the extremes of the activations still move a lot with each further sample.
_FEW_SAMPLES = 32
#: Share of an input's values on one exact extreme that is worth a finding. Black borders of pictures stay below it.
_SATURATED = 0.5
#: A float input that reaches this and holds nothing below zero looks like pixels that nobody scaled.
_PIXEL_MAX, _PIXEL_MIN_PEAK = 255.0, 32.0
#: A float input beyond this was not normalised by any usual recipe.
_LARGE = 1e4
#: The halves of the data differ wildly when their means lie this many standard deviations of a sample's mean apart
#: (with n samples a half, chance alone gives about sqrt(2 / n)), or one spreads this many times as wide.
_HALVES_SHIFT, _HALVES_SPREAD = 3.0, 3.0
_HALVES_MIN_SAMPLES = 8
#: Share of one id in a sample of token ids that leaves nearly no text.
_PADDED = 0.95
#: Share of samples that repeat an earlier one.
_REPEATED = 0.05


@dataclass(slots=True)
class _Half:
    """Sums over one half of the samples: of their means, of the means' squares, and of their standard deviations."""

    samples: int = 0
    means: float = 0.0
    squares: float = 0.0
    spreads: float = 0.0

    def add(self, mean: float, spread: float) -> None:
        self.samples += 1
        self.means += mean
        self.squares += mean * mean
        self.spreads += spread

    def mean(self) -> float:
        return self.means / self.samples

    def variance(self) -> float:
        """Of the samples' means."""
        return max(self.squares / self.samples - self.mean() ** 2, 0.0)

    def spread(self) -> float:
        """Mean standard deviation within a sample."""
        return self.spreads / self.samples


@dataclass(slots=True)
class _Input:
    """What is kept of one input: extremes with the number of values on them, whether all are whole, and both halves."""

    is_float: bool
    lo: float = math.inf
    hi: float = -math.inf
    at_lo: int = 0
    at_hi: int = 0
    values: int = 0
    all_whole: bool = True
    constant_samples: int = 0
    padded_samples: int = 0
    halves: tuple[_Half, _Half] = field(default_factory=lambda: (_Half(), _Half()))


class InputHealth:
    """Checks the inputs of samples as they stream by; keeps a few numbers per input and a short hash per sample.

    Args:
        inputs: the model's inputs.
        count: number of samples to come.
    """

    def __init__(self, inputs: tuple[TensorSpec, ...], count: int) -> None:
        self._inputs = {spec.name: _Input(is_float=spec.dtype.startswith("float")) for spec in inputs}
        self._count = count
        self._seen = 0
        self._digests: set[bytes] = set()

    def update(self, sample: Sample) -> None:
        """Look at one sample.

        Raises:
            DataError: when it lacks an input, or an input is empty or holds NaN or Inf.
        """
        digest = hashlib.blake2b(digest_size=8)
        for name, state in self._inputs.items():
            if name not in sample.inputs:
                raise DataError(f"lacks the input {name!r}", where=f"sample {sample.name!r}")
            values = np.ascontiguousarray(sample.inputs[name])
            _check_values(values, f"input {name!r} of sample {sample.name!r}")
            _observe(state, values, state.halves[0 if self._seen < self._count // 2 else 1])
            digest.update(f"{values.dtype}{values.shape}".encode())
            digest.update(values.data)
        self._digests.add(digest.digest())
        self._seen += 1

    def findings(self) -> tuple[Finding, ...]:
        """What looks unfit: `too-few-samples`, `repeated-samples`, and per input `constant-input`, `constant-tokens`,
        `saturated-input`, `unnormalised-input`, `input-halves-differ`.

        Raises:
            DataError: when there was no sample at all.
        """
        if self._seen == 0:
            raise DataError("holds no samples", where="calibration data", fix="give at least a few dozen")
        found = []
        if self._seen < _FEW_SAMPLES:
            message = f"{self._seen} samples are few to calibrate with; ranges settle from about {_FEW_SAMPLES} on"
            found.append(Finding("too-few-samples", "calibration data", message))
        repeated = self._seen - len(self._digests)
        if repeated > _REPEATED * self._seen:
            message = f"{repeated} of {self._seen} samples repeat another one exactly"
            found.append(Finding("repeated-samples", "calibration data", message))
        for name, state in self._inputs.items():
            worries = _float_worries(state, self._seen) if state.is_float else _integer_worries(name, state, self._seen)
            found += [Finding(code, name, message) for code, message in worries]
        return tuple(found)


def check_inputs(samples: Iterable[Sample], inputs: tuple[TensorSpec, ...], count: int) -> tuple[Finding, ...]:
    """Stream through the samples once and say what looks unfit; see `InputHealth` for the codes and errors."""
    health = InputHealth(inputs, count)
    for sample in samples:
        health.update(sample)
    return health.findings()


def _check_values(values: Array, where: str) -> None:
    if values.size == 0:
        raise DataError("is empty", where=where)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        kind = "NaN" if np.isnan(values).any() else "Inf"
        raise DataError(f"holds {kind}", where=where, fix="mend or remove that sample")


def _observe(state: _Input, values: Array, half: _Half) -> None:
    lowest, highest = values.min(), values.max()
    at_lo, at_hi = (int(np.count_nonzero(values == extreme)) for extreme in (lowest, highest))
    lo, hi = float(lowest), float(highest)
    if lo <= state.lo:
        state.at_lo = at_lo + (state.at_lo if lo == state.lo else 0)
        state.lo = lo
    if hi >= state.hi:
        state.at_hi = at_hi + (state.at_hi if hi == state.hi else 0)
        state.hi = hi
    state.values += values.size
    state.constant_samples += lo == hi
    if state.is_float:
        # One fractional value settles it for good, so this costs nothing on normalised data.
        state.all_whole = state.all_whole and bool((values == np.rint(values)).all())
        wide = values.astype(np.float64, copy=False)
        half.add(float(wide.mean()), float(wide.std()))
    else:
        # Padding stands at the end, or at the start for decoders.
        padding = max(int(np.count_nonzero(values == values.flat[i])) for i in (0, -1))
        state.padded_samples += values.size > 1 and padding >= _PADDED * values.size


def _float_worries(state: _Input, samples: int) -> list[tuple[str, str]]:
    if state.lo == state.hi:
        return [("constant-input", f"is {state.lo:g} everywhere in all {samples} samples")]
    found = []
    if state.constant_samples > samples / 4:
        message = f"{state.constant_samples} of {samples} samples hold one single value each"
        found.append(("constant-input", message))
    for bound, count in ((state.lo, state.at_lo), (state.hi, state.at_hi)):
        share = count / state.values
        if share >= _SATURATED:
            found.append(("saturated-input", f"{share:.0%} of its values lie exactly on its extreme {bound:g}"))
    if state.lo >= 0 and _PIXEL_MIN_PEAK <= state.hi <= _PIXEL_MAX:
        kind = "whole numbers " if state.all_whole else ""
        message = f"holds {kind}{state.lo:g}..{state.hi:g}, which looks like pixels that were not normalised"
        found.append(("unnormalised-input", message))
    elif max(-state.lo, state.hi) >= _LARGE:
        found.append(("unnormalised-input", f"spans {state.lo:g}..{state.hi:g}, which looks like raw units"))
    return found + _halves_worry(state, samples)


def _halves_worry(state: _Input, samples: int) -> list[tuple[str, str]]:
    first, second = state.halves
    if samples < _HALVES_MIN_SAMPLES or not first.samples or not second.samples:
        return []
    deviation = math.sqrt((first.variance() + second.variance()) / 2)
    scale = max(deviation, 1e-3 * (state.hi - state.lo))
    shift = abs(first.mean() - second.mean()) / scale
    narrow, wide = sorted((first.spread(), second.spread()))
    if shift <= _HALVES_SHIFT and wide <= _HALVES_SPREAD * narrow:
        return []
    message = (
        f"the two halves of the samples differ: mean {first.mean():.3g} and {second.mean():.3g}, "
        f"standard deviation {first.spread():.3g} and {second.spread():.3g}; shuffle the data or draw it evenly"
    )
    return [("input-halves-differ", message)]


def _integer_worries(name: str, state: _Input, samples: int) -> list[tuple[str, str]]:
    """Token ids should vary. A mask that is 1 everywhere and segment ids that are 0 everywhere are in order."""
    if state.lo == state.hi:
        if state.lo == 1.0 or (state.lo == 0.0 and any(part in name for part in ("type", "segment"))):
            return []
        return [("constant-tokens", f"is {state.lo:g} everywhere in all {samples} samples")]
    if state.hi > 1 and state.padded_samples > samples / 4:
        message = f"{state.padded_samples} of {samples} samples hold one id nearly everywhere, which looks like padding"
        return [("constant-tokens", message)]
    return []
