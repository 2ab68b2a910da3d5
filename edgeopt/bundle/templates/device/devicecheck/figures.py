"""The arithmetic of the check, without NumPy."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_CODES = {
    "float32": "f", "float64": "d", "float16": "e", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H",
    "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q", "bool": "?",
}  # fmt: skip
#: One-sided probability below which a drift is no chance any more: z of the normal distribution for 0.1 %.
_Z = 3.09
#: ... and by how much the last quarter must be slower than the first to matter.
_SLOWER = 1.05
#: Below this many times a drift can't be told from noise.
_FEWEST = 20


def itemsize(dtype: str) -> int:
    """Bytes of one element. Raises KeyError on a type that no file of ours has."""
    return struct.calcsize("<" + _CODES[dtype])


def decode(raw: bytes, dtype: str) -> tuple[float, ...]:
    """Little-endian numbers. Raises ValueError where `raw` does not hold a whole number of them."""
    count, rest = divmod(len(raw), itemsize(dtype))
    if rest:
        raise ValueError(f"{len(raw)} bytes are no array of {dtype}")
    values: tuple[float, ...] = struct.unpack(f"<{count}{_CODES[dtype]}", raw)
    return values


def deviation(found: Sequence[float], golden: Sequence[float]) -> float:
    """Largest difference as a fraction of the golden output's range; infinite where lengths or NaNs differ."""
    if len(found) != len(golden):
        return math.inf
    worst = 0.0
    for a, b in zip(found, golden):
        if a == b or (math.isnan(a) and math.isnan(b)):
            continue
        if not (math.isfinite(a) and math.isfinite(b)):
            return math.inf
        worst = max(worst, abs(a - b))
    if worst == 0.0:
        return 0.0
    finite = [value for value in golden if math.isfinite(value)]
    span = max(finite) - min(finite)
    largest = worst / (span or max(map(abs, finite)) or 1.0)
    return largest if math.isfinite(largest) else math.inf


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear between the two nearest ranks. `values` must not be empty."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def slowed_down(times: Sequence[float]) -> bool | None:
    """Did the device get slower under way? None where there are too few times to tell.

    The last quarter against the first, by the rank-sum test of Mann and Whitney (1947), which single slow runs don't
    fool, and by the medians, so that a difference that nobody would notice doesn't count.
    """
    if len(times) < _FEWEST:
        return None
    size = len(times) // 4
    first, last = sorted(times[:size]), times[-size:]
    if quantile(last, 0.5) < _SLOWER * quantile(first, 0.5):
        return False
    wins = sum((bisect_left(first, b) + bisect_right(first, b)) / 2 for b in last)  # a tie is half a win
    mean = size * size / 2
    deviation_of_wins = math.sqrt(size * size * (2 * size + 1) / 12)
    return (wins - mean) / deviation_of_wins > _Z
