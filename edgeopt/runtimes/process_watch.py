"""Ends a process that will never answer. A slow one uses the processor and is left alone; one that hangs does not."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one answer may take.

    Attributes:
        idle_seconds: without using the processor. Other programs may keep it from us, but not for minutes.
        total_seconds: whatever it does; for what turns in circles.
    """

    idle_seconds: float
    total_seconds: float


class Watch:
    """Kills a process while the body of a `with` waits for it longer than is reasonable (Linux).

    Attributes:
        verdict: why it was killed; None when it was not.
    """

    def __init__(self, process: subprocess.Popen[bytes], patience: Patience) -> None:
        self.verdict: str | None = None
        self._process = process
        self._patience = patience
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answered.set()
        self._thread.join()

    def _look(self) -> None:
        start = last_work = time.monotonic()
        used = _processor_ticks(self._process.pid)
        while not self._answered.wait(min(1.0, self._patience.idle_seconds / 4)):
            now, ticks = time.monotonic(), _processor_ticks(self._process.pid)
            if ticks is None:
                return  # it has ended by itself
            if ticks != used:
                used, last_work = ticks, now
            if now - last_work > self._patience.idle_seconds:
                self.verdict = f"it did nothing for {self._patience.idle_seconds:g} s"
            elif now - start > self._patience.total_seconds:
                self.verdict = f"it gave no answer in {self._patience.total_seconds:g} s"
            if self.verdict is not None:
                self._process.kill()
                return


def _processor_ticks(pid: int) -> int | None:
    """Processor time of a process and its threads so far, in the kernel's ticks; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # State, then from the 12th on user and system time (proc(5) counts from the name and number before).
    return None if fields[0] == "Z" else int(fields[11]) + int(fields[12])
