"""Progress on a terminal: a spinner for steps, a bar with the time left for loops."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from edgeopt.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

T = TypeVar("T")


@contextmanager
def shown_on(stream: TextIO) -> Iterator[Progress]:
    """Progress drawn on `stream` while the block runs and wiped at its end.

    Silent when that is no terminal, and in all processes of a launcher but the first, which would draw over it.
    """
    if not stream.isatty() or os.environ.get("RANK", "0") != "0":
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", justify="right"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(file=stream),
        transient=True,
        # Redirection would show on the terminal what vendor libraries print; that goes to the log.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bars:
        yield Terminal(bars)


class Terminal:
    """Draws on rich bars. A step without a known length is replaced by whatever begins next."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._step: TaskID | None = None

    def step(self, title: str) -> None:
        self._end_step()
        self._step = self._bars.add_task(title, total=None, count="")

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        self._end_step()
        task = self._bars.add_task(title, total=total, count=f"0/{total}")
        try:
            for done, item in enumerate(items, 1):
                yield item
                self._bars.update(task, advance=1, count=f"{done}/{total}")
        finally:
            self._bars.remove_task(task)

    def _end_step(self) -> None:
        if self._step is not None:
            self._bars.remove_task(self._step)
            self._step = None
