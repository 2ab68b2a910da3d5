"""The multiple-choice knapsack against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgeopt.compression.pruning.knapsack import cheapest
from edgeopt.types import Array


def brute(losses: list[Array], savings: list[Array], needed: float) -> float:
    best = np.inf
    for counts in product(*(range(len(loss) + 1) for loss in losses)):
        if sum(float(s[:c].sum()) for s, c in zip(savings, counts, strict=True)) >= needed:
            best = min(best, sum(float(part[:c].sum()) for part, c in zip(losses, counts, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_cheaper(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5, 5)
    losses = [np.sort(random.random(size)) for size in sizes]
    # Whole numbers of steps, so that counting in steps rounds nothing.
    savings = [random.integers(0, 200, size) / 2000 for size in sizes]
    needed = 1.0 if sum(float(part.sum()) for part in savings) > 1 else float(sum(part.sum() for part in savings)) / 2
    savings = [np.floor(part / needed * 2000) / 2000 * needed for part in savings]
    counts = cheapest(losses, savings, needed)
    assert counts is not None
    assert sum(float(s[:c].sum()) for s, c in zip(savings, counts, strict=True)) >= needed * (1 - 1e-9)
    found = sum(float(part[:c].sum()) for part, c in zip(losses, counts, strict=True))
    assert found == pytest.approx(brute(losses, savings, needed * (1 - 1e-9)))


def test_a_large_last_item_is_not_taken_where_small_ones_do() -> None:
    """Greedy by loss per saving takes the first group's one item (0.5 per 1), which saves twice of what is needed."""
    losses = [np.array([1.0]), np.array([0.3, 0.35])]
    savings = [np.array([2.0]), np.array([0.5, 0.5])]
    assert cheapest(losses, savings, 1.0) == (0, 2)


def test_out_of_reach() -> None:
    assert cheapest([np.array([1.0])], [np.array([0.4])], 1.0) is None
