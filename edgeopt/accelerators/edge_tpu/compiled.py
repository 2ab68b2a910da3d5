"""What is inside a file that `edgetpu_compiler` wrote.

The custom operator's options hold a FlatBuffer "DWN1": a package of executables. The schema is libedgetpu's
(github.com/google-coral/libedgetpu, executable/executable.fbs); only the two vectors on the way to the parameters and
their own are read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from edgeopt.errors import UsageError

_IDENTIFIER = b"DWN1"
#: Fields of Package, MultiExecutable and Executable.
_PACKAGE_EXECUTABLES, _EXECUTABLES, _PARAMETERS = 1, 0, 6


def parameter_bytes(path: Path) -> int:
    """Bytes of parameters, cached or streamed, in a compiled file.

    Raises:
        UsageError: the file holds nothing that the compiler made, or it is corrupt.
    """
    data = path.read_bytes()
    total, start = 0, data.find(_IDENTIFIER)
    if start < 0:
        raise UsageError("was not compiled for the Edge TPU", where=str(path), fix="run edgetpu_compiler on it")
    try:
        while start >= 0:
            total += sum(len(_vector(e, _root(e), _PARAMETERS)) for e in _executables(data[start - 4 :]))
            start = data.find(_IDENTIFIER, start + 4)
    except (struct.error, IndexError) as error:
        raise UsageError("is corrupt or truncated", where=str(path), fix="compile it again") from error
    return total


def _executables(package: bytes) -> Iterator[bytes]:
    multiple = _vector(package, _root(package), _PACKAGE_EXECUTABLES)
    position, count = _place(multiple, _root(multiple), _EXECUTABLES)
    for index in range(count):
        at = position + 4 * index
        at += _number(multiple, at)
        yield multiple[at + 4 : at + 4 + _number(multiple, at)]


def _root(table: bytes) -> int:
    return _number(table, 0)


def _vector(buffer: bytes, table: int, field: int) -> bytes:
    """A field that is a vector of bytes; empty where it is absent."""
    position, count = _place(buffer, table, field)
    return buffer[position : position + count]


def _place(buffer: bytes, table: int, field: int) -> tuple[int, int]:
    """Where the elements of a vector field begin, and how many there are."""
    layout = table - struct.unpack_from("<i", buffer, table)[0]
    entry = 4 + 2 * field
    if entry >= struct.unpack_from("<H", buffer, layout)[0]:
        return 0, 0
    offset = struct.unpack_from("<H", buffer, layout + entry)[0]
    if not offset:
        return 0, 0
    start = table + offset + _number(buffer, table + offset)
    return start + 4, _number(buffer, start)


def _number(buffer: bytes, position: int) -> int:
    return int(struct.unpack_from("<I", buffer, position)[0])
