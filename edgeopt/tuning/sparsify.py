"""Zeros in weights, round by round: each trains what is left, and the first that costs too much is undone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.compression.base import run_pass
from edgeopt.compression.fine_tune import FineTuning
from edgeopt.compression.schedule import cubic, shares_of_rounds
from edgeopt.compression.sparsity.passes import (
    HALF,
    SparseTraining,
    Sparsification,
    magnitude_masks,
    weights_for,
)
from edgeopt.compression.steps import Sparsify
from edgeopt.errors import ConversionError, UsageError
from edgeopt.tuning.context import is_first_process
from edgeopt.tuning.sparsify_state import Round, RoundStore
from edgeopt.types import Model, StepRecord

if TYPE_CHECKING:
    from edgeopt.compression.sparsity.constraints import KeptZeros
    from edgeopt.compression.sparsity.products import Product
    from edgeopt.datasets.base import Dataset
    from edgeopt.tuning.context import StepContext

#: Epochs of every round but the last, which has all of `training.epochs`; as pruning has it.
_ROUND_EPOCHS = 1


def sparsify(model: Model, settings: Sparsify, context: StepContext) -> Model:
    """The model with zeros in its weights.

    With training data there are as many rounds as the schedule says. A round of "one-shot" and "iterative" sets
    weights to zero and trains the rest; one of "cubic" lets the zeros grow step by step in the first half of its own
    training. Every round has a `StepRecord`. Without training data there is one round of magnitudes and no training.

    Raises:
        UsageError: settings that contradict one another or the data; no weight may become zero.
        any error of `run_pass` and `fit`.
    """
    _check(settings, context)
    if context.training is None:
        context.progress.step("Setting weights to zero: without training data, nothing makes up for them")
        pass_ = Sparsification(settings.to, settings.pattern, settings.scope, settings.protect)
        return run_pass(pass_, model, context.inputs)
    return _Rounds(model, settings, context, context.training).run()


def _check(settings: Sparsify, context: StepContext) -> None:
    if settings.pattern == "unstructured" and not 0 < settings.to < 1:
        raise UsageError(f"{settings.to} is no share between 0 and 1", where="to", fix="take 0.5, say")
    if settings.rounds < 1:
        raise UsageError(f"{settings.rounds} rounds are none", where="rounds", fix="take 1 or more")
    if settings.method == "movement":
        if settings.schedule != "cubic" or settings.pattern != "unstructured":
            raise UsageError(
                "goes by what training does to the weights, so that zeros can only grow while it runs",
                where="method 'movement'",
                fix="take schedule 'cubic' with pattern 'unstructured', or method 'magnitude'",
            )
        if context.training is None:
            raise UsageError("has nothing to train on", where="method 'movement'", fix="give --train DATA")
    if settings.max_drop is not None and context.validation is None:
        raise UsageError("needs data to judge the rounds by", where="max-drop", fix="give --validation DATA")


@dataclass(frozen=True, slots=True)
class _Floor:
    """`value`: score that no round may fall below; `of_dense`: the score that it comes from."""

    of_dense: float
    value: float


class _Rounds:
    def __init__(self, model: Model, settings: Sparsify, context: StepContext, training: Dataset) -> None:
        from edgeopt.training.fit import FitData, class_count_of

        assert model.module is not None
        self._model = model
        self._dense = model.module
        self._settings = settings
        self._context = context
        self._data = FitData(training, context.validation, model.inputs, class_count_of(model))
        self._weights = _trainable_weights(model, settings)
        # Two of four is all or nothing: there is no half of it to go on from.
        one_step = settings.pattern == "2:4"
        self._target = HALF if one_step else settings.to
        self._shares = shares_of_rounds("one-shot" if one_step else settings.schedule, settings.rounds, self._target)
        self._store = RoundStore(context.state_dir)

    def run(self) -> Model:
        floor = self._floor()
        done = self._store.load(self._model) or Round(0, self._model, {})
        while done.number < len(self._shares) and not done.is_last:
            current = self._round(done)
            if floor is not None and (value := self._score(current.model)) < floor.value:
                current = self._undone(done, value, floor)
            done = current
            self._keep(done)
        return done.model

    def _undone(self, done: Round, value: float, floor: _Floor) -> Round:
        """The round before, as the last. Its history says what the next one would have cost: that is why the goal was
        not reached."""
        share = self._shares[done.number]
        self._context.progress.step(
            f"Undoing {share:.0%} zeros: the score {value:.4g} is below the floor {floor.value:.4g}"
        )
        figures = {"to": round(share, 6), "score": value, "score_before": floor.of_dense, "floor": floor.value}
        history = (*done.model.history, StepRecord("sparsify-undone", figures))
        return Round(done.number, replace(done.model, history=history), {}, is_last=True)

    def _keep(self, done: Round) -> None:
        if not is_first_process():
            return
        try:
            self._store.save(done, self._model)
        except ConversionError as error:
            self._context.progress.step(f"This round can't be gone on from later: {error.problem}")

    def _round(self, done: Round) -> Round:
        settings, number = self._settings, done.number + 1
        is_final = number == len(self._shares)
        constraint = self._constraint(done)
        share = self._shares[done.number]
        epochs = settings.training.epochs if is_final else min(_ROUND_EPOCHS, settings.training.epochs)
        self._context.progress.step(f"Round {number} of {len(self._shares)}: {share:.0%} zeros")
        checkpoints = self._context.state_dir / f"round-{number}"
        fine_tuning = FineTuning(
            self._data.training,
            self._data.validation,
            replace(settings.training, epochs=epochs),
            settings.teaching,
            self._model,
            checkpoint_dir=checkpoints,
        )
        pass_ = SparseTraining(
            constraint,
            share,
            fine_tuning,
            {
                "method": settings.method,
                "pattern": settings.pattern,
                "scope": settings.scope,
                "schedule": settings.schedule,
                "to": round(share, 6),
                "protect": ", ".join(settings.protect),
                "l1": settings.l1,
                "round": number,
                "rounds": len(self._shares),
            },
        )
        model = run_pass(pass_, done.model, self._context.inputs)
        state = constraint.state() if settings.method == "movement" and not is_final else {}
        if is_first_process():
            shutil.rmtree(checkpoints, ignore_errors=True)
        return Round(number, model, {name: tensor.cpu() for name, tensor in state.items()})

    def _constraint(self, done: Round) -> KeptZeros:
        from edgeopt.compression.sparsity.constraints import GrowingZeros, KeptZeros, Movement
        from edgeopt.compression.sparsity.masks import nonzero_masks

        settings = self._settings
        assert done.model.module is not None
        if settings.schedule != "cubic" or settings.pattern == "2:4":
            share = self._shares[done.number]
            masks = magnitude_masks(done.model.module, self._weights, share, settings.pattern, settings.scope)
            return KeptZeros(masks, settings.l1)
        module = done.model.module
        # What the round before has set to zero is not to come back until this one's zeros have grown as far.
        masks = nonzero_masks(module, [weight.name for weight in self._weights])
        share_at = _growth(self._target, done.number, len(self._shares))
        if settings.method == "movement":
            return Movement(masks, share_at, settings.scope, settings.l1, done.state or None)
        return GrowingZeros(masks, share_at, settings.scope, settings.l1)

    def _floor(self) -> _Floor | None:
        if self._settings.max_drop is None:
            return None
        dense = self._score(self._model)
        return _Floor(dense, dense - self._settings.max_drop)

    def _score(self, model: Model) -> float:
        from edgeopt.training.fit import score

        assert model.module is not None
        batch_size = self._settings.training.batch_size
        return score(model.module, self._data, batch_size, self._context.progress, self._dense)


def _trainable_weights(model: Model, settings: Sparsify) -> tuple[Product, ...]:
    """The weights that take part; movement leaves frozen ones dense, which nothing moves."""
    assert model.module is not None
    module = model.module
    weights = weights_for(model, settings.pattern, settings.protect)
    if settings.method == "magnitude" or not any(p.requires_grad for p in module.parameters()):
        return weights
    moving = tuple(weight for weight in weights if module.get_parameter(weight.name).requires_grad)
    if not moving:
        raise UsageError("every weight that may become zero is frozen", where="method 'movement'")
    return moving


def _growth(target: float, before: int, rounds: int) -> Callable[[float], float]:
    """The stretch of the cubic schedule that belongs to the round after `before` others."""

    def share_at(done: float) -> float:
        return target * cubic((before + done) / rounds)

    return share_at
