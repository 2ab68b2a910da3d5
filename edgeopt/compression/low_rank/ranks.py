"""How many directions each layer keeps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgeopt.errors import UsageError
from edgeopt.types import Array

#: Layer -> rank of the pair that replaces it. Layers that stay whole are left out.
Ranks = Mapping[str, int]
Cost = Callable[[Ranks], float]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """What a layer's output loses and what its inference costs at each rank.

    Attributes:
        path: of the layer.
        energies: of its directions, in the order in which they are kept.
        limit: the highest rank at which the pair saves MACs.
        whole, per_rank: cost of the layer as it is, and of the pair for each unit of its rank.
    """

    path: str
    energies: Array
    limit: int
    whole: int
    per_rank: int

    def lost(self, rank: int) -> float:
        """Share of the output's energy that a rank leaves out."""
        return float(self.energies[rank:].sum() / max(float(self.energies.sum()), 1e-300))

    def ranks(self, multiple: int) -> list[int]:
        """The ranks that save MACs and the cost in question, ascending."""
        most = min((self.whole - 1) // self.per_rank, self.limit)
        return list(range(multiple, most + 1, multiple))


def by_energy(curves: Sequence[Curve], energy: float, multiple: int = 1) -> dict[str, int]:
    """The least rank of each layer that keeps this share of its output's energy, where that saves something."""
    found = {}
    for curve in curves:
        rank = next((rank for rank in curve.ranks(multiple) if curve.lost(rank) <= 1 - energy), None)
        if rank is not None:
            found[curve.path] = rank
    return found


def for_budget(curves: Sequence[Curve], cost: Cost, budget: float, multiple: int = 1) -> dict[str, int]:
    """Ranks at which the model costs at most `budget`, with little energy lost.

    Every layer's ranks are steps on the lower convex hull of lost share against cost; all layers' steps, ordered by the
    loss per cost saved, are the best reductions in turn (the greedy solution of the knapsack problem's relaxation).
    The shortest run of them that fits the budget is found by bisection, so `cost` may be a measurement; what the last
    step saves beyond the budget is given back to its layer.

    Raises UsageError when even the lowest ranks cost more; names what they cost.
    """
    steps = sorted(
        (step for curve in curves for step in _steps(curve, multiple)), key=lambda step: (step.price, step.path)
    )

    def after(count: int) -> dict[str, int]:
        return {step.path: step.rank for step in steps[:count]}

    count = bisect_left(range(len(steps) + 1), True, key=lambda count: cost(after(count)) <= budget)
    if count > len(steps):
        raise UsageError(
            f"costs {cost(after(len(steps))):.6g} even at the lowest ranks, more than the {budget:.6g} asked for",
            where="low-rank factorization",
            fix="ask for less, or prune as well",
        )
    ranks = after(count)
    if count:
        path = steps[count - 1].path
        higher = [rank for rank in next(c for c in curves if c.path == path).ranks(multiple) if rank > ranks[path]]
        fitting = bisect_left(higher, True, key=lambda rank: cost({**ranks, path: rank}) > budget)
        ranks[path] = higher[fitting - 1] if fitting else ranks[path]
    return dict(sorted(ranks.items()))


@dataclass(frozen=True, slots=True)
class _Step:
    """Going down to a rank, and what that loses per unit of cost saved."""

    path: str
    rank: int
    price: float


def _steps(curve: Curve, multiple: int) -> list[_Step]:
    """Down the hull, from the whole layer to the lowest rank: their prices rise."""
    points = [(rank * curve.per_rank, curve.lost(rank), rank) for rank in curve.ranks(multiple)]
    points.append((curve.whole, 0.0, 0))
    hull: list[tuple[int, float, int]] = []
    for point in reversed(points):
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [_Step(curve.path, there[2], _price(here, there)) for here, there in pairwise(hull)]


def _price(here: tuple[int, float, int], there: tuple[int, float, int]) -> float:
    return (there[1] - here[1]) / (here[0] - there[0])
