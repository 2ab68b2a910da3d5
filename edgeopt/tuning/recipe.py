"""`--recipe`: which cures a model gets, named by the user or found by trying them on the exported file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgeopt.compression import PASSES, load_pass
from edgeopt.compression.base import Pass, run_pass
from edgeopt.errors import ConversionError, MissingError
from edgeopt.progress import Progress
from edgeopt.tuning.assignment import search
from edgeopt.tuning.budget import Budget
from edgeopt.tuning.effort import effort_for
from edgeopt.tuning.estimates import is_emulated
from edgeopt.tuning.frontier import Frontier, Point
from edgeopt.tuning.layers import find_layers
from edgeopt.tuning.sensitivity import Sensitivity, analyse
from edgeopt.tuning.timing import time_together
from edgeopt.tuning.trial import MIN_GAIN_DB, Score, Terms, Trials
from edgeopt.types import EstimatorSpec, LayerRules, Model, Scheme
from edgeopt.workbench import Workbench

#: What `--recipe auto` tries, the cheapest to run first.
ESTIMATORS = (EstimatorSpec("mse"), EstimatorSpec("min-max"), EstimatorSpec("percentile", 99.99))
#: A pass may slow the quantized file down by this much, or by anything affordable where it gains a lot.
_SAME_SPEED = 1.03
_LARGE_GAIN_DB = 3.0

Outcome = Literal["kept", "not kept", "groundwork", "not applicable", "failed"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was tried.

    Attributes:
        name: "mse estimator", "equalize", "mixed precision".
        outcome: "groundwork" did neither good nor harm, and stays only if a later pass that builds on it is kept.
        gain_db: of the SQNR over the best before it; None where nothing was measured.
        score: of the file that it gave.
        note: why, where the figures don't say.
    """

    name: str
    outcome: Outcome
    gain_db: float | None = None
    score: Score | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What to export.

    Attributes:
        workbench: of the model as the kept passes made it; its quantized file with `estimator` and `rules` is the
            result.
        before, after: scores of the plain file and of the result.
        met: whether the result keeps the budget on the tuning samples; latency counts where there is a `frontier`.
        steps: what was tried, in order.
        sensitivity, frontier: of the search for mixed precision; None where none was needed or possible.
    """

    workbench: Workbench
    estimator: EstimatorSpec
    rules: LayerRules
    before: Score
    after: Score
    met: bool
    steps: tuple[Step, ...]
    sensitivity: Sensitivity | None
    frontier: Frontier | None


def apply_passes(
    workbench: Workbench, names: Sequence[str], scheme: Scheme, estimator: EstimatorSpec, progress: Progress
) -> Workbench:
    """A workbench for the model after these passes, in this order. Raises ConversionError when one does not apply."""
    if not names:
        return workbench
    model = workbench.torch_model()
    for name in names:
        progress.step(f"Applying {name}")
        model = run_pass(load_pass(name), model, workbench.pass_inputs(scheme, estimator))
    return workbench.variant(model)


def tune(
    workbench: Workbench,
    terms: Terms,
    estimator: EstimatorSpec,
    budget: Budget,
    progress: Progress,
    estimators: Sequence[EstimatorSpec] = ESTIMATORS,
    passes: Iterable[str] = tuple(PASSES),
) -> Tuned:
    """Find estimator, passes and assignment of precisions that the budget wants, by measuring exported files.

    Passes and estimators that cost no latency come first; what helps by more than chance stays. Layers that leave the
    scheme's precision come last, and only if the budget still wants them.

    Args:
        terms: with the original float file's outputs on the tuning samples: passes must not move the goal.
        estimator: the one to start from.
        estimators: others to try; none where the user has chosen.
        passes: names in `PASSES`, in the order to be tried.
    """
    tuner = _Tuner(Trials(workbench, estimator, terms), budget, progress)
    before = tuner.best.score
    tuner.try_estimators(estimators)
    if tuner.try_passes(passes):
        tuner.try_estimators(estimators)
    return tuner.finish(before)


@dataclass(frozen=True, slots=True)
class _State:
    """A model with an estimator, and the score of its file at `rules`."""

    trials: Trials
    score: Score
    rules: LayerRules

    @property
    def model(self) -> Model:
        return self.trials.workbench.torch_model()


class _Tuner:
    """Climbs: each step starts from the best state so far."""

    def __init__(self, trials: Trials, budget: Budget, progress: Progress) -> None:
        self._progress = progress
        self._workbench = trials.workbench
        self._baseline = trials.plain()
        self._budget = budget.beside(self._baseline.size_bytes)
        self._steps: list[Step] = []
        #: Passes that led to the best model, each with the model that it was given.
        self._chain: tuple[tuple[Pass, Model], ...] = ()
        self.best = _State(trials, trials.score(trials.rules), trials.rules)

    @property
    def _is_done(self) -> bool:
        """Nothing is cheaper than the plain file, so once that is accurate enough the search is over."""
        return self._budget.wants_cheapest and self._budget.is_accurate(self.best.score, with_margin=True)

    def try_estimators(self, estimators: Sequence[EstimatorSpec]) -> None:
        trials = self.best.trials
        if not trials.terms.scheme.needs_calibration:
            return
        for estimator in estimators:
            if estimator == self.best.trials.estimator or self._is_done:
                continue
            self._progress.step(f"Trying the {estimator.name} estimator")
            state = self._state(trials.workbench, estimator)
            kept = state.score.beats(self.best.score)
            self._note(f"{estimator.name} estimator", "kept" if kept else "not kept", state.score)
            if kept:
                self.best, state = state, self.best
            self._drop(state)

    def try_passes(self, names: Iterable[str]) -> bool:
        """Whether one was kept. A pass that does no harm is built upon, and kept if a later one needs it to help."""
        try:
            latest = self.best.model
        except ConversionError as error:
            self._steps.append(Step("passes", "failed", note=error.line()))
            return False
        any_kept = False
        chain = self._chain
        for name in names:
            if self._is_done:
                break
            self._progress.step(f"Trying {name}")
            try:
                pass_ = load_pass(name)
                if (reason := pass_.not_applicable(latest, self.best.trials.terms.scheme)) is not None:
                    self._steps.append(Step(name, "not applicable", note=reason))
                    continue
                trials = self.best.trials
                inputs = trials.workbench.pass_inputs(trials.terms.scheme, trials.estimator)
                changed = run_pass(pass_, latest, inputs)
                state = self._state(trials.workbench.variant(changed), trials.estimator)
            except (ConversionError, MissingError) as error:
                self._steps.append(Step(name, "failed", note=error.line()))
                continue
            if state.score.beats(self.best.score):
                if (reason := self._too_slow(state)) is not None:
                    self._note(name, "not kept", state.score, reason)
                    self._drop(state)
                    continue
                self._note(name, "kept", state.score)
                self._chain = chain = (*chain, (pass_, latest))
                self.best, state = state, self.best
                latest, any_kept = changed, True
            elif pass_.keeps_function and state.score.gain_db(self.best.score) > -MIN_GAIN_DB:
                self._note(name, "groundwork", state.score)
                chain = (*chain, (pass_, latest))
                latest = changed
            else:
                self._note(name, "not kept", state.score)
            self._drop(state)
        return any_kept

    def finish(self, before: Score) -> Tuned:
        """Mixed precision, where it can be of use."""
        trials = self.best.trials
        tuned = Tuned(
            workbench=trials.workbench,
            estimator=trials.estimator,
            rules=trials.rules,
            before=before,
            after=self.best.score,
            met=self._budget.is_accurate(self.best.score) and self._budget.fits(self.best.score.size_bytes),
            steps=tuple(self._steps),
            sensitivity=None,
            frontier=None,
        )
        if self._is_done:
            return tuned
        terms = self.best.trials.terms
        if terms.scheme.npu is not None and is_emulated((self._baseline,), terms.runtime):
            # What a float layer costs, which falls off the accelerator, can't be measured here.
            note = (
                "for an accelerator, name the layers: 'edgeopt sensitivity' ranks them, --int16-activations takes them"
            )
            return replace(tuned, steps=(*tuned.steps, Step("mixed precision", "not applicable", note=note)))
        ground = self._ground()
        trials = ground.trials
        try:
            layers = find_layers(trials.workbench, trials.plain(), trials.rules)
        except ConversionError as error:
            return replace(tuned, steps=(*tuned.steps, Step("mixed precision", "not applicable", note=error.line())))
        limit = effort_for(trials.terms.format).layer_trials
        sensitivity = analyse(trials, layers, self._progress, limit)
        frontier = search(trials, layers, sensitivity, self._budget, self._baseline, self._progress)
        chosen = frontier.chosen
        is_mixed = bool(chosen.float_layers or chosen.int16_layers)
        outcome: Outcome = "kept" if is_mixed else "not kept"
        self._steps.append(Step("mixed precision", outcome, chosen.score.gain_db(ground.score), chosen.score))
        if is_mixed:
            if ground is self.best:
                self.best = _State(trials, chosen.score, chosen.rules)
            self._refit(chosen.rules)
        is_met = self._budget.is_accurate(self.best.score) and self._budget.fits(self.best.score.size_bytes)
        if self.best.rules == chosen.rules:
            is_met = frontier.met or self._meets(chosen, frontier.float_ratio)
        return replace(
            tuned,
            workbench=self.best.trials.workbench,
            rules=self.best.rules,
            after=self.best.score,
            met=is_met,
            steps=tuple(self._steps),
            sensitivity=sensitivity,
            frontier=frontier,
        )

    def _ground(self) -> _State:
        """What mixed precision is searched on.

        Where the most accurate file is wanted, the model before the passes that fit weights to their rounding: a float
        layer among weights that make up for its rounding looks useless. They are fitted to the assignment afterwards.
        Where the cheapest file is wanted that is accurate enough, the model as it is.
        """
        fitted = self._first_fitted
        if fitted is None or self._budget.wants_cheapest:
            return self.best
        return self._state(self._workbench.variant(self._chain[fitted][1]), self.best.trials.estimator)

    @property
    def _first_fitted(self) -> int | None:
        """Place in the chain of the first pass that depends on what is quantized."""
        return next((index for index, (pass_, _) in enumerate(self._chain) if not pass_.keeps_function), None)

    def _meets(self, chosen: Point, float_ratio: float) -> bool:
        """Whether the last fit made a file accurate enough that was not."""
        return self._budget.is_affordable(chosen.cost, float_ratio) and self._budget.is_accurate(self.best.score)

    def _refit(self, rules: LayerRules) -> None:
        """Run the passes that make up for quantization again, for the layers that are quantized in the end."""
        fitted = self._first_fitted
        if fitted is None:
            return
        self._progress.step("Fitting the passes to the assignment")
        trials = self.best.trials
        inputs = replace(trials.workbench.pass_inputs(trials.terms.scheme, trials.estimator), rules=rules)
        changed = self._chain[fitted][1]
        try:
            for pass_, _ in self._chain[fitted:]:
                changed = run_pass(pass_, changed, inputs)
            again = Trials(trials.workbench.variant(changed), trials.estimator, trials.terms)
            score = again.score(rules)
        except ConversionError as error:
            self._steps.append(Step("passes once more", "failed", note=error.line()))
            return
        kept = score.beats(self.best.score)
        outcome: Outcome = "kept" if kept else "not kept"
        self._note("passes once more", outcome, score, "fitted to the layers that stay quantized")
        state = _State(again, score, rules)
        if kept:
            self.best, state = state, self.best
        self._drop(state)

    def _state(self, workbench: Workbench, estimator: EstimatorSpec) -> _State:
        trials = Trials(workbench, estimator, self.best.trials.terms)
        return _State(trials, trials.score(trials.rules), trials.rules)

    def _drop(self, state: _State) -> None:
        """Delete the files of a state that is not the best; the plain file is needed for every timing."""
        workbench, terms = state.trials.workbench, state.trials.terms
        if workbench not in (self._workbench, self.best.trials.workbench):
            workbench.clear()
        elif state.trials.plain() != self._baseline:
            workbench.discard(terms.format, terms.scheme, state.trials.estimator, state.trials.rules)

    def _note(self, name: str, outcome: Outcome, score: Score, note: str = "") -> None:
        self._steps.append(Step(name, outcome, score.gain_db(self.best.score), score, note))

    def _too_slow(self, state: _State) -> str | None:
        """Why a pass that helps is too dear, judged on its file beside the plain one."""
        terms = state.trials.terms
        candidate = state.trials.plain()
        files = [self._baseline, candidate]
        if terms.scheme.npu is not None and is_emulated(
            files, terms.runtime
        ):  # a pass changes weights, which are no reason to be slower there
            return None if self._budget.fits(candidate.size_bytes) else "makes the file larger than the budget allows"
        ratio = time_together(files, terms.runtime, terms.recording.first(), terms.threads)[1].ratio
        limit = self._budget.max_latency_ratio
        allowed = _SAME_SPEED
        if state.score.gain_db(self.best.score) >= _LARGE_GAIN_DB:
            allowed = float("inf") if limit is None else limit
        if ratio > allowed:
            return f"makes the file {ratio:.2f}x as slow"
        if not self._budget.fits(candidate.size_bytes):
            return "makes the file larger than the budget allows"
        return None
