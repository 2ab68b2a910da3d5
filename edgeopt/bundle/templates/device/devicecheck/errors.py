"""What a person is told when the check can't go on."""

from __future__ import annotations

FAILED = 1
USAGE = 2
MISSING = 3
CANNOT_RUN = 4
INTERRUPTED = 130


class CheckError(Exception):
    """One clear line, and the exit code that goes with it."""

    def __init__(self, message: str, code: int) -> None:
        self.code = code
        super().__init__(" ".join(message.split()))


class ConnectionLostError(CheckError):
    """The device does not answer any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, MISSING)
