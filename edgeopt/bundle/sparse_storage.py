"""Model files packed for download: words that are zero cost a bit or less. Lossless, for any format.

Runtimes need the plain file, so an app unpacks it once, with `unpack.py` or `unpack.hpp` of the bundle. What this gains
over the deflate that every app store applies anyway is measured by `compare`. The layout is told in
`templates/unpack.py`, which holds the reader.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from edgeopt.bundle.templates.unpack import (
    BITMASK,
    GAPS,
    HEADER,
    LARGEST,
    MAGIC,
    RAW,
    SEGMENT,
    VERSION,
    DamagedError,
)
from edgeopt.bundle.templates.unpack import unpack as _read
from edgeopt.errors import DataError
from edgeopt.types import Array, StepRecord

#: zlib's default, as archives use it. The highest level takes five times as long for half a percent.
_LEVEL = 6


@dataclass(frozen=True, slots=True)
class Packed:
    """What packing made of a file; sizes in bytes."""

    path: Path
    size: int
    original_size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StorageSizes:
    """One file's size in bytes, stored in four ways.

    Attributes:
        plain: as it is.
        deflated: by zlib, as archives of apps (.apk, .ipa) and web servers do.
        packed: without zero words, each segment as it is smallest.
        packed_deflated: the same with zlib where that makes a segment smaller; what `pack` writes.
    """

    plain: int
    deflated: int
    packed: int
    packed_deflated: int


def is_sparse(history: Iterable[StepRecord]) -> bool:
    """Whether a model was made sparse on purpose, so that packing it is worth while."""
    return any(step.step == "sparsify" for step in history)


def pack(file: Path, destination: Path, deflate: bool = True) -> Packed:
    """Store a file without its zero words; `destination` appears complete or not at all.

    Args:
        deflate: also run zlib over segments that become smaller by it; without, a reader needs no zlib.

    Raises:
        DataError: the file can't be read, or `destination` not be written.
    """
    try:
        return _pack(file, destination, deflate)
    except OSError as error:
        raise DataError((error.strerror or str(error)).lower(), where=str(error.filename or destination)) from error


def unpack(packed: Path, destination: Path) -> None:
    """Restore what `pack` was given; `destination` appears complete and checked, or not at all.

    Raises:
        DataError: the packed file is damaged or no packed file, or a file can't be read or written.
    """
    try:
        _read(packed, destination)
    except DamagedError as error:
        raise DataError(str(error), where=str(packed), fix="pack or download it again") from error
    except OSError as error:
        raise DataError((error.strerror or str(error)).lower(), where=str(error.filename or packed)) from error


def compare(file: Path) -> StorageSizes:
    """Sizes of a file stored in four ways. Raises DataError when it can't be read."""
    plain = deflated = 0
    packed = packed_deflated = HEADER.size
    whole = zlib.compressobj(_LEVEL)
    try:
        with file.open("rb") as source:
            for data in _segments(source):
                plain += len(data)
                deflated += len(whole.compress(data))
                packed += len(_encode(data, deflate=False))
                packed_deflated += len(_encode(data, deflate=True))
    except OSError as error:
        raise DataError((error.strerror or str(error)).lower(), where=str(file)) from error
    return StorageSizes(plain, deflated + len(whole.flush()), packed, packed_deflated)


def _pack(file: Path, destination: Path, deflate: bool) -> Packed:
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    temporary = Path(name)
    try:
        with file.open("rb") as source, os.fdopen(handle, "wb") as target:
            digest, count, size = hashlib.sha256(), 0, 0
            target.write(bytes(HEADER.size))
            for data in _segments(source):
                digest.update(data)
                target.write(_encode(data, deflate))
                count, size = count + 1, size + len(data)
            packed_size = target.tell()
            target.seek(0)
            target.write(HEADER.pack(MAGIC, VERSION, count, size, digest.digest()))
        temporary.chmod(0o644)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)
    return Packed(destination, packed_size, size, digest.hexdigest())


def _segments(source: IO[bytes]) -> Iterator[bytes]:
    while data := source.read(LARGEST):
        yield data


@dataclass(frozen=True, slots=True)
class _Words:
    """A segment as `lead` bytes, words of one size, and what is left over."""

    size: int
    lead: int
    places: Array
    values: bytes
    count: int
    head: bytes
    tail: bytes


def _encode(data: bytes, deflate: bool) -> bytes:
    """One segment with its header, in the smallest of all ways."""
    split = _best_split(data)
    without_zeros = min((BITMASK, _bitmask(split)), (GAPS, _gaps(split)), key=lambda form: len(form[1]))
    forms = ((RAW, data), without_zeros)
    candidates = [(method, 0, content) for method, content in forms]
    if deflate:
        candidates += [(method, 1, zlib.compress(content, _LEVEL)) for method, content in forms]
    method, deflated, content = min(candidates, key=lambda c: len(c[2]))
    word, lead = (1, 0) if method == RAW else (split.size, split.lead)
    return SEGMENT.pack(method, word, lead, deflated, len(data), len(content)) + content


def _best_split(data: bytes) -> _Words:
    """The word size, and the phase of the words, by which a bitmask of the segment is smallest.

    Weights needn't be aligned within a file: in ONNX they begin at any byte.
    """
    flat = np.frombuffer(data, np.uint8)

    def size(word: int, lead: int) -> int:
        words = _words(flat, word, lead)
        return (len(words) + 7) // 8 + int(np.count_nonzero(words)) * word

    options = [(word, lead) for word in (1, 2, 4) for lead in range(word) if len(data) >= word + lead]
    word, lead = min(options, key=lambda option: size(*option))
    words = _words(flat, word, lead)
    places = np.flatnonzero(words)
    end = lead + len(words) * word
    # By byte position, because zlib finds more in the exponents of floats once they lie side by side.
    values = words[places].view(np.uint8).reshape(-1, word).T.tobytes()
    return _Words(word, lead, places, values, len(words), data[:lead], data[end:])


def _words(flat: Array, word: int, lead: int) -> Array:
    return flat[lead : lead + (len(flat) - lead) // word * word].view(f"<u{word}")


def _bitmask(split: _Words) -> bytes:
    bits = np.zeros(split.count, np.uint8)
    bits[split.places] = 1
    return split.head + np.packbits(bits, bitorder="little").tobytes() + split.values + split.tail


def _gaps(split: _Words) -> bytes:
    """Zeros before each word in one byte; 255 stands for 255 zeros without a word, so that any gap can be told."""
    gaps = np.diff(split.places, prepend=-1) - 1
    long = gaps // 255
    ends = np.cumsum(long + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if len(ends) else 0, 255, np.uint8)
    coded[ends] = gaps % 255
    return split.head + len(coded).to_bytes(4, "little") + coded.tobytes() + split.values + split.tail
