"""Samples of different lengths in one batch: shorter ones are filled up at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from edgeopt.errors import DataError
from edgeopt.types import Array, Dim, Sample, TensorSpec

#: A label that no loss counts.
SKIPPED = -100


def free_dims(inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    """Names of the dimensions along which samples of a batch may be filled up, in the order of the inputs."""
    return tuple(dict.fromkeys(name for spec in inputs for name, _ in _free_axes(spec)))


def sizes_of(sample: Sample, inputs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    """How long the sample is along each of the `free_dims`.

    Raises DataError where it lacks an input, or one has another rank.
    """
    found: dict[str, int] = {}
    for spec in inputs:
        for name, axis in _free_axes(spec):
            array = array_of(sample, spec)
            if array.ndim <= axis:
                raise DataError(f"has {array.ndim} dimensions", where=_place(sample, spec))
            found[name] = max(found.get(name, 0), array.shape[axis])
    return tuple(found.values())


def array_of(sample: Sample, spec: TensorSpec) -> Array:
    """Raises DataError where the sample lacks that input."""
    if spec.name not in sample.inputs:
        raise DataError(f"lacks the input {spec.name!r}", where=f"training sample {sample.name!r}")
    return sample.inputs[spec.name]


def stack(spec: TensorSpec, samples: Sequence[Sample]) -> Tensor:
    """One input of a batch; where the shapes differ along a free dimension, filled up to the longest.

    Raises DataError where the samples don't fit in one batch.
    """
    arrays = [np.asarray(array_of(sample, spec), dtype=spec.dtype) for sample in samples]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) == 1:
        return torch.from_numpy(np.ascontiguousarray(np.concatenate(arrays)))
    free = {axis for _, axis in _free_axes(spec)}
    shape = arrays[0].shape
    for sample, array in zip(samples, arrays, strict=True):
        fixed = [axis for axis in range(1, len(shape)) if axis not in free]
        if array.ndim != len(shape) or any(array.shape[axis] != shape[axis] for axis in fixed) or not free:
            raise DataError(
                f"has shape {array.shape}, sample {samples[0].name!r} has {shape}: they don't fit in one batch",
                where=_place(sample, spec),
                fix="pad the samples to one size, let the model's input say what it may be filled up with (padding), "
                "or train with --batch-size 1",
            )
    return torch.from_numpy(_filled(arrays, spec.padding or 0))


def stack_labels(samples: Sequence[Sample], *, may_pad: bool) -> Tensor | None:
    """Labels of a batch; None where a sample has none.

    Args:
        may_pad: fill shorter whole numbers up with a label that doesn't count.

    Raises DataError for labels of different shapes.
    """
    labels = [sample.label for sample in samples]
    if any(label is None for label in labels):
        return None
    arrays: list[Array] = [np.asarray(label) for label in labels]
    first = arrays[0]
    if any(array.shape != first.shape for array in arrays):
        is_padded = may_pad and all(array.ndim == first.ndim > 0 and array.dtype.kind in "iu" for array in arrays)
        if not is_padded:
            odd, array = next((s, a) for s, a in zip(samples, arrays, strict=True) if a.shape != first.shape)
            raise DataError(
                f"has a label of shape {array.shape}, sample {samples[0].name!r} one of {first.shape}",
                where=f"training sample {odd.name!r}",
            )
        # A label array may carry the batch dimension of 1 that inputs have.
        rows = arrays if all(array.shape[0] == 1 for array in arrays) else [array[np.newaxis] for array in arrays]
        return torch.from_numpy(_filled([row.astype(np.int64) for row in rows], SKIPPED))
    stacked = np.concatenate(arrays) if first.ndim > 0 and first.shape[0] == 1 else np.stack(arrays)
    if stacked.dtype.kind in "iub":
        return torch.from_numpy(stacked.astype(np.int64))
    return torch.from_numpy(stacked.astype(np.float32))


def real_positions(sizes: Tensor, lengths: Sequence[int], dims: Sequence[int | None]) -> Tensor:
    """Which positions of a tensor of a batch are a sample's own, and not filled in.

    Args:
        sizes: (samples, free dimensions), how long each sample is.
        lengths: of the tensor's axes behind the batch.
        dims: for each of these axes, which free dimension it goes along; None for none.

    Returns a bool tensor (samples, ...) with an axis for each of `lengths`.
    """
    real = torch.ones(len(sizes), *lengths, dtype=torch.bool, device=sizes.device)
    for axis, (length, dim) in enumerate(zip(lengths, dims, strict=True)):
        if dim is not None:
            inside = torch.arange(length, device=sizes.device) < sizes[:, dim, None]
            shape = [len(sizes), *(1 for _ in lengths)]
            shape[axis + 1] = length
            real = real & inside.reshape(shape)
    return real


def _filled(arrays: Sequence[Array], filler: int) -> Array:
    """The arrays, all of one rank, joined along their first axis."""
    longest = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
    result = np.full((sum(map(len, arrays)), *longest), filler, arrays[0].dtype)
    start = 0
    for array in arrays:
        place = (slice(start, start + len(array)), *(slice(0, size) for size in array.shape[1:]))
        result[place] = array
        start += len(array)
    return result


def _free_axes(spec: TensorSpec) -> Iterator[tuple[str, int]]:
    """Names and places of the dimensions that may be filled up; the batch is none of them."""
    if spec.padding is not None:
        for axis, dim in enumerate(spec.shape):
            if axis and isinstance(dim, Dim):
                yield dim.name, axis


def _place(sample: Sample, spec: TensorSpec) -> str:
    return f"input {spec.name!r} of training sample {sample.name!r}"
