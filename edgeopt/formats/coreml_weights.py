"""The weight file of an .mlpackage (MIL blob storage, version 2: apple/coremltools, mlmodel/src/MILBlob/Blob)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from edgeopt.types import Array

_VERSION = 2
_SENTINEL = 0xDEADBEEF
#: Count of blobs, version.
_HEADER = struct.Struct("<II")
#: Sentinel, type, bytes, offset of the data, bits of padding in the last byte.
_BLOB = struct.Struct("<IIQQQ")

#: MIL's name of a type -> NumPy's, for whole bytes.
BYTE_TYPES = {
    "fp16": "<f2", "fp32": "<f4", "fp64": "<f8", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8",
    "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
}  # fmt: skip
#: The others, packed: bits of one value, and whether it has a sign.
PACKED_TYPES = {
    "uint1": (1, False), "uint2": (2, False), "uint3": (3, False), "uint4": (4, False), "uint6": (6, False),
    "int4": (4, True),
}  # fmt: skip


class WeightFile:
    """Reads blobs by their offset. The file is mapped, not loaded."""

    def __init__(self, path: Path) -> None:
        self._data: Array = np.memmap(path, dtype=np.uint8, mode="r")
        if self._data.size < _HEADER.size:
            raise ValueError("the weight file is truncated")
        _, version = _HEADER.unpack(self._data[: _HEADER.size].tobytes())
        if version != _VERSION:
            raise ValueError(f"the weight file has version {version}, not {_VERSION}")

    def stored_bytes(self, offset: int) -> int:
        """Size of the blob whose description stands at `offset`."""
        return self._locate(offset)[1]

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The blob as an array, 4-bit and narrower values spread to bytes.

        Raises ValueError where the file holds no such blob, KeyError for an unknown type.
        """
        start, size = self._locate(offset)
        return decode(self._data[start : start + size], dtype, shape)

    def _locate(self, offset: int) -> tuple[int, int]:
        head = self._data[offset : offset + _BLOB.size].tobytes()
        if len(head) < _BLOB.size:
            raise ValueError("a weight lies beyond the end of the weight file")
        sentinel, _, size, start, _ = _BLOB.unpack(head)
        if sentinel != _SENTINEL or start + size > self._data.size:
            raise ValueError("a weight lies beyond the end of the weight file")
        return start, size


def decode(data: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    """Raw bytes as values of a MIL type."""
    if dtype in BYTE_TYPES:
        values: Array = np.frombuffer(data.tobytes(), dtype=BYTE_TYPES[dtype]).reshape(shape)
        return values
    bits, signed = PACKED_TYPES[dtype]
    count = int(np.prod(shape))
    # Values follow one another from the lowest bit on, without regard to bytes.
    stream = np.unpackbits(np.frombuffer(data.tobytes(), dtype=np.uint8), bitorder="little", count=count * bits)
    codes = stream.reshape(count, bits) @ (1 << np.arange(bits, dtype=np.int16))
    if signed:
        codes = np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    unpacked: Array = codes.astype(np.int8 if signed else np.uint8).reshape(shape)
    return unpacked
