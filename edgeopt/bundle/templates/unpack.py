"""Restores a model file that was packed for download: python unpack.py model.tflite.packed model.tflite

Needs Python 3.11 and NumPy; nothing of edgeopt. Exit code 0: restored, and its SHA-256 is right. 1: it is not.

Layout, little-endian: the magic "EDGEPACK", version u32, segment count u32, size u64 and SHA-256 of the file; then the
segments in order. A segment restores `size` bytes: method u8 (0 raw, 1 bitmask, 2 gaps), word u8 (1, 2 or 4), lead
u8, deflated u8 (zlib), size u32, stored u32, then `stored` bytes. Bitmask: `lead` bytes as they are, one bit a word
(lowest first, 1 where it is not zero), the words that are not zero, the bytes after the last whole word. Gaps: `lead`
bytes, a count u32, that many bytes (how many zero words come before the next word; 255 is 255 zeros and no word), the
words, the bytes after the last whole word. Words are stored as all their first bytes, then all their second ones, ...
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

MAGIC = b"EDGEPACK"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32s")
SEGMENT = struct.Struct("<BBBBII")
RAW, BITMASK, GAPS = range(3)
#: Bytes that one segment restores at most: no file makes a reader allocate more than this at once.
LARGEST = 1 << 20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class DamagedError(Exception):
    """The packed file is not what a packer writes; the message says how."""


def unpack(packed: Path, destination: Path) -> None:
    """Restore a file; `destination` appears complete and checked, or not at all.

    Raises DamagedError on any damage, OSError where a file can't be read or written.
    """
    with packed.open("rb") as source:
        magic, version, count, size, sha256 = HEADER.unpack(_exactly(source, HEADER.size))
        if magic != MAGIC:
            raise DamagedError("is not a packed model file")
        if version != VERSION:
            raise DamagedError(f"has version {version} of the format; this reader knows {VERSION}")
        handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as target:
                digest = hashlib.sha256()
                for _ in range(count):
                    part = _segment(source)
                    digest.update(part)
                    target.write(part)
                if target.tell() != size or source.read(1):
                    raise DamagedError("has another length than its header says")
                target.flush()
                os.fsync(target.fileno())
            if digest.digest() != sha256:
                raise DamagedError("restores to other bytes than were packed: SHA-256 differs")
            temporary.chmod(0o644)
            temporary.replace(destination)
        finally:
            temporary.unlink(missing_ok=True)


def _exactly(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise DamagedError("is cut short")
    return data


def _segment(source: IO[bytes]) -> bytes:
    method, word, lead, deflated, size, stored = SEGMENT.unpack(_exactly(source, SEGMENT.size))
    if method not in (RAW, BITMASK, GAPS) or word not in (1, 2, 4) or lead >= word or deflated > 1:
        raise DamagedError("has a segment of an unknown kind")
    if not lead <= size <= LARGEST or stored > size:
        raise DamagedError("has a segment with impossible sizes")
    data = _exactly(source, stored)
    if deflated:
        # Masks and gaps come on top of the words; before zlib that may be more than the segment itself.
        data = _inflate(data, 2 * size + 8)
    if method == RAW:
        if len(data) != size:
            raise DamagedError("has a segment with impossible sizes")
        return data
    return _expand(np.frombuffer(data, np.uint8), method, word, lead, size)


def _inflate(data: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise DamagedError("has a segment that zlib can't read") from error
    if len(inflated) > limit or not inflater.eof or inflater.unused_data:
        raise DamagedError("has a segment that zlib can't read")
    return inflated


def _expand(data: Bytes, method: int, word: int, lead: int, size: int) -> bytes:
    """The bytes of a segment that is stored without its zero words."""
    words, tail = divmod(size - lead, word)
    if method == BITMASK:
        end = lead + (words + 7) // 8
        bits = np.unpackbits(data[lead:end], bitorder="little")
        places = np.flatnonzero(bits)
    else:
        start = lead + 4
        count = int.from_bytes(data[lead:start].tobytes(), "little")
        end = start + count
        gaps = data[start:end]
        ends = gaps != 255
        places = np.cumsum(np.where(ends, gaps.astype(np.int64) + 1, 255))[ends] - 1
    if len(data) != end + len(places) * word + tail or (len(places) and places[-1] >= words):
        raise DamagedError("has a segment with impossible sizes")
    restored = np.zeros(size, np.uint8)
    restored[:lead] = data[:lead]
    body = restored[lead : size - tail].reshape(words, word)
    body[places] = data[end : end + len(places) * word].reshape(word, -1).T
    restored[size - tail :] = data[len(data) - tail :]
    return restored.tobytes()


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python unpack.py PACKED DESTINATION")
        return 1
    packed, destination = map(Path, arguments)
    try:
        unpack(packed, destination)
    except DamagedError as error:
        print(f"{packed}: {error}")
        return 1
    except OSError as error:
        print(f"{error.filename or packed}: {error.strerror or error}")
        return 1
    print(f"{destination}: {destination.stat().st_size} bytes, SHA-256 as packed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
