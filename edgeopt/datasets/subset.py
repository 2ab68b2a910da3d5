"""Choose some samples of a data set, the same ones for the same seed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from edgeopt.datasets.base import Dataset
from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Sample


class Subset(IndexedDataset):
    """Some samples of another data set, in the order of `indices`."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self.indices = tuple(indices)
        self.is_sequential = _is_sequential(dataset)
        self.is_fixed = isinstance(dataset, IndexedDataset) and dataset.is_fixed

    @property
    def is_labelled(self) -> bool:
        return self._dataset.is_labelled

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._dataset.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def _load(self, index: int) -> Sample:
        return self._dataset[self.indices[index]]

    def label_of(self, index: int) -> int | None:
        return _label_of(self._dataset, self.indices[index])

    def digest_of(self, index: int) -> bytes:
        original = self.indices[index]
        if isinstance(self._dataset, IndexedDataset):
            return self._dataset.digest_of(original)
        return hashlib.sha256(f"{self._dataset.fingerprint()} {original}".encode()).digest()


def select(dataset: Dataset, count: int | None, seed: int, exclude: frozenset[int] = frozenset()) -> Subset:
    """A seeded choice of `count` samples (all of them when None or more than there are), shuffled.

    Where labels are known without loading the samples every class keeps its share, rounded up or down by chance;
    otherwise all samples are alike. A data set that can only be read forwards keeps its order.

    Args:
        exclude: indices not to choose, such as those that another subset of this data set holds.

    Raises UsageError for a count below 1 or a negative seed, DataError when nothing is left to choose from.
    """
    if count is not None and count < 1:
        raise UsageError(f"can't choose {count} samples", fix="ask for at least 1")
    if seed < 0:
        raise UsageError(f"the seed {seed} is negative", fix="use 0 or more")
    candidates = [index for index in range(len(dataset)) if index not in exclude]
    if not candidates:
        raise DataError(
            f"none of the {len(dataset)} samples is left to choose from", fix="use fewer for the other purpose"
        )
    random = np.random.default_rng(seed)
    wanted = len(candidates) if count is None else min(count, len(candidates))
    chosen = [candidates[k] for k in random.permutation(len(candidates))]
    if wanted < len(candidates):
        chosen = _stratify(dataset, chosen, random)[:wanted]
        chosen = [chosen[k] for k in random.permutation(wanted)]
    return Subset(dataset, sorted(chosen) if _is_sequential(dataset) else chosen)


def _stratify(dataset: Dataset, shuffled: list[int], random: np.random.Generator) -> list[int]:
    """Reorder so that every prefix holds each class in proportion to its size.

    Member r of a class of n gets the position (r + u) / n, u uniform per class: systematic sampling.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index in shuffled:
        label = _label_of(dataset, index)
        if label is None:
            return shuffled
        members[label].append(index)
    position: dict[int, float] = {}
    for label in sorted(members):
        start = random.random()
        position.update({index: (r + start) / len(members[label]) for r, index in enumerate(members[label])})
    return sorted(shuffled, key=position.__getitem__)


def _label_of(dataset: Dataset, index: int) -> int | None:
    return dataset.label_of(index) if isinstance(dataset, IndexedDataset) else None


def _is_sequential(dataset: Dataset) -> bool:
    return isinstance(dataset, IndexedDataset) and dataset.is_sequential
