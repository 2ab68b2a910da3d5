"""Keeps what vendor libraries print out of the user's way, and at hand when something breaks.

Converters and runtimes write to file descriptors 1 and 2 from C++, so replacing `sys.stdout` is not enough: both
descriptors point at a log file while the pipe runs, and our own consoles write to copies of the real ones.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from edgeopt.errors import ConversionError, EdgeoptError

TAIL_LINES = 8


class LoggedError(Exception):
    """A failure whose background stands in a log. `__cause__` is the failure itself."""

    def __init__(self, log: Path, tail: tuple[str, ...]) -> None:
        super().__init__(str(log))
        self.log = log
        self.tail = tail


@dataclass(frozen=True, slots=True)
class Streams:
    """The real standard output and error, whatever happens to the descriptors 1 and 2."""

    out: TextIO
    err: TextIO


@contextmanager
def captured() -> Iterator[Streams]:
    """Send everything that anybody prints to a log file, except what goes through the yielded streams.

    The log is removed on success and on errors that explain themselves. It stays when the process is aborted from
    C++ (with the Python stack in it), and is named by the `LoggedError` that replaces a ConversionError or an
    unexpected exception.
    """
    descriptor, name = tempfile.mkstemp(prefix="edgeopt-", suffix=".log")
    log = Path(name)
    try:
        with (
            os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as file,
            _redirected(file) as streams,
        ):
            try:
                yield streams
            except Exception as error:
                _write_traceback(error, file)
                raise
    except ConversionError as error:
        if log.stat().st_size == 0:
            log.unlink()
            raise
        raise LoggedError(log, _tail(log)) from error
    except EdgeoptError:
        log.unlink()
        raise
    except Exception as error:
        raise LoggedError(log, _tail(log)) from error
    except BaseException:
        log.unlink()
        raise
    log.unlink()


@contextmanager
def _redirected(file: TextIO) -> Iterator[Streams]:
    with ExitStack() as stack:
        # A replaced sys.stdout (a test's, an embedding program's) is reached directly and must be replaced too.
        out = stack.enter_context(_real_stream(sys.stdout, 1, file))
        err = stack.enter_context(_real_stream(sys.stderr, 2, file))
        replaced = (sys.stdout, sys.stderr)
        if out is sys.stdout:
            sys.stdout = file
        if err is sys.stderr:
            sys.stderr = file
        if not faulthandler.is_enabled():
            faulthandler.enable(file)
            stack.callback(faulthandler.disable)
        try:
            yield Streams(out, err)
        finally:
            sys.stdout, sys.stderr = replaced


@contextmanager
def _real_stream(stream: TextIO, descriptor: int, file: TextIO) -> Iterator[TextIO]:
    """Point `descriptor` at the log; give a stream that still writes where `stream` did."""
    _flush(stream)
    saved = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        if _descriptor_of(stream) == descriptor:
            with os.fdopen(os.dup(saved), "w", encoding=stream.encoding, errors="backslashreplace") as real:
                yield real
        else:
            yield stream
    finally:
        _flush(stream)
        os.dup2(saved, descriptor)
        os.close(saved)


def _flush(stream: TextIO) -> None:
    """Empty Python's buffer and C's: what a library printed before must not come out after the switch."""
    stream.flush()
    ctypes.CDLL(None).fflush(None)


def _write_traceback(error: Exception, file: TextIO) -> None:
    """The whole stack of a surprise; of an error of ours only what the vendor's library raised."""
    surprise = error.__cause__ if isinstance(error, EdgeoptError) else error
    if surprise is not None:
        traceback.print_exception(surprise, file=file)


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (io.UnsupportedOperation, ValueError):
        return None


def _tail(log: Path) -> tuple[str, ...]:
    with log.open(encoding="utf-8", errors="replace") as file:
        # Python underlines parts of a traceback's lines; out of their context these say nothing.
        return tuple(deque((line.rstrip() for line in file if line.strip(" ^~\n")), TAIL_LINES))
