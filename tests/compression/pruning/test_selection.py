"""Plans on groups made up for the purpose: goals, widths, shares and the order in which units go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import log2

import numpy as np
import pytest

from edgeopt.compression.pruning.groups import Plan, Prunable, PruningGroup, Slice
from edgeopt.compression.pruning.selection import (
    Scope,
    channels_inside,
    channels_left,
    choose,
    groups_inside,
    plan_of,
    removal_chunks,
    removal_order,
)
from edgeopt.errors import UsageError


def choose_ratio(
    prunable: Prunable, scores: Mapping[str, np.ndarray], ratio: float, *, scope: Scope, multiple: int, max_ratio: float
) -> Plan:
    """The plan that removes at least this share of the prunable channels."""
    target = (1 - ratio) * channels_left(prunable, {})
    return choose(
        prunable, scores, partial(channels_left, prunable), target, scope=scope, multiple=multiple, max_ratio=max_ratio
    )


def channels(name: str, units: int, width: int = 1) -> PruningGroup:
    indices = np.arange(units * width, dtype=np.int64).reshape(units, width)
    return PruningGroup(name, "heads" if width > 1 else "channels", units, width, (Slice(name, "out", indices),))


def block(name: str) -> PruningGroup:
    return PruningGroup(name, "blocks", 1, 1, ())


def found(*groups: PruningGroup) -> Prunable:
    return Prunable(groups, ())


def some_prunable(rng: np.random.Generator) -> tuple[Prunable, dict[str, np.ndarray]]:
    groups = [
        channels(f"layer{i}", int(rng.integers(1, 70)), int(rng.choice([1, 1, 1, 4, 6, 16])))
        for i in range(rng.integers(1, 6))
    ]
    return found(*groups), {group.name: rng.random(group.units) for group in groups}


def left(prunable: Prunable, plan: Plan) -> dict[str, int]:
    return {group.name: group.units - len(plan.get(group.name, ())) for group in prunable.groups}


def counted(cost: Callable[[Plan], float]) -> tuple[Callable[[Plan], float], list[Plan]]:
    seen: list[Plan] = []

    def count(plan: Plan) -> float:
        seen.append(plan)
        return cost(plan)

    return count, seen


def test_the_least_important_units_go() -> None:
    prunable = found(channels("a", 4), channels("b", 3))
    scores = {"a": np.array([5.0, 0.1, 4.0, 0.3]), "b": np.array([0.2, 9.0, 8.0])}
    plan = choose(
        prunable,
        scores,
        lambda plan: channels_left(prunable, plan),
        4,
        scope="global",
        multiple=1,
        max_ratio=0.9,
    )
    assert plan == {"a": (1, 3), "b": (0,)}


def test_nothing_goes_where_the_goal_is_met_already() -> None:
    prunable = found(channels("a", 4))
    plan = choose(prunable, {"a": np.ones(4)}, lambda _: 10, 10, scope="global", multiple=1, max_ratio=0.9)
    assert plan == {}


@pytest.mark.parametrize("scope", ["global", "per-layer"])
@pytest.mark.parametrize("seed", range(25))
def test_widths_goals_and_shares_hold_for_random_groups(seed: int, scope: Scope) -> None:
    rng = np.random.default_rng(seed)
    prunable, scores = some_prunable(rng)
    multiple, max_ratio = int(rng.choice([1, 4, 8, 16])), float(rng.choice([0.5, 0.75, 0.9, 1.0]))
    order = removal_order(prunable, scores, scope=scope, multiple=multiple, max_ratio=max_ratio)
    least, most = channels_left(prunable, plan_of(prunable, order)), channels_left(prunable, {})
    cost, seen = counted(lambda plan: channels_left(prunable, plan))
    target = int(rng.integers(least, most + 1))
    plan = choose(prunable, scores, cost, target, scope=scope, multiple=multiple, max_ratio=max_ratio)

    biggest = max((chunk.channels for chunk in order), default=0)
    assert target - biggest < channels_left(prunable, plan) <= target
    assert len(seen) <= log2(len(order) + 1) + 3 + 24
    for group in prunable.groups:
        remaining = group.units - len(plan.get(group.name, ()))
        assert remaining == group.units or (remaining * group.width) % multiple == 0
        assert remaining >= 1
        assert group.units - remaining <= max_ratio * group.units + 1e-9
        assert list(plan.get(group.name, ())) == sorted(set(plan.get(group.name, ())))
        if gone := plan.get(group.name):
            stays = np.delete(scores[group.name], gone)
            assert scores[group.name][list(gone)].max() <= stays.min()


@pytest.mark.parametrize("scope", ["global", "per-layer"])
def test_a_second_round_on_the_narrower_network_keeps_the_widths(scope: Scope) -> None:
    rng = np.random.default_rng(3)
    prunable = found(channels("a", 64), channels("b", 36), channels("c", 4), channels("heads", 6, 16))
    for _ in range(2):
        scores = {group.name: rng.random(group.units) for group in prunable.groups}
        plan = choose_ratio(prunable, scores, 0.3, scope=scope, multiple=8, max_ratio=0.9)
        remaining = left(prunable, plan)
        prunable = found(*(channels(group.name, remaining[group.name], group.width) for group in prunable.groups))
        assert remaining["c"] == 4
        assert remaining["a"] % 8 == 0
        assert remaining["b"] in {8, 16, 24, 32, 36}


@pytest.mark.parametrize(
    ("units", "width", "multiple", "max_ratio", "expected"),
    [
        (32, 1, 8, 0.9, [24, 16, 8]),
        (30, 1, 8, 0.9, [24, 16, 8]),
        (8, 1, 8, 0.9, []),
        (6, 1, 8, 0.9, []),
        (9, 1, 8, 0.9, [8]),
        (4, 1, 1, 1.0, [3, 2, 1]),
        (10, 1, 1, 0.3, [9, 8, 7]),
        (6, 16, 8, 0.5, [5, 4, 3]),
        (6, 12, 8, 0.9, [4, 2]),
        (1, 64, 8, 1.0, []),
        (5, 1, 1, 0.0, []),
    ],
)
def test_widths_that_a_layer_can_have(
    units: int, width: int, multiple: int, max_ratio: float, expected: list[int]
) -> None:
    chunks = removal_chunks(channels("a", units, width), np.arange(units), multiple, max_ratio)
    lost = np.cumsum([len(chunk) for chunk in chunks])
    assert [units - int(gone) for gone in lost] == expected


def test_per_layer_takes_the_same_share_of_each() -> None:
    prunable = found(channels("a", 64), channels("b", 32), channels("c", 16))
    scores = {"a": np.arange(64.0), "b": np.arange(32.0) * 100, "c": np.arange(16.0) * 1e-3}
    plan = choose_ratio(prunable, scores, 0.5, scope="per-layer", multiple=1, max_ratio=0.9)
    assert left(prunable, plan) == {"a": 32, "b": 16, "c": 8}


def test_a_ratio_is_the_share_of_channels() -> None:
    prunable = found(channels("a", 4), channels("heads", 4, 8))
    scores = {"a": np.ones(4), "heads": np.zeros(4)}
    plan = choose_ratio(prunable, scores, 0.4, scope="global", multiple=1, max_ratio=0.9)
    assert left(prunable, plan) == {"a": 4, "heads": 2}


@pytest.mark.parametrize("prunable", [found(channels("a", 10)), found()])
def test_an_unreachable_goal_tells_what_can_be_reached(prunable: Prunable) -> None:
    least = 5 if prunable.groups else 0
    with pytest.raises(UsageError, match=f"a cost of -1 is out of reach: without all that may go it is {least}"):
        choose(
            prunable,
            {"a": np.ones(10)},
            lambda plan: channels_left(prunable, plan),
            -1,
            scope="global",
            multiple=1,
            max_ratio=0.5,
        )


def test_the_same_scores_give_the_same_plan() -> None:
    prunable = found(channels("a", 20), channels("b", 20))
    scores = {"a": np.ones(20), "b": np.ones(20)}
    plans = [choose_ratio(prunable, scores, 0.25, scope="global", multiple=1, max_ratio=0.9) for _ in range(2)]
    assert plans[0] == plans[1] == {"a": tuple(range(10))}


def efficient(scores: Mapping[str, np.ndarray], saved: Mapping[str, list[float]], target: float) -> Plan:
    """Choose among groups as wide as their scores are long, by a cost that `saved` adds up to."""
    prunable = found(*(channels(name, len(value)) for name, value in scores.items()))

    def cost(plan: Plan) -> float:
        return 100 - sum(sum(saved[name][: len(units)]) for name, units in plan.items())

    return choose(prunable, scores, cost, target, scope="global", multiple=1, max_ratio=1.0, saved=saved)


def test_units_that_save_much_go_before_units_that_matter_less() -> None:
    scores = {"cheap": np.array([1.0, 1.0, 1.0]), "dear": np.array([2.0, 2.0, 2.0])}
    saved = {"cheap": [1.0, 1.0], "dear": [10.0, 10.0]}
    assert efficient(scores, saved, 80) == {"dear": (0, 1)}


def test_a_stair_of_the_cost_is_taken_as_a_whole() -> None:
    # The first unit of "stairs" saves nothing, but opens the way to the second, which saves 30 at a loss of 2 in all.
    scores = {"stairs": np.array([1.0, 1.0, 9.0]), "even": np.array([1.0, 1.5, 9.0])}
    saved = {"stairs": [0.0, 30.0], "even": [5.0, 5.0]}
    assert efficient(scores, saved, 70) == {"stairs": (0, 1)}


def test_units_that_save_nothing_stay() -> None:
    scores = {"idle": np.zeros(3), "busy": np.array([5.0, 5.0, 5.0])}
    saved = {"idle": [0.0, 0.0], "busy": [1.0, 1.0]}
    assert efficient(scores, saved, 98) == {"busy": (0, 1)}


def test_efficiency_loses_no_more_than_the_plain_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = {name: rng.random(12) for name in "abc"}
        worth = {name: float(rng.uniform(0.1, 5)) for name in "abc"}
        saved = {name: [value] * 11 for name, value in worth.items()}
        prunable = found(*(channels(name, 12) for name in scores))

        def cost(plan: Plan, worth: Mapping[str, float] = worth) -> float:
            return sum(value * (12 - len(plan.get(name, ()))) for name, value in worth.items())

        target = 0.5 * cost({})
        aware, plain = (
            choose(prunable, scores, cost, target, scope="global", multiple=1, max_ratio=1.0, saved=given)
            for given in (saved, None)
        )
        lost = [sum(float(scores[name][list(units)].sum()) for name, units in p.items()) for p in (aware, plain)]
        assert lost[0] <= lost[1] + max(float(value.max()) for value in scores.values())


def test_what_a_large_last_chunk_makes_needless_is_given_back() -> None:
    prunable = found(channels("a", 8), channels("big.conv", 32), block("big"))
    scores = {"a": np.arange(8) / 10, "big.conv": np.full(32, 9.0), "big": np.array([32 * 0.45])}
    # The five least important units of "a" go first, then the block, which alone meets the goal of 8.
    plan = choose(
        prunable,
        scores,
        lambda plan: channels_left(prunable, plan),
        8,
        scope="global",
        multiple=1,
        max_ratio=1.0,
    )
    assert plan == {"big": (0,)}


def test_blocks_compete_by_score_per_channel() -> None:
    prunable = found(channels("b1.conv", 8), block("b1"), channels("b2.conv", 8), block("b2"))
    scores = {"b1.conv": np.ones(8), "b1": np.array([4.0]), "b2.conv": np.ones(8), "b2": np.array([16.0])}
    assert groups_inside(prunable, "b1") == ("b1.conv",)
    assert channels_inside(prunable, "b1") == 8
    plan = choose_ratio(prunable, scores, 0.5, scope="global", multiple=1, max_ratio=0.9)
    assert plan == {"b1": (0,)}
    assert channels_left(prunable, plan) == 8


def test_units_within_a_removed_block_are_not_named() -> None:
    prunable = found(channels("b1.conv", 4), block("b1"), block("b1.inner"), channels("b10.conv", 4))
    order = removal_order(
        prunable,
        {"b1.conv": np.zeros(4), "b1": np.ones(1), "b1.inner": np.ones(1), "b10.conv": np.full(4, 0.01)},
        scope="global",
        multiple=1,
        max_ratio=1.0,
    )
    assert plan_of(prunable, order) == {"b1": (0,), "b10.conv": (0, 1, 2)}


@pytest.mark.parametrize("scope", ["global", "per-layer"])
def test_no_more_blocks_go_than_the_ratio_allows(scope: Scope) -> None:
    prunable = found(*(block(f"b{i}") for i in range(4)))
    scores = {f"b{i}": np.array([float(4 - i)]) for i in range(4)}
    assert choose_ratio(prunable, scores, 0.5, scope=scope, multiple=1, max_ratio=0.5) == {"b2": (0,), "b3": (0,)}
    with pytest.raises(UsageError, match="out of reach"):
        choose_ratio(prunable, scores, 0.75, scope=scope, multiple=1, max_ratio=0.5)
