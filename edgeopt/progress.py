"""How long work tells that it moves, without knowing who watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Told about every long step. The command line draws bars with an ETA; the Python API is silent by default."""

    def step(self, title: str) -> None:
        """A step without a known length has begun; it ends when the next one begins."""
        ...

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        """Pass the items through and count them."""
        ...


class Silent:
    """Watches nothing."""

    def step(self, title: str) -> None:
        del title

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        del title, total
        yield from items
