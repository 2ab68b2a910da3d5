from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest

from edgeopt.compression.low_rank.ranks import Curve, by_energy, for_budget
from edgeopt.errors import UsageError


def curve(path: str, size: int, decay: float, seed: int = 0) -> Curve:
    """A square layer."""
    energies = np.exp(-decay * np.arange(size)) * np.random.default_rng(seed).uniform(0.5, 1, size)
    return Curve(path, np.sort(energies)[::-1], (size * size - 1) // (2 * size), size * size, 2 * size)


CURVES = (curve("a", 16, 0.5), curve("b", 24, 0.1), curve("c", 8, 1.0))


def cost(ranks: Mapping[str, int]) -> float:
    return sum(ranks[one.path] * one.per_rank if one.path in ranks else one.whole for one in CURVES)


def loss(ranks: Mapping[str, int]) -> float:
    return sum(one.lost(ranks[one.path]) for one in CURVES if one.path in ranks)


def test_energy_is_kept_by_the_least_rank_that_does() -> None:
    ranks = by_energy(CURVES, 0.9)
    assert "b" not in ranks  # too flat: what keeps it saves nothing
    for one in CURVES:
        if one.path in ranks:
            assert one.lost(ranks[one.path]) <= 0.1 < one.lost(ranks[one.path] - 1)


def test_ranks_are_multiples_that_save_something() -> None:
    for multiple in (1, 2, 4):
        for ranks in (by_energy(CURVES, 0.8, multiple), for_budget(CURVES, cost, 600, multiple)):
            assert all(rank % multiple == 0 for rank in ranks.values())
            assert all(ranks[one.path] * one.per_rank < one.whole for one in CURVES if one.path in ranks)
    assert by_energy(CURVES, 0.5, 32) == {}


@pytest.mark.parametrize("budget", [850, 700, 500, 300, 150])
def test_budget_is_met_at_nearly_the_least_loss(budget: float) -> None:
    ranks = for_budget(CURVES, cost, budget)
    assert cost(ranks) <= budget
    choices = [[None, *one.ranks(1)] for one in CURVES]
    every = [
        {one.path: rank for one, rank in zip(CURVES, combination, strict=True) if rank is not None}
        for combination in product(*choices)
    ]
    least = min(loss(one) for one in every if cost(one) <= budget)
    assert loss(ranks) <= 1.5 * least + 1e-9


def test_nothing_is_given_up_without_need() -> None:
    assert for_budget(CURVES, cost, 10_000) == {}


def test_unreachable_budget_names_the_least_cost() -> None:
    with pytest.raises(UsageError, match="costs 96 even"):
        for_budget(CURVES, cost, 1)


def test_a_cost_is_asked_for_seldom() -> None:
    curves = [curve(str(index), 128, 0.02, index) for index in range(20)]
    calls: list[Mapping[str, int]] = []

    def measured(ranks: Mapping[str, int]) -> float:
        calls.append(ranks)
        return float(sum(ranks.get(one.path, 64) for one in curves))

    assert sum(for_budget(curves, measured, 600).values()) <= 600
    assert len(calls) < 25
