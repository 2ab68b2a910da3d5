"""What all our data sets share: bounds, iteration, and an identity made of their items' identities."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from edgeopt.types import Array, Sample


class IndexedDataset(ABC):
    """A `Dataset` whose items can be told apart and labelled without loading them all.

    Attributes:
        is_sequential: going back costs a new pass, so items should be asked for in ascending order.
        is_fixed: an item is the same each time it is read; the user's own code may flip a picture or drop a word.
    """

    is_sequential = False
    is_fixed = True
    _fingerprint: str | None = None

    @property
    @abstractmethod
    def is_labelled(self) -> bool: ...

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _load(self, index: int) -> Sample:
        """Item `index`, which is within bounds."""

    @abstractmethod
    def digest_of(self, index: int) -> bytes:
        """32 bytes that identify one item's name, content and label."""

    def label_of(self, index: int) -> int | None:
        """The class index where it is known without loading the item, else None."""
        del index
        return None

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._load(index)

    def __iter__(self) -> Iterator[Sample]:
        for index in range(len(self)):
            yield self._load(index)

    def fingerprint(self) -> str:
        """SHA-256 over the items' digests in order; computed once, as it reads everything."""
        if self._fingerprint is None:
            self._fingerprint = combine(self.digest_of(index) for index in range(len(self)))
        return self._fingerprint


def digest_arrays(arrays: Mapping[str, Array], label: int | Array | None) -> bytes:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in [*sorted(arrays.items()), ("label", np.asarray(-1 if label is None else label))]:
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def combine(digests: Iterable[bytes]) -> str:
    """One SHA-256 over a series of digests."""
    total = hashlib.sha256()
    for digest in digests:
        total.update(digest)
    return total.hexdigest()
