"""Which units go, so that a network reaches a goal at the least loss of importance; plain arithmetic on scores.

Units leave in chunks that bring a layer from one allowed width to the next. All chunks are put in one order, and the
shortest beginning of it that meets the goal is the plan; a search by halves finds it in a few looks at the cost. What
that removes beyond the goal, as a large last chunk may, is given back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, gcd, inf
from typing import Literal

import numpy as np

from edgeopt.compression.pruning.groups import Plan, Prunable, PruningGroup
from edgeopt.compression.pruning.knapsack import cheapest
from edgeopt.errors import UsageError
from edgeopt.types import Array

Scores = Mapping[str, Array]
Scope = Literal["global", "per-layer"]

#: Relative: a goal is met by a cost that rounding alone keeps from it.
_ROUNDING = 1e-9
#: Chunks that are tried for giving back.
_GIVEN_BACK = 24
#: Knapsacks that are solved for one plan, and by how much more than what was missing the goal is raised in between.
_KNAPSACKS = 8
_OVERSHOOT = 1.1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Units of one group that leave together.

    Attributes:
        group: its name.
        units: ascending.
        score: importance that is lost, the sum over the units.
        channels: of the producing layer that go; for a block, those of all groups that lie within it.
        share: of the group's units that is gone halfway through this chunk.
    """

    group: str
    units: tuple[int, ...]
    score: float
    channels: int
    share: float


def choose(
    prunable: Prunable,
    scores: Scores,
    cost: Callable[[Plan], float],
    target: float,
    *,
    scope: Scope,
    multiple: int,
    max_ratio: float,
    saved: Mapping[str, Sequence[float]] | None = None,
) -> Plan:
    """The plan that brings the cost to the target.

    Args:
        scores: group -> (units,); higher is kept.
        cost: of the network without a plan's units; falls as plans grow, and is called about log2(chunks) + 24 times.
        target: largest cost that meets the goal.
        scope: "global" compares all groups, "per-layer" takes the same share of each, up to one chunk.
        multiple: see `removal_chunks`.
        max_ratio: largest share of its units that a group may lose. All blocks count as one group.
        saved: group -> cost that each of its chunks (see `removal_chunks`) saves once those before it are gone. Only
            with "global": chunks then leave by lost score per saved cost, instead of by lost score per channel. For
            scores that estimate a loss (`importance.ESTIMATE_LOSS`).

    Raises:
        UsageError: all that may go together does not reach the target.
    """
    order = removal_order(prunable, scores, scope=scope, multiple=multiple, max_ratio=max_ratio, saved=saved)
    limit = target + abs(target) * _ROUNDING
    if cost({}) <= limit:
        return {}
    least = cost(plan_of(prunable, order)) if order else cost({})
    if least > limit:
        raise UsageError(
            f"a cost of {target:g} is out of reach: without all that may go it is {least:g}",
            where="pruning",
            fix="allow more with a smaller multiple, a larger max_ratio, fewer protected layers or other kinds of "
            "units, or set a less ambitious goal",
        )
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if cost(plan_of(prunable, order[:middle])) <= limit:
            enough = middle
        else:
            too_few = middle
    removed = order[:enough]
    if scope == "global":
        removed = _without_excess(prunable, removed, cost, limit)
        if saved is not None:
            removed = _by_knapsack(prunable, order, removed, saved, cost, limit)
    return plan_of(prunable, removed)


def channels_left(prunable: Prunable, plan: Plan) -> int:
    """Prunable channels that remain, those of removed blocks being gone; blocks, where nothing else is prunable."""
    layered = [group for group in prunable.groups if group.kind != "blocks"]
    if not layered:
        return len(prunable.groups) - len(plan)
    gone = {name for block in _removed_blocks(prunable, plan) for name in groups_inside(prunable, block)}
    return sum(
        (group.units - len(plan.get(group.name, ()))) * group.width for group in layered if group.name not in gone
    )


