"""How much of a network's function another form of it keeps, on its example input and on others like it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from edgeopt.compression.base import MAX_OTHER_INTEGERS, forward
from edgeopt.types import Array, Model

#: How far the variations of the example input lie from it, in its own standard deviation.
_SPREADS = (0.1, 1.0, 3.0)


def variations(model: Model, seed: int) -> Iterator[Mapping[str, Array]]:
    """The example input, and inputs like it: floats with noise, integers and masks in another order.

    The integers of a token sequence or of a mask may not take any value; those of the example are all possible.
    """
    yield model.example_inputs
    random = np.random.default_rng(seed)
    for spread in _SPREADS:
        yield {name: _varied(values, spread, random) for name, values in model.example_inputs.items()}


def kept_db(old: Model, new: Model, inputs: Iterable[Mapping[str, Array]]) -> float:
    """SQNR of the new model's outputs against the old one's in dB, the worst of all inputs and outputs; infinite where
    they are the same, minus infinity where they differ in shape, type, finite values or more than some integers."""
    return min((_of_one(old, new, arrays) for arrays in inputs), default=math.inf)


def _varied(values: Array, spread: float, random: np.random.Generator) -> Array:
    if values.dtype.kind != "f":
        return random.permuted(values)
    deviation = float(values.std()) or 1.0
    noisy: Array = values + spread * deviation * random.standard_normal(values.shape)
    return noisy.astype(values.dtype)


def _of_one(old: Model, new: Model, arrays: Mapping[str, Array]) -> float:
    wanted, found = ([output.numpy() for output in forward(model, arrays)] for model in (old, new))
    if [(y.shape, y.dtype) for y in wanted] != [(y.shape, y.dtype) for y in found]:
        return -math.inf
    floats = [(y, z) for y, z in zip(wanted, found, strict=True) if y.dtype.kind == "f"]
    others = [(y, z) for y, z in zip(wanted, found, strict=True) if y.dtype.kind != "f"]
    if any((y != z).sum() > MAX_OTHER_INTEGERS * y.size for y, z in others):
        return -math.inf
    # What is small next to the largest output may be a difference of large values, with their rounding.
    loudest = max((_power(y) for y, _ in floats), default=0.0)
    return min((_sqnr_db(y, z, loudest) for y, z in floats), default=math.inf)


def _sqnr_db(wanted: Array, found: Array, loudest: float) -> float:
    finite = np.isfinite(wanted)
    if (finite != np.isfinite(found)).any():
        return -math.inf
    noise = _power(wanted[finite].astype(np.float64) - found[finite].astype(np.float64))
    if noise <= loudest * float(np.finfo(np.float32).eps) ** 2:
        return math.inf
    signal = _power(wanted[finite])
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _power(values: Array) -> float:
    finite = values[np.isfinite(values)].astype(np.float64)
    return float((finite**2).mean()) if finite.size else 0.0
