"""Arrays on disk, one row at a time: .npy files and the members of .npz files."""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.lib import format as npy

from edgeopt.datasets.blob import Blob
from edgeopt.errors import DataError
from edgeopt.types import Array

#: A .npy header never is longer than this unless it describes a structured type, which no model takes.
MAX_HEADER_BYTES = 4096
ZIP_LOCAL_HEADER = struct.Struct("<4s22xHH")


class ReadMagic(Protocol):
    """NumPy's own type stubs leave these functions untyped."""

    def __call__(self, file: io.BytesIO, /) -> tuple[int, int]: ...


class ReadHeader(Protocol):
    def __call__(
        self, file: io.BytesIO, /, *, max_header_size: int
    ) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]: ...


class Rows:
    """An array whose first axis counts samples, read row by row. Raises DataError when it is no such array.

    Args:
        blob: holds a whole .npy file from `offset` to `end` (None: to the end of the blob).
    """

    def __init__(self, blob: Blob, offset: int = 0, end: int | None = None) -> None:
        self._blob = blob
        end = blob.size if end is None else min(end, blob.size)
        head = io.BytesIO(blob.read(offset, min(MAX_HEADER_BYTES, end - offset)))
        shape, is_fortran, self.dtype = _read_header(head, blob.name)
        if not shape:
            raise DataError("is a single number, its first axis must count the samples", where=blob.name)
        self.shape = shape
        self._start = offset + head.tell()
        self._row_bytes = self.dtype.itemsize * math.prod(shape[1:])
        if end < self._start + self._row_bytes * shape[0]:
            raise DataError("is truncated", where=blob.name)
        # The rows of a column-major array lie scattered over the file, so that only a map can gather them.
        is_scattered = is_fortran and len(shape) > 1 and self._row_bytes * shape[0] > 0
        self._columns = self._map() if is_scattered else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Array:
        """A copy of one row in the machine's byte order."""
        native = self.dtype.newbyteorder("=")
        if self._columns is not None:
            return np.array(self._columns[index], dtype=native)
        data = self._blob.read(self._start + index * self._row_bytes, self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:]).astype(native)

    def _map(self) -> Array:
        pages = mmap.mmap(self._blob.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(self.shape, self.dtype, pages, self._start, order="F")


class Archive:
    """A .npz file. Raises DataError when it is none.

    Attributes:
        names: of its arrays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {n.removesuffix(".npy"): archive.getinfo(n) for n in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"is not a .npz file: {error}", where=path.name) from error
        self.names = tuple(self._members)

    def rows(self, name: str) -> Rows:
        """One array: read in place where it is stored plainly, else from a temporary file that it is unpacked to."""
        member = self._members[name]
        label = f"{self._path.name}, array {name!r}"
        if member.compress_type == zipfile.ZIP_STORED:
            blob = Blob.of_file(self._path, label)
            signature, name_bytes, extra_bytes = ZIP_LOCAL_HEADER.unpack(
                blob.read(member.header_offset, ZIP_LOCAL_HEADER.size)
            )
            if signature != b"PK\x03\x04":
                raise DataError("is corrupt: its local header is missing", where=label)
            start = member.header_offset + ZIP_LOCAL_HEADER.size + name_bytes + extra_bytes
            return Rows(blob, start, start + member.file_size)
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(member) as stream:
                return Rows(Blob.unpacked(stream, label))
        # RuntimeError: it is encrypted; NotImplementedError: it is compressed in a way that Python doesn't know.
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise DataError(f"can't be unpacked: {error}", where=label) from error


def _read_header(head: io.BytesIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """(shape, is column-major, dtype) of a .npy file; leaves `head` at the first value."""
    try:
        version = cast(ReadMagic, npy.read_magic)(head)
        read = cast(ReadHeader, npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)
        shape, is_fortran, dtype = read(head, max_header_size=MAX_HEADER_BYTES)
    except ValueError as error:
        raise DataError(f"is not a .npy array: {error}", where=name) from error
    if dtype.hasobject or dtype.names is not None:
        kind = "Python objects" if dtype.hasobject else "records"
        raise DataError(f"holds {kind}, not plain numbers", where=name, fix="save it as an array of numbers")
    if any(size < 0 for size in shape):
        raise DataError(f"has the impossible shape {shape}", where=name)
    return shape, is_fortran, dtype
