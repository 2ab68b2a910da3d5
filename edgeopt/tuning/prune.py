"""Structured pruning in rounds: what is worth least goes, the rest is trained on, and a round that costs too much is
undone."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.compression.base import run_pass, state_digest
from edgeopt.compression.cost import macs_of, parameters_of
from edgeopt.compression.fine_tune import FineTuning
from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.importance import ESTIMATE_LOSS, unit_scores
from edgeopt.compression.pruning.removal import remove_units
from edgeopt.compression.pruning.statistics import ScoringData
from edgeopt.compression.pruning.structured import StructuredPruning
from edgeopt.compression.schedule import cubic
from edgeopt.compression.sparsity.constraints import kept_zeros
from edgeopt.device_profiles.channels import channel_multiple
from edgeopt.errors import ConversionError, UsageError
from edgeopt.tuning.context import is_first_process
from edgeopt.tuning.prune_state import Round, RoundStore
from edgeopt.tuning.pruning_costs import Cost, cost_for
from edgeopt.tuning.pruning_search import Limits, Search, Trial, meets
from edgeopt.tuning.pruning_texts import goal_text, kept_text, removed_text
from edgeopt.types import Model, StepRecord

if TYPE_CHECKING:
    from edgeopt.compression.pruning.groups import Prunable
    from edgeopt.compression.steps import Goal, Importance, Prune, ScheduleName
    from edgeopt.training.constraint import Constraint
    from edgeopt.tuning.context import StepContext

#: Peak learning rate of every round but the last, by that of the last: a short round repairs a part of the damage, and
#: must leave the weights near enough to where their importance was judged.
RATE_ON_THE_WAY = 0.5

_Plain = str | int | float | bool | None


def prune(model: Model, settings: Prune, context: StepContext) -> Model:
    """The model with fewer channels, heads or blocks.

    Each round analyses the model anew, scores its units, removes those that bring the cost to the round's goal at the
    least loss of importance, and trains on with the model before the step as teacher. Every round's training has a
    warm-up and a cosine of its own; its peak is `training.learning_rate` in the last round, `RATE_ON_THE_WAY` of that
    before. Without training data there is one round and no training. Where `max_drop` is set, a round that loses more
    is undone, the history says so ("prune-undone"), and the network of the round before gets the training of the last
    one. A finished round is kept in the context's folder, and an interrupted run goes on after it.

    Raises:
        UsageError: settings that contradict one another or the data, a pattern of `protect` that matches nothing.
        UsageError: the goal is out of reach; it says how far the model can go.
        ConversionError: nothing can be pruned.
        any error of `run_pass`, the exporter and the runtime.
    """
    _check(settings, context)
    if context.training is None:
        context.progress.step("Pruning in one round: without training data, nothing makes up for what goes")
        settings = replace(settings, schedule="one-shot")
    return _Rounds(model, settings, context).run()


def shares_left(schedule: ScheduleName, rounds: int, target: float) -> tuple[float, ...]:
    """What the model costs after each round, as a share of before: equal factors for "iterative", for "cubic" the
    falling parts of Zhu and Gupta (2017), the target at once for "one-shot". The last one is the target."""
    if schedule == "one-shot":
        return (target,)
    done = [(index + 1) / rounds for index in range(rounds - 1)]
    # The end itself is not computed: rounding must not leave it short of the target.
    if schedule == "cubic":
        return (*(1 - (1 - target) * cubic(share) for share in done), target)
    return (*(target**share for share in done), target)


def default_importance(settings: Prune, context: StepContext) -> Importance:
    if settings.importance is not None:
        return settings.importance
    if context.training is not None:
        return "taylor"
    return "activation" if context.inputs.samples is not None else "l2"


def _check(settings: Prune, context: StepContext) -> None:
    goal = settings.to
    top = "1 is all of it" if goal.is_share or goal.what == "ratio" else None
    if not goal.value > 0 or (top is not None and goal.value >= 1):
        problem = f"{goal.value:g} is no goal" + (f": {top}" if top else "")
        raise UsageError(problem, where=f"to {goal.what}", fix="take 0.5, say" if top else "take a positive figure")
    if settings.rounds < 1:
        raise UsageError(f"{settings.rounds} rounds are none", where="rounds", fix="take 1 or more")
    if not 0 < settings.max_ratio < 1:
        raise UsageError(f"{settings.max_ratio:g} is no share", where="max-ratio", fix="take a share between 0 and 1")
    if settings.multiple is not None and settings.multiple < 1:
        raise UsageError(f"{settings.multiple} is no width", where="multiple", fix="take 1 or more")
    if settings.max_drop is not None and context.validation is None:
        raise UsageError("needs data to judge the rounds by", where="max-drop", fix="give --validation DATA")
    if goal.what in ("size", "latency") and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "is measured, and several processes would measure differently",
            where=f"to {goal.what}",
            fix="prune in one process, or aim at macs or parameters",
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """What one round starts from."""

    prunable: Prunable
    trial: Trial


class _Rounds:
    def __init__(self, model: Model, settings: Prune, context: StepContext) -> None:
        self._model = model
        self._settings = settings
        self._context = context
        self._multiple = settings.multiple or channel_multiple(context.job.device, context.job.scheme.precision)
        self._importance = default_importance(settings, context)
        self._store = RoundStore(context.state_dir, model, self._fingerprint())

    def run(self) -> Model:
        settings = self._settings
        kept = self._store.load()
        if kept is not None and kept.is_last:
            return kept.model
        prunable = self._analysed(self._model)
        _refuse_nothing(self._model, prunable)
        cost = cost_for(settings.to.what, self._model, prunable, self._multiple, settings.max_ratio, self._context)
        target = target_share(settings.to, cost.before)
        if target >= 1:
            self._context.progress.step("Nothing to prune: the model costs no more than the goal as it is")
            return self._model
        shares = shares_left(settings.schedule, settings.rounds, target)
        done = kept or self._start(prunable)
        while not done.is_last:
            done = self._round(done, shares, cost)
            if is_first_process():
                self._store.save(done)
        return done.model

    def _start(self, prunable: Prunable) -> Round:
        widest = {group.name: group.units for group in prunable.groups}
        blocks = sum(group.kind == "blocks" for group in prunable.groups)
        score = None if self._settings.max_drop is None else self._score(self._model)
        return Round(0, self._model, 1.0, widest, blocks, score)

    def _round(self, done: Round, shares: tuple[float, ...], cost: Cost) -> Round:
        number, target = done.number + 1, shares[done.number]
        is_final = number == len(shares)
        title = f"Round {number} of {len(shares)}: " if len(shares) > 1 else ""
        self._context.progress.step(f"{title}pruning to {target:.2f}x {self._settings.to.what}")
        model, share = done.model, done.cost
        if not meets(done.cost, target):  # Otherwise an earlier round went further than it had to.
            found = self._find(done, target, shares[-1], cost, is_final)
            if found.trial.plan:
                record = self._record(model, found, number, len(shares))
                pass_ = StructuredPruning(found.prunable, found.trial.plan, record)
                model, share = run_pass(pass_, model, self._context.inputs), found.trial.cost
        if model is done.model and not is_final:
            return replace(done, number=number)
        # The last round trains in any case: those before it have had short trainings only.
        tuned = self._fine_tuned(model, number, is_final)
        return self._judged(done, replace(done, number=number, model=tuned, cost=share, is_last=is_final), target)

    def _find(self, done: Round, target: float, goal: float, cost: Cost, is_final: bool) -> _Found:
        from edgeopt.training.fit import class_count_of

        settings, context, model = self._settings, self._context, done.model
        prunable = self._analysed(model)
        if (chosen := self._store.plan(done.number + 1, prunable)) is not None:
            return _Found(prunable, Trial(chosen.plan, remove_units(model, prunable, chosen.plan), chosen.cost))
        data = ScoringData(
            samples=context.inputs.samples,
            count=context.inputs.count,
            labelled=context.training,
            loss=settings.teaching.loss,
            class_count=class_count_of(model),
        )
        scores = unit_scores(model, prunable, self._importance, data, context.seed + done.number, context.progress)
        search = Search(
            model,
            prunable,
            scores,
            cost,
            done.cost,
            Limits(settings.scope, self._multiple, settings.max_ratio, done.widest, done.blocks),
            lambda plan: remove_units(model, prunable, plan),
            are_losses=self._importance in ESTIMATE_LOSS,
        )
        if not is_final and done.number == 0:
            # Hours of training must not come before the news that the goal can't be met.
            search.check_reachable(goal)
        trial = search.reach(target, is_final=is_final)
        if is_first_process():
            self._store.keep_plan(done.number + 1, trial.plan, trial.cost)
        return _Found(prunable, trial)

    def _fine_tuned(self, model: Model, number: int, is_final: bool) -> Model:
        settings, context = self._settings, self._context
        if context.training is None:
            return model
        training = settings.training
        if not is_final:
            rate = training.learning_rate * RATE_ON_THE_WAY
            training = replace(
                training, epochs=min(settings.round_epochs, training.epochs), learning_rate=rate, patience=None
            )
        if training.epochs == 0:
            return model
        pass_ = FineTuning(
            training=context.training,
            validation=context.validation,
            config=training,
            teaching=settings.teaching,
            teacher=self._model,
            constraint=self._constraint(model, is_final=is_final),
            checkpoint_dir=self._store.checkpoints(number),
        )
        data = context.training
        # Each round sees the samples in another order.
        inputs = replace(context.inputs, seed=context.seed + number - 1)
        if inputs.samples is None:
            inputs = replace(inputs, samples=lambda: iter(data), count=len(data))
        return run_pass(pass_, model, inputs)

    def _constraint(self, model: Model, *, is_final: bool) -> Constraint | None:
        """Zeros of an earlier step stay; channels are drawn to zero where they still can go."""
        zeros = kept_zeros(model)
        if is_final or not self._settings.group_lasso > 0:
            return zeros
        from edgeopt.tuning.group_lasso import GroupLasso

        return GroupLasso(self._analysed(model), self._settings.group_lasso, zeros)

    def _judged(self, before: Round, made: Round, target: float) -> Round:
        """The round, or that before it where it loses more than it may."""
        limit = self._settings.max_drop
        if limit is None or made.score_before is None:
            return made
        score = self._score(made.model)
        if score >= made.score_before - limit:
            return made
        what = self._settings.to.what
        self._context.progress.step(
            f"Undoing {target:.2f}x {what}: the score fell from {made.score_before:.4g} to {score:.4g}"
        )
        # What this round would have cost belongs into the history: it is why the goal was not reached.
        step = StepRecord(
            "prune-undone",
            {
                "round": made.number,
                "to": f"{target:.4g}x {what}",
                "score": score,
                "score_before": made.score_before,
                "max_drop": limit,
            },
        )
        kept = replace(before.model, history=(*before.model.history, step))
        if before.model.history != self._model.history:
            # It has had short trainings only; validation keeps this one from making it worse.
            kept = self._fine_tuned(kept, made.number + 1, is_final=True)
        return replace(before, number=made.number, model=kept, is_last=True)

    def _score(self, model: Model) -> float:
        from edgeopt.training.fit import FitData, class_count_of, score

        validation = self._context.validation
        assert validation is not None
        assert model.module is not None
        data = FitData(validation, validation, model.inputs, class_count_of(model))
        batch_size = self._settings.training.batch_size
        return score(model.module, data, batch_size, self._context.progress, self._model.module)

    def _analysed(self, model: Model) -> Prunable:
        return analyse(model, self._settings.remove, self._settings.protect)

    def _record(self, model: Model, found: _Found, number: int, rounds: int) -> dict[str, _Plain]:
        settings = self._settings
        return {
            "to": goal_text(settings.to),
            "importance": self._importance,
            "scope": settings.scope,
            "multiple": self._multiple,
            "max_ratio": settings.max_ratio,
            "schedule": settings.schedule,
            "round": number,
            "rounds": rounds,
            "group_lasso": settings.group_lasso,
            "fine_tuned": self._context.training is not None,
            "removed": removed_text(found.prunable, found.trial.plan),
            "kept": kept_text(found.prunable),
            "macs_before": _macs(model),
            "macs_after": _macs(found.trial.model),
            "parameters_before": parameters_of(model),
            "parameters_after": parameters_of(found.trial.model),
        }

    def _fingerprint(self) -> str:
        """Of everything that decides the result."""
        context = self._context
        assert self._model.module is not None
        data = (context.training, context.validation)
        job = context.job
        parts = (
            replace(self._settings, teaching=replace(self._settings.teaching, teacher_cache=None)),
            self._multiple, job.target.format, job.target.runtimes, job.scheme, job.estimator, context.inputs.rules,
            context.seed, context.inputs.count, context.threads, state_digest(self._model.module),
            [None if items is None else items.fingerprint() for items in data],
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _refuse_nothing(model: Model, prunable: Prunable) -> None:
    if prunable.groups:
        return
    why = f" ({kept_text(prunable)})" if prunable.kept else ""
    raise ConversionError(
        f"has nothing that may be pruned{why}",
        where=model.name,
        fix="protect fewer layers, or allow other kinds of units with --remove",
    )


def target_share(goal: Goal, before: float) -> float:
    """What is to be left, as a share of the cost before; a ratio is what goes."""
    if goal.what == "ratio":
        return 1 - goal.value
    return goal.value if goal.is_share else goal.value / before


def _macs(model: Model) -> int | None:
    try:
        return macs_of(model)
    except ConversionError:
        return None
