"""The contract of a data set: a stream that can be started again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from edgeopt.types import Sample


class Dataset(Protocol):
    """A re-iterable stream of samples. Loads one item at a time: memory doesn't grow with the length."""

    @property
    def is_labelled(self) -> bool: ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty when unknown."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Load one sample. Raises DataError naming the item when it can't be read."""
        ...

    def __iter__(self) -> Iterator[Sample]: ...

    def fingerprint(self) -> str:
        """SHA-256 over what identifies the content (relative names and file contents, or array bytes); no paths."""
        ...


@runtime_checkable
class MapStyle(Protocol):
    """Items by index, as a torch `Dataset`, a list and the like have them; not yet samples."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> object: ...
