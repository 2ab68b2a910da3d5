"""Samples one by one -> shuffled batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from edgeopt.errors import DataError
from edgeopt.types import Array, EstimatorSpec, Sample, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeopt.datasets.base import Dataset


#: One tensor (batch, ...) per input of the model, in its order, then the teacher's outputs where they were kept, and
#: the labels last where every sample has one. Accelerate moves and counts tuples of tensors, nothing else.
Batch = tuple[Tensor, ...]


class Kept(Protocol):
    """The teacher's outputs for the samples of a data set."""

    def __len__(self) -> int:
        """How many outputs the teacher has."""
        ...

    def of(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The outputs for a batch of these samples."""
        ...

    def check(self, indices: Sequence[int], arguments: Sequence[Tensor]) -> None:
        """Raises DataError where one of these samples, stacked, is not what the teacher saw."""
        ...


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where activation ranges come from.

    Attributes:
        samples: at each call a fresh stream of the network's arguments for one sample.
        count: how many there are.
        estimator: how ranges come from what is seen.
    """

    samples: Callable[[], Iterator[tuple[Tensor, ...]]]
    count: int
    estimator: EstimatorSpec


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on.

    Attributes:
        training: shuffled anew in every epoch.
        validation: judges the epochs; None keeps the last one.
        inputs: the model's.
        calibration: None for a network that is trained in float.
        cache: folder that keeps the teacher's outputs; None runs the teacher in every epoch.
    """

    training: Dataset
    validation: Dataset | None
    inputs: tuple[TensorSpec, ...]
    calibration: Calibration | None = None
    cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """A batch taken apart.

    Attributes:
        arguments: of the network. taught: the teacher's outputs, None where none are kept. labels: None without.
    """

    arguments: tuple[Tensor, ...]
    taught: tuple[Tensor, ...] | None
    labels: Tensor | None


def parts(batch: Batch, inputs: tuple[TensorSpec, ...], kept: Kept | None = None) -> Parts:
    """Take a batch apart that was read together with `kept`."""
    start = len(inputs)
    end = start + (0 if kept is None else len(kept))
    return Parts(batch[:start], None if kept is None else batch[start:end], batch[end] if len(batch) > end else None)


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


class _Indices(TorchDataset[Any]):  # what it holds before and after collation differ in type
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


def training_batches(
    data: Dataset, inputs: tuple[TensorSpec, ...], batch_size: int, order: EpochOrder, kept: Kept | None = None
) -> DataLoader[Batch]:
    """Batches in the order's current permutation. A last batch that is not full is left out: batch statistics of a
    few samples would be noise. Raises DataError, while iterating, for samples that can't be stacked."""
    return DataLoader(
        _Indices(len(data)),
        batch_size=min(batch_size, len(data)),
        sampler=order,
        drop_last=True,
        collate_fn=_Read(data, inputs, kept),
    )


def validation_batches(
    data: Dataset, inputs: tuple[TensorSpec, ...], batch_size: int, kept: Kept | None = None
) -> DataLoader[Batch]:
    """Every sample once, in order."""
    return DataLoader(_Indices(len(data)), batch_size=batch_size, shuffle=False, collate_fn=_Read(data, inputs, kept))


class _Read:
    """Loads and stacks the samples of a batch."""

    def __init__(self, data: Dataset, inputs: tuple[TensorSpec, ...], kept: Kept | None) -> None:
        self._data = data
        self._inputs = inputs
        self._kept = kept

    def __call__(self, indices: Sequence[int]) -> Batch:
        samples = [self._data[index] for index in indices]
        arguments = [_stack(spec, samples) for spec in self._inputs]
        labels = _stack_labels(samples)
        taught: tuple[Tensor, ...] = ()
        if self._kept is not None:
            self._kept.check(indices, arguments)
            taught = self._kept.of(indices)
        return (*arguments, *taught, *(() if labels is None else (labels,)))


def _stack(spec: TensorSpec, samples: Sequence[Sample]) -> Tensor:
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
