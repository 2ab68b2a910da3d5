"""Measures assignments of precisions to layers: exported, scored and timed, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeopt.errors import ConversionError
from edgeopt.progress import Progress
from edgeopt.tuning.budget import Budget, Cost
from edgeopt.tuning.frontier import Frontier, Point, pick
from edgeopt.tuning.layers import Layers
from edgeopt.tuning.prediction import Assignment
from edgeopt.tuning.timing import time_together
from edgeopt.tuning.trial import Trials
from edgeopt.types import Artifact, LayerRules

#: Seconds of timing per file of a first look, and of the file that is about to be chosen.
LOOK_S, CONFIRM_S = 0.8, 2.5
#: Files timed together: all are open at once.
TIMED_AT_ONCE = 6

#: What a layer can be: at the scheme's own precision, with 16-bit activations, not quantized.
OWN, INT16, FLOAT = "own", "int16", "float"


class Bench:
    """Measures assignments, each once; latencies are held against that of `baseline`, a plain quantized file."""

    def __init__(
        self, trials: Trials, layers: Layers, precisions: Sequence[str], baseline: Artifact, progress: Progress
    ) -> None:
        self.trials = trials
        self.layers = layers
        self.precisions = tuple(precisions)
        self._baseline = baseline
        self._progress = progress
        self._points: dict[Assignment, Point] = {}
        twin = trials.workbench.float_artifact(trials.terms.format)
        self.float_ratio = self._time([twin], LOOK_S)[0].ratio

    @property
    def count(self) -> int:
        return len(self.layers.layers)

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self._points.values())

    def uniform(self, precision: str) -> Assignment:
        return Assignment((self.precisions.index(precision),) * self.count)

    def point(self, assignment: Assignment) -> Point | None:
        return self._points.get(assignment)

    def assignment_of(self, point: Point) -> Assignment:
        return next(assignment for assignment, known in self._points.items() if known == point)

    def extra_costs(self) -> list[tuple[Assignment, float]]:
        """What each measured assignment costs beyond the plain one."""
        return [(assignment, point.cost.ratio - self._plain_ratio) for assignment, point in self._points.items()]

    def best(self, budget: Budget) -> Point:
        """What the budget would pick now."""
        return pick(self.points, budget, self.float_ratio)[0]

    def extra_limit(self, budget: Budget) -> float:
        """What the budget lets a file cost beyond the plain one: latency, or size where only that is limited."""
        if budget.limits_size_only:
            return (budget.max_size_bytes or 0) / self.trials.plain().size_bytes - 1
        return budget.ratio_limit(self.best(budget).cost, self.float_ratio) - self._plain_ratio

    @property
    def _plain_ratio(self) -> float:
        """1 unless passes changed the speed of the plain file."""
        plain = self._points.get(self.uniform(OWN))
        return 1.0 if plain is None else plain.cost.ratio

    def rules(self, assignment: Assignment) -> LayerRules:
        return self.trials.rules_with(
            self.layers.keeping(self._having(assignment, FLOAT)), self.layers.keeping(self._having(assignment, INT16))
        )

    def measure(self, wanted: Mapping[Assignment, str]) -> None:
        """Export, score and time what is not known yet; what can't be converted is left out.

        Files that are timed together are there together, and gone once they are timed.
        """
        new = [(assignment, origin) for assignment, origin in wanted.items() if assignment not in self._points]
        made: list[tuple[Assignment, Point, Artifact]] = []
        for assignment, origin in self._progress.track(new, "Measuring assignments", len(new)):
            rules = self.rules(assignment)
            try:
                score, artifact = self.trials.score(rules), self.trials.artifact(rules)
            except ConversionError:
                continue
            cost = Cost(0.0, 1.0, artifact.size_bytes)
            chosen = (self._having(assignment, FLOAT), self._having(assignment, INT16))
            made.append((assignment, Point(origin, rules, *chosen, score, cost), artifact))
            if len(made) == TIMED_AT_ONCE - 1:
                self._add_timed(made)
                made = []
        self._add_timed(made)

    def _add_timed(self, made: Sequence[tuple[Assignment, Point, Artifact]]) -> None:
        if not made:
            return
        costs = self._time([artifact for _, _, artifact in made], LOOK_S)
        for (assignment, point, _), cost in zip(made, costs, strict=True):
            self._points[assignment] = replace(point, cost=cost)
            self.trials.discard(point.rules)

    def verdict(self, budget: Budget) -> Frontier:
        """Time the pick again, longer, until it is still the pick: the luckiest first look must not win.

        Only the file of the last pick stays.
        """
        confirmed: list[LayerRules] = []
        while True:
            chosen, met = pick(self.points, budget, self.float_ratio)
            if chosen.confirmed:
                break
            confirmed.append(chosen.rules)
            self._progress.step("Confirming the latency")
            cost = self._time([self.trials.artifact(chosen.rules)], CONFIRM_S)[0]
            self._points[self.assignment_of(chosen)] = replace(chosen, cost=cost, confirmed=True)
        for rules in confirmed:
            if rules != chosen.rules:
                self.trials.discard(rules)
        ordered = sorted(self.points, key=lambda point: (point.cost.ratio, point.score.noise))
        return Frontier(tuple(ordered), chosen, met, self.float_ratio)

    def _having(self, assignment: Assignment, precision: str) -> tuple[str, ...]:
        named = zip(self.layers.layers, assignment.states, strict=True)
        return tuple(layer.path for layer, state in named if self.precisions[state] == precision)

    def _time(self, files: Sequence[Artifact], budget_s: float) -> list[Cost]:
        """Costs of files, timed beside the baseline."""
        self._progress.step("Timing")
        terms = self.trials.terms
        together = [self._baseline, *files]
        timed = time_together(together, terms.runtime, terms.recording.first(), terms.threads, budget_s)
        return [Cost(t.ms, t.ratio, a.size_bytes) for t, a in zip(timed[1:], files, strict=True)]
