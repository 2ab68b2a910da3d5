"""Class numbers of a data set -> those of the model, by the classes' names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgeopt.datasets.base import Dataset
from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.errors import DataError
from edgeopt.types import Sample


def match_labels(dataset: Dataset, labels: tuple[str, ...]) -> Dataset:
    """The data set with the model's class indices in place of its own.

    Data sets number named classes by their sorted order, models as they were trained. Names are compared without
    regard to case, and to "_" or "-" for a space. Without names on both sides, or where no name is common, the
    numbers are taken to be the model's already.

    Raises DataError when only some of the data's names are the model's, or one could be two of its classes.
    """
    names = dataset.class_names
    if not labels or not names or names == labels:
        return dataset
    known: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        known.setdefault(_key(label), []).append(index)
    found = [known.get(_key(name), []) for name in names]
    unknown = [name for name, indices in zip(names, found, strict=True) if not indices]
    if len(unknown) == len(names):
        return dataset
    if unknown:
        listed = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"has {len(unknown)} classes that are not among the model's labels: {listed}",
            where="class names",
            fix="rename or remove them, or correct the model's labels",
        )
    doubled = next((name for name, indices in zip(names, found, strict=True) if len(indices) > 1), None)
    if doubled is not None:
        raise DataError(
            f"{doubled!r} could be several of the model's classes", where="class names", fix="give class numbers"
        )
    return _Matched(dataset, [indices[0] for indices in found], labels)


def _key(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


class _Matched(IndexedDataset):
    """A data set whose class `i` is called `indices[i]`."""

    def __init__(self, dataset: Dataset, indices: Sequence[int], labels: tuple[str, ...]) -> None:
        self._dataset = dataset
        self._indices = indices
        self._labels = labels
        self.is_sequential = isinstance(dataset, IndexedDataset) and dataset.is_sequential
        self.is_fixed = isinstance(dataset, IndexedDataset) and dataset.is_fixed

    @property
    def is_labelled(self) -> bool:
        return self._dataset.is_labelled

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._labels

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Sample]:
        return map(self._matched, self._dataset)

    def _load(self, index: int) -> Sample:
        return self._matched(self._dataset[index])

    def label_of(self, index: int) -> int | None:
        label = self._dataset.label_of(index) if isinstance(self._dataset, IndexedDataset) else None
        return None if label is None else self._index(label, f"sample {index}")

    def digest_of(self, index: int) -> bytes:
        """Of the sample as it is stored: the same data has one identity, whatever model looks at it."""
        if isinstance(self._dataset, IndexedDataset):
            return self._dataset.digest_of(index)
        return hashlib.sha256(f"{self._dataset.fingerprint()} {index}".encode()).digest()

    def _matched(self, sample: Sample) -> Sample:
        if not isinstance(sample.label, int):
            return sample
        return replace(sample, label=self._index(sample.label, sample.name))

    def _index(self, label: int, where: str) -> int:
        if not 0 <= label < len(self._indices):
            raise DataError(f"is of class {label}, and there are {len(self._indices)} class names", where=where)
        return self._indices[label]
