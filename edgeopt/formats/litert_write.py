"""A .tflite file from its object form, with the weights streamed to disk instead of gathered in memory.

FlatBuffers' own builder holds a whole file, and half of another while it grows. Here only the tables are built; the
weights follow them, one by one, and each table entry is pointed at its own. That is allowed: an offset in a FlatBuffer
counts forward from the place where it stands, to wherever its vector lies (flatbuffers.dev, "Internals").
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Buffers below this many bytes stay among the tables.
STREAMED = 4096
#: What LiteRT wants weights to begin at (`force_align` in its schema).
_ALIGNMENT = 16
#: Signed 32-bit offsets reach no further.
_LARGEST = 2**31 - 1
_LENGTH = struct.Struct("<I")
#: Of `data` in a Buffer's table.
_DATA_FIELD = 4


def write_model(model: schema.ModelT, path: Path) -> None:
    """Write a file whole or not at all. `model` may read from the file that stands there; it is left as it was.

    Raises ConversionError when the file would not fit 2 GiB.
    """
    streamed = {
        index: _bytes(buffer.data)
        for index, buffer in enumerate(model.buffers)
        if buffer.data is not None and len(buffer.data) >= STREAMED
    }
    _check_size(sum(data.nbytes + _ALIGNMENT for data in streamed.values()))
    tables = _tables(model, streamed)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            _write(file, tables, streamed)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _bytes(data: object) -> Array:
    """A buffer's content, which is an array where it was read from a file, or a sequence of numbers."""
    if isinstance(data, bytes | bytearray | memoryview):
        return np.frombuffer(data, np.uint8)
    return np.asarray(data, np.uint8)


def _tables(model: schema.ModelT, streamed: Mapping[int, Array]) -> bytearray:
    """The file with one byte in place of each streamed buffer."""
    from ai_edge_litert.tools import flatbuffer_utils

    kept = {index: model.buffers[index].data for index in streamed}
    try:
        for index in streamed:
            model.buffers[index].data = np.zeros(1, np.uint8)
        return bytearray(flatbuffer_utils.convert_object_to_bytearray(model))
    finally:
        for index, data in kept.items():
            model.buffers[index].data = data


def _write(file: BinaryIO, tables: bytearray, streamed: Mapping[int, Array]) -> None:
    from ai_edge_litert import schema_py_generated as schema

    places: dict[int, int] = {}
    end = len(tables)
    for index, data in streamed.items():
        places[index] = end + (-end - _LENGTH.size) % _ALIGNMENT
        end = places[index] + _LENGTH.size + data.nbytes
    _check_size(end)
    root = schema.Model.GetRootAs(tables, 0)
    for index, place in places.items():
        table = root.Buffers(index)._tab  # the generated classes have no other way to a field's own place
        field = table.Pos + table.Offset(_DATA_FIELD)
        _LENGTH.pack_into(tables, field, place - field)
    file.write(tables)
    for index, data in streamed.items():
        file.write(bytes(places[index] - file.tell()))
        file.write(_LENGTH.pack(data.nbytes))
        file.write(data.data)


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise ConversionError(
            f"its weights take {size / 2**30:.1f} GiB, one LiteRT file holds less than 2 GiB",
            fix="export it in parts, or make it smaller first",
        )
