"""Which result of one file is which of the other: by layer, then by order, and in which layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, permutations
from operator import mul
from typing import Literal

import numpy as np

from edgeopt.types import Array

Shape = tuple[int, ...]

#: More axes than any network has; all orders of them are tried.
_MOST_AXES = 6
_QUANTILES = 25


@dataclass(frozen=True, slots=True)
class Trace:
    """One result of a file in one sample.

    Attributes:
        layer: that it belongs to; "" when unknown.
        shape: in the file's own layout.
        quantiles: of its values, which no layout changes; empty when unknown.
    """

    layer: str
    shape: Shape
    quantiles: tuple[float, ...] = ()

    @classmethod
    def of(cls, layer: str, values: Array) -> Trace:
        real = values[np.isfinite(values)].astype(np.float64)
        quantiles = np.quantile(real, np.linspace(0.02, 0.98, _QUANTILES)) if real.size else ()
        return cls(layer, values.shape, tuple(float(q) for q in quantiles))

    def likeness(self, other: Trace) -> float:
        """0 for what can't be the same tensor; more, the closer the values are distributed, up to 2."""
        if not can_be_same(self.shape, other.shape):
            return 0.0
        if not self.quantiles or not other.quantiles:
            return 1.0
        ours, theirs = np.array(self.quantiles), np.array(other.quantiles)
        scale = float(np.linalg.norm(ours) + np.linalg.norm(theirs))
        return 2.0 - float(np.linalg.norm(ours - theirs)) / scale if scale else 2.0


@dataclass(frozen=True, slots=True)
class Pairing:
    """`pairs` are indices into the two files' results, in the first one's order."""

    pairs: tuple[tuple[int, int], ...]
    matched_by: Literal["layer", "order"]


def pair(a: Sequence[Trace], b: Sequence[Trace]) -> Pairing:
    """Match results of the same layer in order, and those without a layer in order with what is left around them.

    Where the files have no layer in common, all results are matched in order. Only results that can be the same
    tensor are matched, see `can_be_same`.
    """
    groups_a, groups_b = _by_layer(a), _by_layer(b)
    shared = sorted(groups_a.keys() & groups_b.keys() - {""})
    if not shared:
        everything = _aligned(range(len(a)), range(len(b)), lambda i, j: a[i].likeness(b[j]))
        return Pairing(tuple(everything), "order")
    named = {
        i: j
        for layer in shared
        for i, j in _aligned(groups_a[layer], groups_b[layer], lambda i, j: a[i].likeness(b[j]))
    }
    taken = set(named.values())

    def likeness(i: int, j: int) -> float:
        if i in named or j in taken:
            return 2.0 if named.get(i) == j else 0.0
        return a[i].likeness(b[j]) if "" in (a[i].layer, b[j].layer) else 0.0

    named.update((i, j) for i, j in _aligned(range(len(a)), range(len(b)), likeness))
    return Pairing(tuple(sorted(named.items())), "layer")


def _by_layer(traces: Sequence[Trace]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, trace in enumerate(traces):
        groups[trace.layer].append(index)
    return groups


def _aligned(
    first: Sequence[int], second: Sequence[int], likeness: Callable[[int, int], float]
) -> Iterator[tuple[int, int]]:
    """Pairs in order with the greatest sum of likenesses, by dynamic programming from the end."""
    same = [[likeness(i, j) for j in second] for i in first]
    best = np.zeros((len(first) + 1, len(second) + 1))
    for i in reversed(range(len(first))):
        for j in reversed(range(len(second))):
            best[i, j] = max(best[i + 1, j], best[i, j + 1], same[i][j] + best[i + 1, j + 1])
    i = j = 0
    while i < len(first) and j < len(second):
        if same[i][j] and best[i, j] == same[i][j] + best[i + 1, j + 1]:
            yield first[i], second[j]
            i, j = i + 1, j + 1
        elif best[i + 1, j] >= best[i, j + 1]:
            i += 1
        else:
            j += 1


def can_be_same(a: Shape, b: Shape) -> bool:
    """Whether two shapes can hold one tensor: transposed, with neighbouring dimensions merged, with dimensions of 1."""
    return bool(_moves(_squeezed(a), _squeezed(b)))


def _squeezed(shape: Iterable[int]) -> Shape:
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True, slots=True)
class _Move:
    """How two arrays become alike: transpose the first, transpose the second, then give both the coarser shape."""

    first: Shape
    second: Shape
    shape: Shape

    def apply(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a.transpose(self.first).reshape(self.shape), b.transpose(self.second).reshape(self.shape)


@lru_cache(maxsize=4096)
def _moves(a: Shape, b: Shape) -> tuple[_Move, ...]:
    """What can make the two alike; of equally many axes only the likely orders where those do."""
    if np.prod(a, dtype=np.int64) != np.prod(b, dtype=np.int64) or max(len(a), len(b)) > _MOST_AXES:
        return ()
    unmoved = tuple(range(len(a))), tuple(range(len(b)))
    for orders in (_likely, _all) if len(a) == len(b) else (_all,):
        if len(b) >= len(a):
            moves = tuple(_Move(unmoved[0], order, a) for order in orders(len(b)) if _merges(_moved(b, order), a))
        else:
            moves = tuple(_Move(order, unmoved[1], b) for order in orders(len(a)) if _merges(_moved(a, order), b))
        if moves:
            return moves
    return ()


def _moved(shape: Shape, order: Shape) -> Shape:
    return tuple(shape[axis] for axis in order)


def _merges(fine: Shape, coarse: Shape) -> bool:
    """Whether merging neighbouring dimensions of one shape gives the other."""
    return set(accumulate(coarse, mul)) <= set(accumulate(fine, mul))


def _likely(rank: int) -> list[Shape]:
    """Unchanged, and channels moved between the front (after the batch, if there is one) and the end."""
    axes = tuple(range(rank))
    orders = [axes]
    for front in range(min(rank - 1, 2)):
        before, rest = axes[:front], axes[front:]
        orders += [(*before, *rest[1:], rest[0]), (*before, rest[-1], *rest[:-1])]
    return list(dict.fromkeys(orders))


def _all(rank: int) -> Iterator[Shape]:
    return permutations(range(rank))


class Layouts:
    """Brings one file's results into the other's layout; remembers what it found for each pair of shapes."""

    def __init__(self) -> None:
        self._moves: dict[tuple[int, Shape, Shape], _Move] = {}

    def aligned(self, key: int, a: Array, b: Array) -> tuple[Array, Array] | None:
        """Both arrays in one layout, without dimensions of 1; None if they don't fit.

        Where sizes tie and several layouts are possible, the one with the least difference is it.

        Args:
            key: of the result; its layout is the same in every sample.
        """
        first, second = a.reshape(_squeezed(a.shape)), b.reshape(_squeezed(b.shape))
        known = (key, first.shape, second.shape)
        if known not in self._moves:
            moves = _moves(first.shape, second.shape)
            if not moves:
                return None
            best = moves[0] if len(moves) == 1 else min(moves, key=lambda move: _distance(*move.apply(first, second)))
            self._moves[known] = best
        return self._moves[known].apply(first, second)


def _distance(a: Array, b: Array) -> float:
    difference = np.subtract(b, a, dtype=np.float64)
    return float(np.square(difference[np.isfinite(difference)]).sum())
