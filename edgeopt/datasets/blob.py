"""Random access to the bytes of a file, or of what a compressed file holds."""

from __future__ import annotations

import os
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from edgeopt.errors import DataError, UsageError

CHUNK_BYTES = 1 << 18


class Readable(Protocol):
    """A stream that is only ever read forwards."""

    def read(self, size: int, /) -> bytes: ...


class Blob:
    """Bytes on disk, read by position.

    Read with pread rather than mapped: the pages of a map that were touched count as the process's own memory, so
    a pass over a mapped file would look, and be billed, like loading all of it.

    Attributes:
        name: what to call it in messages.
        size: in bytes.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self.size = os.fstat(fd).st_size
        weakref.finalize(self, os.close, fd)

    @classmethod
    def of_file(cls, path: Path, name: str | None = None) -> Blob:
        """Open a file. Raises DataError when it can't be read."""
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), name or path.name)
        except OSError as error:
            raise DataError(f"can't be read: {error.strerror}", where=str(path)) from error

    @classmethod
    def unpacked(cls, stream: Readable, name: str) -> Blob:
        """Drain a decompressing stream into a temporary file that has no name, so that it goes away with the process.

        Raises DataError when the stream is corrupt, UsageError when the temporary folder is full.
        """
        fd, path = tempfile.mkstemp(prefix="edgeopt-")
        Path(path).unlink()
        try:
            for chunk in _chunks(stream, name):
                _write(fd, chunk, name)
            return cls(fd, name)
        except BaseException:
            os.close(fd)
            raise

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises DataError when the file ends before."""
        data = os.pread(self._fd, size, offset)
        while len(data) < size:
            more = os.pread(self._fd, size - len(data), offset + len(data))
            if not more:
                raise DataError("is truncated", where=self.name)
            data += more
        return data

    def lines(self) -> Iterator[bytes]:
        """Every line with its line end, from the start of the file."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            yield from file

    def fileno(self) -> int:
        return self._fd


def _chunks(stream: Readable, name: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = stream.read(CHUNK_BYTES)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"is corrupt: {error}", where=name) from error
        if not chunk:
            return
        yield chunk


def _write(fd: int, chunk: bytes, name: str) -> None:
    view = memoryview(chunk)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise UsageError(
            f"can't be unpacked into {tempfile.gettempdir()}: {error.strerror}",
            where=name,
            fix="make room there, or set TMPDIR to a folder with more",
        ) from error
