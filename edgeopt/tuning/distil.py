"""A distillation step: the teacher is found, the student is made, and the one learns from the other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.compression.base import run_pass
from edgeopt.compression.distil.distil import Distillation, check_inputs
from edgeopt.compression.steps import Distil
from edgeopt.errors import UsageError
from edgeopt.sources import SourceOptions, as_torch, load_model
from edgeopt.types import Model

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.training.config import Teaching, TrainingConfig
    from edgeopt.tuning.context import StepContext
    from edgeopt.tuning.students import Family, Shape


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What every student of this step is taught with."""

    teacher: Model
    training: Dataset
    validation: Dataset | None
    teaching: Teaching

    def student(self, model: Model, config: TrainingConfig, checkpoints: Path | None, context: StepContext) -> Model:
        """The model, trained."""
        pass_ = Distillation(self.teacher, self.training, self.validation, self.teaching, config, checkpoints)
        return run_pass(pass_, model, context.inputs)

    def score(self, student: Model, config: TrainingConfig, context: StepContext) -> float:
        from edgeopt.training.fit import FitData, class_count_of, score

        if student.module is None or self.teacher.module is None:
            raise ValueError("both models have modules")
        data = FitData(self.training, self.validation, student.inputs, class_count_of(student))
        return score(student.module, data, config.batch_size, context.progress, self.teacher.module)


def distil(model: Model, settings: Distil, context: StepContext) -> Model:
    """The student, trained; see `Distil`. A student of another architecture already is the model that comes in.

    Raises:
        UsageError: no training data; a teacher, student, budget, loss or setting that doesn't fit.
        ConversionError: the student can't be trained, or not be made from the model.
        any error of `load_model` for the teacher.
    """
    lesson = _lesson(model, settings, context)
    model = as_torch(model)
    if settings.student == "derived":
        model = _derived(model, settings, context)
    elif settings.student == "search":
        model = _searched(model, settings, lesson, context)
    return lesson.student(model, settings.training, context.state_dir / "checkpoints", context)


def _lesson(model: Model, settings: Distil, context: StepContext) -> _Lesson:
    if context.training is None:
        raise UsageError("has nothing to train on", where="distil", fix="give --train DATA")
    if settings.student == "search" and context.validation is None:
        raise UsageError("needs data to judge the students by", where="student 'search'", fix="give --validation DATA")
    teacher = _teacher(model, settings, context)
    check_inputs(model, teacher)
    if not settings.sequence_level:
        return _Lesson(teacher, context.training, context.validation, settings.teaching)
    return _written(teacher, context.training, settings, context)


def _teacher(model: Model, settings: Distil, context: StepContext) -> Model:
    if settings.teacher is None:
        if settings.teacher_weights is not None:
            raise UsageError("goes with a teacher", where="teacher-weights", fix="give --teacher file.py:factory")
        return as_torch(context.original)
    context.progress.step("Loading the teacher")
    # It is run on the student's samples, so that the student's inputs are its own.
    options = SourceOptions(weights=settings.teacher_weights, inputs=model.inputs)
    return as_torch(load_model(settings.teacher, options))


def _written(teacher: Model, training: Dataset, settings: Distil, context: StepContext) -> _Lesson:
    """The lesson with the teacher's own sequences in place of the training data's."""
    from edgeopt.tuning.sequences import teacher_sequences

    def of(data: Dataset) -> Dataset:
        return teacher_sequences(
            teacher, data, context.state_dir / "sequences", settings.training.batch_size, context.progress
        )

    validation = context.validation
    if validation is not None and not validation.is_labelled:
        validation = of(validation)
    return _Lesson(teacher, of(training), validation, settings.taught)


def _derived(model: Model, settings: Distil, context: StepContext) -> Model:
    from edgeopt.tuning.students import Shape, check_smaller, family_of

    shape = Shape(settings.width, settings.depth)
    family = family_of(model, context, depth=shape.depth < 1)
    check_smaller(family, shape)
    return _made(family, shape, "", context)


def _searched(model: Model, settings: Distil, lesson: _Lesson, context: StepContext) -> Model:
    from edgeopt.tuning.student_search import brief, search
    from edgeopt.tuning.students import family_of

    if settings.to is None or settings.to.what == "ratio":
        raise UsageError(
            "needs a budget in macs, parameters, size or latency",
            where="student 'search'",
            fix="give --student-to latency=0.5x, say",
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "is not done by several processes, which would measure different things",
            where="student 'search'",
            fix="search with one process, then give --student derived with the width and depth that it found",
        )

    family = family_of(model, context, depth=True)
    config = brief(settings.training)

    def train(shape: Shape) -> float:
        checkpoints = context.state_dir / f"width-{shape.width:.4f}-depth-{shape.depth:.4f}"
        return lesson.score(lesson.student(family.student(shape), config, checkpoints, context), config, context)

    best, tried = search(family, settings.to, settings.trials, context, train)
    return _made(family, best.shape, "; ".join(candidate.line for candidate in tried), context)


def _made(family: Family, shape: Shape, tried: str, context: StepContext) -> Model:
    """The student of that shape, with its making in its history; the model itself where nothing goes."""
    from edgeopt.compression.pruning.structured import StructuredPruning
    from edgeopt.tuning.students import IMPORTANCE

    plan = family.plan(shape)
    if not plan:
        return family.model
    record: dict[str, str | int | float | bool | None] = {
        "for": "student", "width": shape.width, "depth": shape.depth, "importance": IMPORTANCE, "tried": tried,
    }  # fmt: skip
    return run_pass(StructuredPruning(family.prunable, plan, record), family.model, context.inputs)
