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

from edgeopt.training.padding import free_dims, sizes_of, stack, stack_labels
from edgeopt.types import Array, EstimatorSpec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeopt.datasets.base import Dataset


#: One tensor (batch, ...) per input of the model, in its order, then the teacher's outputs where they were kept, the
#: sizes of the samples where inputs can be filled up, and the labels last where every sample has one. Accelerate moves
#: and counts tuples of tensors, nothing else.
Batch = tuple[Tensor, ...]


#: Batches whose samples are sorted by length together: enough for little padding, few enough to mix well.
_POOL = 100


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
        sizes: (samples, free dimensions), how long each sample is; None where none can be filled up.
    """

    arguments: tuple[Tensor, ...]
    taught: tuple[Tensor, ...] | None
    labels: Tensor | None
    sizes: Tensor | None = None


def parts(batch: Batch, inputs: tuple[TensorSpec, ...], kept: Kept | None = None) -> Parts:
    """Take a batch apart that was read together with `kept`."""
    start = len(inputs)
    end = start + (0 if kept is None else len(kept))
    rest = batch[end:]
    sizes, rest = (rest[0], rest[1:]) if free_dims(inputs) else (None, rest)
    taught = None if kept is None else batch[start:end]
    return Parts(batch[:start], taught, rest[0] if rest else None, sizes)


class EpochOrder(Sampler[int]):
    """A permutation for each epoch; the same seed and epoch give the same one in every process.

    A data set that can only be read forwards (`is_sequential`) keeps its order. Samples of different lengths are put
    in batches of about equal ones: of `_POOL` batches at a time, drawn at random, the samples are sorted by length and
    cut into batches, whose order then is drawn too.

    Args:
        sizes: (samples, dimensions), how long each is; None where they are alike.
        batch_size: samples that share a batch.
    """

    def __init__(self, data: Dataset, seed: int, batch_size: int = 1, sizes: Array | None = None) -> None:
        self._count = len(data)
        self._shuffled = not getattr(data, "is_sequential", False)
        self._seed = seed
        self._batch_size = min(batch_size, self._count)
        self._sizes = sizes
        self.epoch = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        if not self._shuffled:
            return iter(range(self._count))
        random = np.random.default_rng((self._seed, self.epoch))
        order = random.permutation(self._count)
        if self._sizes is not None:
            order = self._alike(order, self._sizes, random)
        return iter(order.tolist())

    def _alike(self, order: Array, sizes: Array, random: np.random.Generator) -> Array:
        full = self._count - self._count % self._batch_size
        pool = self._batch_size * _POOL
        pools = [order[start : min(start + pool, full)] for start in range(0, full, pool)]
        batches = np.concatenate([indices[by_length(sizes[indices])] for indices in pools])
        batches = batches.reshape(-1, self._batch_size)
        # What fills no batch is left out; it is a random choice, and another one in every epoch.
        return np.concatenate([batches[random.permutation(len(batches))].reshape(-1), order[full:]])


def by_length(sizes: Array) -> Array:
    """Places of the samples in the order of their longest dimension, then of the last one."""
    order: Array = np.lexsort((sizes[:, -1], sizes.max(1)))
    return order


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
    data: Dataset,
    inputs: tuple[TensorSpec, ...],
    batch_size: int,
    kept: Kept | None = None,
    sizes: Array | None = None,
) -> DataLoader[Batch]:
    """Every sample once, in order; with `sizes`, in the order of their lengths."""
    order = range(len(data)) if sizes is None else by_length(sizes).tolist()
    return DataLoader(_Indices(len(data)), batch_size=batch_size, sampler=order, collate_fn=_Read(data, inputs, kept))


class _Read:
    """Loads and stacks the samples of a batch."""

    def __init__(self, data: Dataset, inputs: tuple[TensorSpec, ...], kept: Kept | None) -> None:
        self._data = data
        self._inputs = inputs
        self._kept = kept
        self._may_pad = bool(free_dims(inputs))

    def __call__(self, indices: Sequence[int]) -> Batch:
        samples = [self._data[index] for index in indices]
        arguments = [stack(spec, samples) for spec in self._inputs]
        labels = stack_labels(samples, may_pad=self._may_pad)
        taught: tuple[Tensor, ...] = ()
        if self._kept is not None:
            self._kept.check(indices, arguments)
            taught = self._kept.of(indices)
        sizes: tuple[Tensor, ...] = ()
        if self._may_pad:
            sizes = (torch.tensor([sizes_of(sample, self._inputs) for sample in samples]),)
        return (*arguments, *taught, *sizes, *(() if labels is None else (labels,)))