def removal_chunks(group: PruningGroup, scores: Array, multiple: int, max_ratio: float) -> tuple[tuple[int, ...], ...]:
    """The units of a group in the order in which they leave, the least important first, in chunks.

    After each chunk the width (units left x channels per unit) is a multiple of `multiple`; the first chunk is what
    is above the next lower one, where the layer doesn't have such a width to begin with. A layer never goes below
    one multiple: narrower ones stay as they are, since the device would run them no faster. `max_ratio` bounds the
    share of units that go.
    """
    if group.kind == "blocks":
        return ((0,),)
    step = multiple // gcd(multiple, group.width)
    least = max(step, ceil(group.units * (1 - max_ratio) - _ROUNDING))
    widths = [group.units, *(left for left in range((group.units - 1) // step * step, 0, -step) if left >= least)]
    ascending = np.argsort(scores, kind="stable")
    ends = [group.units - left for left in widths]
    return tuple(tuple(int(unit) for unit in np.sort(ascending[begin:end])) for begin, end in pairwise(ends))


def removal_order(
    prunable: Prunable,
    scores: Scores,
    *,
    scope: Scope,
    multiple: int,
    max_ratio: float,
    saved: Mapping[str, Sequence[float]] | None = None,
) -> tuple[Chunk, ...]:
    """All chunks that may go, in the order in which they do; see `choose`. Ties go by score, then by place."""
    runs = [
        _chunks(group, scores[group.name], removal_chunks(group, scores[group.name], multiple, max_ratio))
        for group in prunable.groups
        if group.kind != "blocks"
    ]
    blocks = _block_chunks(prunable, scores, max_ratio)
    if scope == "per-layer":
        return tuple(sorted(_flat([*runs, blocks]), key=lambda chunk: (chunk.share, chunk.score)))
    runs += [(block,) for block in blocks]
    if saved is not None:
        return _by_efficiency(runs, saved)
    return tuple(sorted(_flat(runs), key=lambda chunk: chunk.score / chunk.channels))


def plan_of(prunable: Prunable, chunks: Iterable[Chunk]) -> Plan:
    """The units of these chunks, by group; groups within a removed block are left out."""
    units: dict[str, list[int]] = defaultdict(list)
    for chunk in chunks:
        units[chunk.group].extend(chunk.units)
    gone = {name for block in _removed_blocks(prunable, units) for name in groups_inside(prunable, block)}
    return {
        group.name: tuple(sorted(units[group.name]))
        for group in prunable.groups
        if group.name in units and group.name not in gone
    }


def _without_excess(
    prunable: Prunable, removed: Sequence[Chunk], cost: Callable[[Plan], float], limit: float
) -> tuple[Chunk, ...]:
    """The chunks less those that the goal can do without, tried from the most important one on. The last one, which
    met the goal, stays, and so does what left its group before a chunk that stays."""
    kept, needed = list(removed), {removed[-1].group}
    for chunk in removed[-2 : -2 - _GIVEN_BACK : -1]:
        if chunk.group in needed:
            continue
        fewer = [other for other in kept if other is not chunk]
        if cost(plan_of(prunable, fewer)) <= limit:
            kept = fewer
        else:
            needed.add(chunk.group)
    return tuple(kept)


def _by_knapsack(
    prunable: Prunable,
    order: Sequence[Chunk],
    greedy: Sequence[Chunk],
    saved: Mapping[str, Sequence[float]],
    cost: Callable[[Plan], float],
    limit: float,
) -> tuple[Chunk, ...]:
    """Chunks that meet the goal and lose less than the greedy choice, where the knapsack finds such.

    It takes savings for independent of each other, which they nearly are: what a layer saves depends on its inputs too.
    So the goal is moved by what the cost of its answer is off, a few times.
    """
    runs: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in sorted(order, key=lambda chunk: chunk.share):
        runs[chunk.group].append(chunk)
    losses = [np.array([chunk.score for chunk in run]) for run in runs.values()]
    savings = [np.maximum(np.array(saved[name][: len(run)], dtype=np.float64), 0.0) for name, run in runs.items()]
    best, lost = tuple(greedy), sum(chunk.score for chunk in greedy)
    needed = cost({}) - limit
    for _ in range(_KNAPSACKS):
        counts = cheapest(losses, savings, needed)
        if counts is None:
            break
        chosen = tuple(chunk for run, count in zip(runs.values(), counts, strict=True) for chunk in run[:count])
        excess = cost(plan_of(prunable, chosen)) - limit
        if excess <= 0 and sum(chunk.score for chunk in chosen) < lost:
            best, lost = chosen, sum(chunk.score for chunk in chosen)
        # A little beyond it, or the same answer would come again.
        needed += excess * _OVERSHOOT if excess > 0 else excess / 2
        if needed <= 0:
            break
    return best


def groups_inside(prunable: Prunable, block: str) -> tuple[str, ...]:
    """Names of the groups all of whose layers belong to the block at this path, nested blocks among them."""
    inside = f"{block}."
    return tuple(
        group.name
        for group in prunable.groups
        if group.name != block and all(layer.startswith(inside) for layer in (group.layers or (group.name,)))
    )


def channels_inside(prunable: Prunable, block: str) -> int:
    """Prunable channels of the groups within a block; 1 where there are none."""
    names = groups_inside(prunable, block)
    groups = [group for group in prunable.groups if group.name in names and group.kind != "blocks"]
    return max(1, sum(group.units * group.width for group in groups))


def _removed_blocks(prunable: Prunable, plan: Mapping[str, Sequence[int]]) -> list[str]:
    return [group.name for group in prunable.groups if group.kind == "blocks" and plan.get(group.name)]


def _chunks(group: PruningGroup, scores: Array, parts: Sequence[tuple[int, ...]]) -> tuple[Chunk, ...]:
    found = []
    gone = 0
    for units in parts:
        share = (gone + len(units) / 2) / group.units
        found.append(Chunk(group.name, units, float(scores[list(units)].sum()), len(units) * group.width, share))
        gone += len(units)
    return tuple(found)


def _block_chunks(prunable: Prunable, scores: Scores, max_ratio: float) -> tuple[Chunk, ...]:
    """One for each block that may go, the least important ones: shares are of all blocks."""
    blocks = [group.name for group in prunable.groups if group.kind == "blocks"]
    chunks = [Chunk(name, (0,), float(scores[name][0]), channels_inside(prunable, name), 0.0) for name in blocks]
    chunks.sort(key=lambda chunk: chunk.score / chunk.channels)
    most = int(len(blocks) * max_ratio + _ROUNDING)
    return tuple(replace(chunk, share=(i + 0.5) / len(blocks)) for i, chunk in enumerate(chunks[:most]))


def _flat(runs: Iterable[Sequence[Chunk]]) -> list[Chunk]:
    return [chunk for run in runs for chunk in run]


def _by_efficiency(runs: Iterable[Sequence[Chunk]], saved: Mapping[str, Sequence[float]]) -> tuple[Chunk, ...]:
    """By lost score per saved cost, which solves the knapsack up to the last chunk.

    Latency falls in stairs: a chunk may save nothing by itself and be what the next one's saving needs. Within a
    group, chunks are therefore pooled until efficiency falls from pool to pool, the convex hull of the multiple-choice
    knapsack (Sinha and Zoltners 1979); the knapsack is that of Shen et al., "Structural Pruning via Latency-Saliency
    Knapsack" (2022). What saves nothing to the very end goes last.
    """
    pools: list[tuple[float, tuple[Chunk, ...]]] = []
    for run in runs:
        hull: list[tuple[float, float, tuple[Chunk, ...]]] = []
        for chunk, gain in zip(run, saved[run[0].group] if run else (), strict=True):
            score, total = chunk.score, float(gain)
            pool: tuple[Chunk, ...] = (chunk,)
            while hull and _loss_per_saving(hull[-1][0], hull[-1][1]) > _loss_per_saving(score, total):
                before = hull.pop()
                score, total, pool = before[0] + score, before[1] + total, before[2] + pool
            hull.append((score, total, pool))
        pools += [(_loss_per_saving(score, total), pool) for score, total, pool in hull]
    return tuple(_flat(pool for _, pool in sorted(pools, key=lambda pool: pool[0])))


def _loss_per_saving(score: float, saved: float) -> float:
    return score / saved if saved > 0 else inf
