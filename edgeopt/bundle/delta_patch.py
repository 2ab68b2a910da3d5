"""Binary patches in the format of bsdiff 4 (BSDIFF40), so that any bspatch on the device can apply them.

A patch tells, stretch by stretch, where in the old file the new one continues, and what to add to its bytes. What may
be added is any difference, so a stretch need not be equal: weights that moved by a step or two compress to little. The
format is Percival's (https://www.daemonology.net/bsdiff/); the search is ours. bsdiff sorts all suffixes of the old
file, at 17 times its size in memory, and takes only stretches with much in common. Models are laid out alike from one
version to the next, so here a few unique fingerprints tell how far each part moved, in memory of a few times the file.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from edgeopt.errors import TamperedError

MAGIC = b"BSDIFF40"
_HEADER = 32
#: Three integers.
_INSTRUCTION = 24
#: Bytes that a fingerprint covers, a power of two, and the share of fingerprints kept, as a power of two.
_WINDOW = 32
_KEPT = 6
#: Fingerprints are computed for so many bytes at a time.
_CHUNK = 4 << 20
#: Where differences compress no better than the new bytes themselves, the latter are sent. Judged by blocks.
_BLOCK = 16 << 10
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Hashes = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """new[start:end], made by adding to old[start + shift:end + shift], or sent as it is where `shift` is None."""

    start: int
    end: int
    shift: int | None


@dataclass(frozen=True, slots=True)
class _Instruction:
    """new[changed] is made by adding to what begins at old[source]; new[sent], which follows, is sent as it is."""

    source: int
    changed: range
    sent: range


def make_patch(old: bytes, new: bytes) -> bytes:
    """A BSDIFF40 patch; the same for the same files."""
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    control, differences, extra = bytearray(), bytearray(), bytearray()
    instructions = _instructions(_stretches(before, after))
    for index, instruction in enumerate(instructions):
        changed, sent = instruction.changed, instruction.sent
        end = instruction.source + len(changed)
        differences += (after[changed.start : changed.stop] - before[instruction.source : end]).tobytes()
        extra += new[sent.start : sent.stop]
        move = instructions[index + 1].source - end if index + 1 < len(instructions) else 0
        control += _number(len(changed)) + _number(len(sent)) + _number(move)
    blocks = [bz2.compress(bytes(part), 9) for part in (control, differences, extra)]
    header = MAGIC + _number(len(blocks[0])) + _number(len(blocks[1])) + _number(len(new))
    return header + b"".join(blocks)


def apply_patch(old: bytes, patch: bytes, size: int, where: str) -> bytes:
    """The new file, of `size` bytes. Raises TamperedError when the patch is malformed or makes another size."""
    if len(patch) < _HEADER or patch[:8] != MAGIC or _value(patch[24:32]) != size:
        raise TamperedError("is no patch for this file", where=where)
    ends = (_HEADER + _value(patch[8:16]), _HEADER + _value(patch[8:16]) + _value(patch[16:24]))
    if not _HEADER <= ends[0] <= ends[1] <= len(patch):
        raise TamperedError("is no patch for this file", where=where)
    # Fingerprints are 64 bytes apart on average: ours has no more stretches than that, even where nothing is in order.
    control = _decompress(patch[_HEADER : ends[0]], _INSTRUCTION * (1024 + size // 32), where)
    differences = np.frombuffer(_decompress(patch[ends[0] : ends[1]], size, where), np.uint8)
    extra = _decompress(patch[ends[1] :], size, where)
    before, result = np.frombuffer(old, np.uint8), np.empty(size, np.uint8)
    source = target = used = taken = 0
    if len(control) % _INSTRUCTION:
        raise TamperedError("is cut short", where=where)
    for at in range(0, len(control), _INSTRUCTION):
        length, more, move = (_value(control[at + k : at + k + 8]) for k in (0, 8, 16))
        fits = min(length, more) >= 0 and target + length + more <= size
        if at and not length + more:
            raise TamperedError("holds instructions that do nothing", where=where)
        if not fits or source < 0 or source + length > len(old) or used + length > len(differences):
            raise TamperedError("leads out of the file that it patches", where=where)
        result[target : target + length] = before[source : source + length] + differences[used : used + length]
        target, source, used = target + length, source + length, used + length
        if taken + more > len(extra):
            raise TamperedError("is cut short", where=where)
        result[target : target + more] = np.frombuffer(extra, np.uint8, more, taken)
        target, taken, source = target + more, taken + more, source + move
    if target != size:
        raise TamperedError(f"makes {target} of {size} bytes", where=where)
    return result.tobytes()


def _instructions(stretches: Iterator[_Stretch]) -> list[_Instruction]:
    """Pairs of a stretch made from old bytes and one sent as it is. An empty pair begins, to get from the old file's
    start to wherever the first stretch needs it."""
    result = [_Instruction(0, range(0), range(0))]
    for stretch in stretches:
        part = range(stretch.start, stretch.end)
        if stretch.shift is None:
            result[-1] = replace(result[-1], sent=part)
        else:
            result.append(_Instruction(stretch.start + stretch.shift, part, range(0)))
    return result


def _stretches(old: Bytes, new: Bytes) -> Iterator[_Stretch]:
    """The new file in order, neighbours merged where they continue each other."""
    last: _Stretch | None = None
    for stretch in _judged(old, new):
        if last is not None and last.shift == stretch.shift:
            last = _Stretch(last.start, stretch.end, last.shift)
            continue
        if last is not None:
            yield last
        last = stretch
    if last is not None:
        yield last


def _judged(old: Bytes, new: Bytes) -> Iterator[_Stretch]:
    """Pieces of the new file, each sent in the way that compresses better."""
    for start, end, shift in _aligned(old, new):
        low, high = min(max(start, -shift), end), max(min(end, len(old) - shift), start)
        if low >= high:
            yield _Stretch(start, end, None)
            continue
        if start < low:
            yield _Stretch(start, low, None)
        for block in range(low, high, _BLOCK):
            stop = min(block + _BLOCK, high)
            plain = new[block:stop]
            difference = plain - old[block + shift : stop + shift]
            yield _Stretch(block, stop, shift if _cost(difference) <= _cost(plain) else None)
        if high < end:
            yield _Stretch(high, end, None)


def _cost(content: Bytes) -> int:
    return len(zlib.compress(content.tobytes(), 1)) if content.any() else 0


def _aligned(old: Bytes, new: Bytes) -> Iterator[tuple[int, int, int]]:
    """(start, end, shift): which part of the old file each part of the new one resembles."""
    places, shifts = _anchors(old, new)
    turns = np.flatnonzero(np.diff(shifts)) if len(shifts) else np.empty(0, np.int64)
    start, shift = 0, int(shifts[0]) if len(shifts) else 0
    for turn in turns:
        following = int(shifts[turn + 1])
        end = _best_turn(old, new, int(places[turn]) + _WINDOW, int(places[turn + 1]), shift, following)
        yield start, end, shift
        start, shift = end, following
    if start < len(new):
        yield start, len(new), shift


def _best_turn(old: Bytes, new: Bytes, low: int, high: int, before: int, after: int) -> int:
    """Where in new[low:high] to pass from one shift to the next, for the most bytes in common."""
    if low >= high:
        return low
    gain = _same(old, new, low, high, before) - _same(old, new, low, high, after)
    return low + int(np.argmax(np.concatenate(([0], np.cumsum(gain)))))


def _same(old: Bytes, new: Bytes, low: int, high: int, shift: int) -> Numbers:
    """1 for each byte of new[low:high] that the old file has, moved by `shift`."""
    result = np.zeros(high - low, np.int64)
    first, last = max(low, -shift), min(high, len(old) - shift)
    if first < last:
        result[first - low : last - low] = new[first:last] == old[first + shift : last + shift]
    return result


def _anchors(old: Bytes, new: Bytes) -> tuple[Numbers, Numbers]:
    """Places in the new file whose fingerprint is in the old one exactly once, and how far away it is there."""
    old_places, old_hashes = _fingerprints(old)
    new_places, new_hashes = _fingerprints(new)
    hashes, first, counts = np.unique(old_hashes, return_index=True, return_counts=True)
    hashes, places = hashes[counts == 1], old_places[first[counts == 1]]
    if not len(hashes):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    found = np.minimum(np.searchsorted(hashes, new_hashes), len(hashes) - 1)
    known = hashes[found] == new_hashes
    return new_places[known], places[found[known]] - new_places[known]


def _fingerprints(content: Bytes) -> tuple[Numbers, Hashes]:
    """Places and hashes of one in 2^_KEPT windows. Which ones depends on what is in them, not on where they are."""
    places: list[Numbers] = []
    hashes: list[Hashes] = []
    for start in range(0, max(len(content) - _WINDOW + 1, 0), _CHUNK):
        values = _window_hashes(content[start : start + _CHUNK + _WINDOW - 1])
        kept = (values * _MIX) >> np.uint64(64 - _KEPT) == 0
        kept[1:] &= values[1:] != values[:-1]  # a run of one value says nothing about where it is
        places.append(np.flatnonzero(kept) + start)
        hashes.append(values[kept])
    if not places:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    return np.concatenate(places), np.concatenate(hashes)


def _window_hashes(content: Bytes) -> Hashes:
    """A polynomial in `_BASE` modulo 2^64 for every window, by doubling the windows' length."""
    values = content.astype(np.uint64) + np.uint64(1)
    power, length = _BASE, 1
    with np.errstate(over="ignore"):
        while length < _WINDOW:
            values = values[:-length] * power + values[length:]
            power, length = power * power, 2 * length
    return values


def _number(value: int) -> bytes:
    """bsdiff's integers: 63 bits of magnitude, little-endian, and a sign bit."""
    return (abs(value) | (1 << 63 if value < 0 else 0)).to_bytes(8, "little")


def _value(raw: bytes) -> int:
    number = int.from_bytes(raw, "little")
    return -(number & ~(1 << 63)) if number >> 63 else number


def _decompress(block: bytes, most: int, where: str) -> bytes:
    """Raises TamperedError when there is more than `most` bytes in it, or it is no single bzip2 stream."""
    decompressor = bz2.BZ2Decompressor()
    try:
        content = decompressor.decompress(block, most + 1)
    except (OSError, EOFError, ValueError) as error:
        raise TamperedError("is damaged", where=where) from error
    if len(content) > most or not decompressor.eof or decompressor.unused_data:
        raise TamperedError("is damaged, or holds more than it should", where=where)
    return content
