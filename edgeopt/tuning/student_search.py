"""A search for the best student under a budget: for each depth the widest that the budget allows, trained briefly."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from edgeopt.compression.cost import macs_of, parameters_of
from edgeopt.errors import UsageError
from edgeopt.tuning.journal import Journal
from edgeopt.tuning.students import Family, Shape
from edgeopt.tuning.timing import time_together
from edgeopt.types import Artifact, Model

if TYPE_CHECKING:
    from edgeopt.compression.steps import Goal
    from edgeopt.training.config import TrainingConfig
    from edgeopt.tuning.context import StepContext
    from edgeopt.workbench import Workbench

#: Share of the epochs that candidates are trained for; the best is trained for all of them, from its beginning.
BRIEF = 0.2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A student that keeps the budget.

    Attributes:
        cost: in the goal's unit; by the model's own where the goal is a share.
        score: on the validation data after the brief training, higher being better; None where it was the only one.
    """

    shape: Shape
    cost: float
    score: float | None = None

    @property
    def line(self) -> str:
        """For the record."""
        score = "" if self.score is None else f", score {self.score:.4g}"
        return f"{self.shape.name}: cost {self.cost:.4g}{score}"


@dataclass(frozen=True, slots=True)
class _Known:
    """A figure in the journal."""

    value: float


def search(
    family: Family,
    goal: Goal,
    trials: int,
    context: StepContext,
    train: Callable[[Shape], float],
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The student with the best score, and all that were tried.

    Of two students that keep the budget, the one that is as deep and wider, or as wide and deeper, is the better one:
    only the widest of each depth are trained. An interrupted search goes on where it stopped.

    Args:
        goal: budget, in macs, parameters, size or latency of the target's file.
        trials: students that are trained at most; depths are taken evenly where there are more.
        train: trains the student of a shape briefly and gives its score.

    Raises UsageError where no student keeps the budget.
    """
    journal = Journal(context.state_dir / "students.jsonl", _Known)

    def known(name: str, find: Callable[[], float]) -> float:
        found = journal.get(name)
        if found is None:
            found = _Known(find())
            journal.add(name, found)
        return found.value

    with CostOf(family.model, goal, context) as cost_of:

        def cost(shape: Shape) -> float:
            context.progress.step(f"Measuring the student of {shape.name}")
            return known(f"cost {shape.name}", lambda: cost_of(family.student(shape)))

        candidates = _affordable(family, _spread(family.depths(), trials), cost, goal.value)
        if not candidates:
            depth = family.depths()[-1]
            least = Shape(family.widths(depth)[-1], depth)
            raise UsageError(
                f"no student keeps the budget of {goal.value:.4g}: that of {least.name} has {cost(least):.4g}",
                where=f"student-to {goal.what}",
                fix="give a larger budget, or a student of your own",
            )
    if len(candidates) == 1:
        return candidates[0], candidates
    scores: list[float] = []
    for number, candidate in enumerate(candidates, 1):
        context.progress.step(f"Student {number} of {len(candidates)}: {candidate.shape.name}")
        scores.append(known(f"score {candidate.shape.name}", partial(train, candidate.shape)))
    scored = tuple(replace(candidate, score=score) for candidate, score in zip(candidates, scores, strict=True))
    return scored[scores.index(max(scores))], scored


def brief(config: TrainingConfig) -> TrainingConfig:
    """For a first look at a student."""
    return replace(config, epochs=max(1, round(config.epochs * BRIEF)), patience=None)


def _affordable(
    family: Family, depths: Sequence[float], cost: Callable[[Shape], float], limit: float
) -> tuple[Candidate, ...]:
    """The widest students, deepest first."""
    found: list[Candidate] = []
    for depth in depths:
        shapes = [Shape(width, depth) for width in family.widths(depth)]
        # Costs fall with the width: halving finds the first that is small enough.
        place = bisect_left(shapes, True, key=lambda shape: cost(shape) <= limit)
        if place < len(shapes):
            found.append(Candidate(shapes[place], cost(shapes[place])))
        if place == 0:
            break  # what is shallower could not be wider
    return tuple(found)


def _spread(depths: Sequence[float], count: int) -> tuple[float, ...]:
    """At most so many, evenly, with the first and the last."""
    if len(depths) <= count:
        return tuple(depths)
    return tuple(depths[round(k * (len(depths) - 1) / max(count - 1, 1))] for k in range(count))


class CostOf:
    """What models cost in a goal's terms; files and timings are those of the target.

    Args:
        before: a goal that is a share is one of this model's cost.
    """

    def __init__(self, before: Model, goal: Goal, context: StepContext) -> None:
        self._before = before
        self._goal = goal
        self._context = context
        self._bench: Workbench | None = None
        self._unit: float | None = None

    def __enter__(self) -> CostOf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bench is not None:
            self._bench.clear()

    def __call__(self, model: Model) -> float:
        if self._goal.what == "latency":
            return self._latency(model)
        if not self._goal.is_share:
            return self._absolute(model)
        if self._unit is None:
            self._unit = self._absolute(self._before)
        return self._absolute(model) / self._unit

    def _absolute(self, model: Model) -> float:
        if self._goal.what == "macs":
            return macs_of(model)
        if self._goal.what == "parameters":
            return parameters_of(model)
        bench = self._context.bench(model)
        try:
            return self._file(bench).size_bytes
        finally:
            bench.clear()

    def _latency(self, model: Model) -> float:
        """Timed in turns with the model of before, which is exported once."""
        context = self._context
        if self._bench is None:
            self._bench = context.bench(self._before)
        if context.inputs.samples is None:
            raise ValueError("run_steps gives samples wherever there are training data")
        bench = context.bench(model)
        try:
            files = (self._file(self._bench), self._file(bench))
            sample = next(context.inputs.samples())
            job = context.job
            timed = time_together(files, job.target.runtimes[0], sample, context.threads, npu=job.scheme.npu)[1]
        finally:
            bench.clear()
        return timed.ratio if self._goal.is_share else timed.ms

    def _file(self, bench: Workbench) -> Artifact:
        job = self._context.job
        if job.scheme.is_plain_float:
            return bench.float_artifact(job.target.format)
        return bench.quantized_artifact(job.target.format, job.scheme, job.estimator)[0]
