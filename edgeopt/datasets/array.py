"""Arrays -> normalised arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgeopt.datasets.fit import shape_text, with_batch
from edgeopt.datasets.transform import name_arrays
from edgeopt.errors import ConfigError, DataError
from edgeopt.types import Array, ArrayPreprocessing, TensorSpec


class ArrayTransform:
    """Applies an `ArrayPreprocessing` to every float input; token ids, masks and the like pass unchanged."""

    def __init__(self, preprocessing: ArrayPreprocessing, inputs: tuple[TensorSpec, ...]) -> None:
        self._rescale = np.float32(preprocessing.rescale)
        self._inputs = inputs
        self._mean: dict[str, Array] = {}
        self._std: dict[str, Array] = {}
        for spec in inputs:
            if spec.dtype in ("float32", "float16"):
                self._mean[spec.name] = _along(preprocessing.mean, preprocessing.channel_axis, spec)
                self._std[spec.name] = _along(preprocessing.std, preprocessing.channel_axis, spec)

    def __call__(self, raw: object, where: str) -> dict[str, Array]:
        arrays = name_arrays(raw, self._inputs, where)
        for spec in self._inputs:
            if spec.name in arrays and spec.name in self._mean:
                arrays[spec.name] = self._normalise(with_batch(arrays[spec.name], spec), spec, where)
        return arrays

    def _normalise(self, value: Array, spec: TensorSpec, where: str) -> Array:
        mean, std = self._mean[spec.name], self._std[spec.name]
        # Broadcasting would turn one channel into three without a word.
        if value.ndim != mean.ndim or not all(m in (1, v) and s in (1, v) for m, s, v in _zip(mean, std, value)):
            raise DataError(
                f"has shape {value.shape}, the model takes {shape_text(spec)}", where=f"{where}, input {spec.name!r}"
            )
        normalised: Array = (value.astype(np.float32) / self._rescale - mean) / std
        return normalised


def _zip(*arrays: Array) -> Iterator[tuple[int, ...]]:
    return zip(*(array.shape for array in arrays), strict=True)


def _along(values: tuple[float, ...], axis: int, spec: TensorSpec) -> Array:
    """The values shaped to broadcast along one axis of the batched input."""
    if len(values) == 1:
        return np.asarray(values, np.float32).reshape((1,) * len(spec.shape))
    rank = len(spec.shape)
    if not -rank <= axis < rank:
        raise ConfigError(f"channel_axis {axis} is outside the {rank} dimensions", where=f"input {spec.name!r}")
    size = spec.shape[axis]
    if isinstance(size, int) and size != len(values):
        raise ConfigError(
            f"mean or std has {len(values)} values, but axis {axis} of the input is {size} long",
            where=f"input {spec.name!r}",
        )
    shape = [1] * rank
    shape[axis] = len(values)
    return np.asarray(values, np.float32).reshape(shape)
