"""Guesses which assignment of precisions to layers is worth measuring.

Noise powers of layers add up; so do their extra times, and every change of precision between neighbours costs a
conversion. Under these three assumptions the best assignment for each exchange rate of noise against cost is a
shortest path through (layer, precision), found exactly by dynamic programming (Viterbi 1967). Sweeping the rate (the
Lagrange multiplier of the budget, after Shoham and Gersho 1988) gives the predicted frontier. What it is worth is
measured, and the measurements correct the two cost factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeopt.types import Array

_RATES = 48
#: A conversion's cost before anything was measured, by that of an average layer's way back to float.
_FIRST_GUESS = 0.3
#: A layer that seems to cost nothing would always be float.
_MIN_COST = 1e-4


@dataclass(frozen=True, slots=True)
class Assignment:
    """Index of the precision of each layer, in the layers' order; 0 is the scheme's own."""

    states: tuple[int, ...]

    @property
    def conversions(self) -> int:
        return sum(a != b for a, b in zip(self.states, self.states[1:], strict=False))

    def with_layer(self, index: int, state: int) -> Assignment:
        return Assignment((*self.states[:index], state, *self.states[index + 1 :]))


class Predictor:
    """Noise and cost of assignments.

    Args:
        noise: (precisions, layers), noise power over signal power.
        cost: (precisions, layers), what a layer costs more than at the scheme's own precision, by the plain file's
            whole cost; row 0 is zero.
        conversions_cost: whether a change of precision between neighbours costs anything (it takes time, not bytes).
    """

    def __init__(self, noise: Array, cost: Array, conversions_cost: bool) -> None:
        self._noise = noise.astype(np.float64)
        self._cost = np.maximum(cost.astype(np.float64), _MIN_COST)
        self._cost[0] = 0.0
        self._scale = 1.0
        self._conversion = float(_FIRST_GUESS * self._cost[-1].mean()) if conversions_cost else 0.0
        self._fits_conversions = conversions_cost

    def noise(self, assignment: Assignment) -> float:
        return float(self._pick(self._noise, assignment).sum())

    def cost(self, assignment: Assignment) -> float:
        """Extra cost by the plain file's."""
        layers = float(self._pick(self._cost, assignment).sum())
        return self._scale * layers + self._conversion * assignment.conversions

    def frontier(self) -> list[Assignment]:
        """The assignments that are best at some exchange rate, the cheapest first: plain to least noise."""
        saved = self._noise[0] - self._noise[1:]
        worth = saved / (self._scale * self._cost[1:])
        worth = worth[worth > 0]
        if not worth.size:
            return []
        rates = np.geomspace(worth.min() / 4, worth.max() * 4, _RATES)
        found = dict.fromkeys(self._best(float(rate)) for rate in rates)
        return sorted(found, key=self.cost)

    def fit(self, measured: Sequence[tuple[Assignment, float]]) -> None:
        """Correct the cost of layers and conversions by least squares over (assignment, extra cost) pairs.

        Errors count by the cost they are part of, so that the costliest assignment does not decide alone.
        """
        rows = [(float(self._pick(self._cost, a).sum()), float(a.conversions), extra) for a, extra in measured]
        rows = [row for row in rows if row[0] > 0]
        if len(rows) < 2 or not self._fits_conversions:
            return
        table = np.array(rows)
        table /= (0.02 + np.abs(table[:, 2]))[:, None]
        layers, conversions, extra = table.T
        scale, conversion = np.linalg.lstsq(table[:, :2], extra, rcond=None)[0]
        if conversion < 0:
            scale, conversion = float(layers @ extra / (layers @ layers)), 0.0
        elif scale <= 0 and conversions.any():
            scale, conversion = 0.1, float(conversions @ extra / (conversions @ conversions))
        self._scale, self._conversion = max(float(scale), 0.1), max(float(conversion), 0.0)

    def _best(self, rate: float) -> Assignment:
        """Shortest path: noise + rate * cost."""
        price = self._noise + rate * self._scale * self._cost
        precisions, layers = price.shape
        change = rate * self._conversion * (1 - np.eye(precisions))
        total = price[:, 0]
        came_from = np.zeros((layers, precisions), dtype=np.int64)
        for index in range(1, layers):
            step = total[:, None] + change
            came_from[index] = step.argmin(axis=0)
            total = step.min(axis=0) + price[:, index]
        states = [int(total.argmin())]
        for index in range(layers - 1, 0, -1):
            states.append(int(came_from[index][states[-1]]))
        return Assignment(tuple(reversed(states)))

    @staticmethod
    def _pick(table: Array, assignment: Assignment) -> Array:
        picked: Array = table[list(assignment.states), np.arange(len(assignment.states))]
        return picked
