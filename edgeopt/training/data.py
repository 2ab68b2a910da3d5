"""Samples one by one -> shuffled batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from edgeopt.errors import DataError
from edgeopt.types import Array, Sample, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeopt.datasets.base import Dataset


#: One tensor (batch, ...) per input of the model, in its order, and the labels last where every sample has one.
#: Accelerate moves and counts tuples of tensors, nothing else.
Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on.

    Attributes:
        training: shuffled anew in every epoch.
        validation: judges the epochs; None keeps the last one.
        calibration: at each call a fresh stream of the network's arguments for one sample, for activation ranges.
        count: how many of these samples there are.
        inputs: the model's.
    """

    training: Dataset
    validation: Dataset | None
    calibration: Callable[[], Iterator[tuple[Tensor, ...]]]
    count: int
    inputs: tuple[TensorSpec, ...]


def parts(batch: Batch, inputs: tuple[TensorSpec, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The model's arguments, and the labels or None."""
    count = len(inputs)
    return batch[:count], batch[count] if len(batch) > count else None


class EpochOrder(Sampler[int]):
    """A permutation for each epoch; the same seed and epoch give the same one in every process.

    A data set that can only be read forwards (`is_sequential`) keeps its order.
    """

    def __init__(self, data: Dataset, seed: int) -> None:
        self._count = len(data)
        self._shuffled = not getattr(data, "is_sequential", False)
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        if not self._shuffled:
            return iter(range(self._count))
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._count)
        return iter(order.tolist())


class _Samples(TorchDataset[Any]):  # what it holds before and after collation differ in type
    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        return self._data[index]


def training_batches(
    data: Dataset, inputs: tuple[TensorSpec, ...], batch_size: int, order: EpochOrder
) -> DataLoader[Batch]:
    """Batches in the order's current permutation. A last batch that is not full is left out: batch statistics of a
    few samples would be noise. Raises DataError, while iterating, for samples that can't be stacked."""
    return DataLoader(
        _Samples(data),
        batch_size=min(batch_size, len(data)),
        sampler=order,
        drop_last=True,
        collate_fn=_Stack(inputs),
    )


def validation_batches(data: Dataset, inputs: tuple[TensorSpec, ...], batch_size: int) -> DataLoader[Batch]:
    """Every sample once, in order."""
    return DataLoader(_Samples(data), batch_size=batch_size, shuffle=False, collate_fn=_Stack(inputs))


class _Stack:
    def __init__(self, inputs: tuple[TensorSpec, ...]) -> None:
        self._inputs = inputs

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        labels = _stack_labels(samples)
        return (*(self._stack(spec, samples) for spec in self._inputs), *(() if labels is None else (labels,)))

    def _stack(self, spec: TensorSpec, samples: Sequence[Sample]) -> Tensor:
        for sample in samples:
            if spec.name not in sample.inputs:
                raise DataError(f"lacks the input {spec.name!r}", where=f"training sample {sample.name!r}")
            shape, first = sample.inputs[spec.name].shape, samples[0].inputs[spec.name].shape
            if shape[1:] != first[1:]:
                raise DataError(
                    f"has shape {shape}, sample {samples[0].name!r} has {first}: they don't fit in one batch",
                    where=f"input {spec.name!r} of training sample {sample.name!r}",
                    fix="pad the samples to one size, or train with --batch-size 1",
                )
        arrays = [np.asarray(sample.inputs[spec.name], dtype=spec.dtype) for sample in samples]
        return torch.from_numpy(np.ascontiguousarray(np.concatenate(arrays)))


def _stack_labels(samples: Sequence[Sample]) -> Tensor | None:
    labels = [sample.label for sample in samples]
    if any(label is None for label in labels):
        return None
    arrays: list[Array] = [np.asarray(label) for label in labels]
    for sample, array in zip(samples, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"has a label of shape {array.shape}, sample {samples[0].name!r} one of {arrays[0].shape}",
                where=f"training sample {sample.name!r}",
            )
    # A label array may carry the batch dimension of 1 that inputs have.
    stacked = np.concatenate(arrays) if arrays[0].ndim > 0 and arrays[0].shape[0] == 1 else np.stack(arrays)
    if stacked.dtype.kind in "iub":
        return torch.from_numpy(stacked.astype(np.int64))
    return torch.from_numpy(stacked.astype(np.float32))
