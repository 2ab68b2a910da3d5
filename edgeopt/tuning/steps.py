"""Runs the steps of a recipe one after the other: what was finished before is taken from the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.compression.base import PassInputs
from edgeopt.compression.pruning.importance import DATA_DRIVEN
from edgeopt.compression.steps import Distil, Factorize, Prune, Qat, Sparsify, Step
from edgeopt.errors import ConversionError, UsageError
from edgeopt.plan import Job
from edgeopt.tuning.context import StepContext, StepData, is_first_process
from edgeopt.tuning.own_student import own_student
from edgeopt.tuning.step_cache import StepCache, key_of
from edgeopt.tuning.step_identity import identity_of, is_measured
from edgeopt.types import Finding, Model, Sample, StepRecord

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress
    from edgeopt.sources import ModelSpec
    from edgeopt.workbench import Workbench

#: What each step is called, and the function that does it: (Model, its settings, StepContext) -> Model.
_STEPS: dict[type[Step], tuple[str, str]] = {
    Prune: ("prune", "edgeopt.tuning.prune:prune"),
    Sparsify: ("sparsify", "edgeopt.tuning.sparsify:sparsify"),
    Factorize: ("factorize", "edgeopt.tuning.factorize:factorize"),
    Distil: ("distil", "edgeopt.tuning.distil:distil"),
    Qat: ("qat", "edgeopt.tuning.qat:qat"),
}


@dataclass(frozen=True, slots=True)
class Made:
    """The model after one step; its structure differs from that of `base`, which some code of the user's builds."""

    step: str
    model: Model
    base: Model


def name_of(step: Step) -> str:
    return _STEPS[type(step)][0]


def run_steps(
    steps: tuple[Step, ...], job: Job, config: RunConfig, data: StepData, bench: Workbench, progress: Progress
) -> tuple[tuple[Made, ...], tuple[Finding, ...]]:
    """Do the steps for one target.

    Args:
        bench: of the model as it was loaded.

    Returns what each made, and what there is to say about it.

    Raises:
        any error of the steps.
        UsageError: the cache can't be written.
        SystemExit: in every process but the first of an `accelerate launch`: one is enough to export.
    """
    original = bench.torch_model()
    cache = StepCache((config.cache_dir or config.output_dir / ".steps") / original.name)
    students = [own_student(step, original, config.seed) for step in steps]
    identities = [identity_of(step, job, config, data, original) for step in steps]
    context = _context(original, job, config, data, bench)
    model = base = original
    made, findings = [], []
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number, (step, identity, student) in enumerate(zip(steps, identities, students, strict=True), 1):
        name = name_of(step)
        progress.step(f"Step {number} of {len(steps)}: {name}")
        if student is not None:
            model = base = student
        key = key_of(model, identity)
        known = cache.load(key, base) if is_alone else None
        if known is None:
            known = _do(step, model, replace(context, state_dir=cache.state(key)))
            if not is_first_process():
                raise SystemExit(0)
            findings += _kept(cache, key, known, base, name)
        else:
            findings.append(Finding("step-cached", name, "was done before; its result was taken from the cache"))
        findings += _told(known.history[len(model.history) :], name)
        made.append(Made(name, known, base))
        model = known
    return tuple(made), tuple(findings)


def _do(step: Step, model: Model, context: StepContext) -> Model:
    module, _, attribute = _STEPS[type(step)][1].partition(":")
    run: Callable[[Model, Step, StepContext], Model] = getattr(import_module(module), attribute)
    return run(model, step, context)


def _context(original: Model, job: Job, config: RunConfig, data: StepData, bench: Workbench) -> StepContext:
    """What all steps are given, but for the folder of each."""
    inputs = bench.pass_inputs(job.scheme, job.estimator)
    if inputs.samples is None and data.training is not None:
        inputs = _from_training(inputs, data.training, config.num_calibration_samples)
    return StepContext(
        job=job,
        original=original,
        training=data.training,
        validation=data.validation,
        inputs=inputs,
        bench=bench.variant,
        state_dir=Path(),
        threads=config.threads,
    )


def _from_training(inputs: PassInputs, training: Dataset, count: int) -> PassInputs:
    """Pass inputs with samples of the training data, where there are none for calibration."""
    from edgeopt.datasets import select

    chosen = select(training, count, inputs.seed)

    def samples() -> Iterator[Sample]:
        return iter(chosen)

    return replace(inputs, samples=samples, count=len(chosen))


def _kept(cache: StepCache, key: str, model: Model, base: Model, name: str) -> list[Finding]:
    try:
        cache.save(key, model, base)
    except (ConversionError, UsageError) as error:  # hours of training are worth more than their copy
        return [Finding("step-not-cached", name, f"can't be kept for a next run: {error.problem}")]
    return []


def _told(records: Sequence[StepRecord], name: str) -> list[Finding]:
    """What a person must know of a step: it did nothing, or stopped before its goal, or could not do all."""
    if not records:
        return [Finding("goal-already-met", name, "did nothing: the model costs no more than the goal as it is")]
    found = []
    for record in records:
        config = record.config
        if record.step.endswith("-undone"):
            fell = f"{config['score_before']:.4g} to {config['score']:.4g}"
            told = f"the round to {config['to']} was undone: on the validation data the score fell from {fell}"
            found.append(Finding("goal-not-reached", name, told))
        if config.get("fine_tuned") is False:
            found.append(Finding("not-trained", name, "without training data nothing made up for what was removed"))
    kept = next((record.config.get("kept") for record in reversed(records) if record.config.get("kept")), None)
    if kept:
        found.append(Finding("kept-width", name, str(kept)))
    return found


def check_steps(config: RunConfig, jobs: tuple[Job, ...]) -> None:
    """Refuse before any work what can't be done, or would be found out only after hours of training.

    Raises UsageError.
    """
    if not config.step:
        for name in ("train", "validation", "save_weights"):
            if getattr(config, name) is not None:
                raise UsageError(
                    "is of no use without a step that makes a new model",
                    where=name.replace("_", "-"),
                    fix="add a [[step]] to edgeopt.toml, or take edgeopt prune, sparsify, factorize, distil or qat",
                )
    if config.apply_rewrites and config.step:
        raise UsageError(
            "works on a model that no step changes",
            where="apply-rewrites",
            fix="do the steps first, with --save-weights, then export what they made",
        )
    if config.save_weights is not None:
        _check_saving(config.save_weights, config.model, jobs)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _check_processes(config.step)
    for number, step in enumerate(config.step, 1):
        _check_step(step, number == len(config.step), config, jobs)


def _check_processes(steps: tuple[Step, ...]) -> None:
    if len(steps) > 1:
        raise UsageError(
            "several processes can do one step only",
            where="step",
            fix="run the steps one by one, with --save-weights and --weights in between",
        )
    for step in steps:
        if is_measured(step):
            raise UsageError(
                "the goal is measured, and several processes would measure differently",
                where=name_of(step),
                fix="take one process, or aim at macs or parameters",
            )


def _check_saving(path: Path, source: str | ModelSpec | None, jobs: tuple[Job, ...]) -> None:
    if len(jobs) > 1:
        raise UsageError(
            "would be written once per target", where="save-weights", fix="give one --target, or save each on its own"
        )
    if isinstance(source, str) and ":" not in source:  # neither a factory nor hf:
        raise UsageError(
            "writes weights for Python code that builds the network, and this model comes as a graph",
            where="save-weights",
            fix="leave it out, or give the model as file.py:factory",
        )
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UsageError("can't be written: no folder to write into", where=f"save-weights {path}")


def _check_step(step: Step, is_last: bool, config: RunConfig, jobs: tuple[Job, ...]) -> None:
    where = name_of(step)
    if config.train is None:
        if isinstance(step, Distil | Qat) or (isinstance(step, Sparsify) and step.method == "movement"):
            raise UsageError("has nothing to train on", where=where, fix="give --train DATA")
        if isinstance(step, Prune) and step.importance in DATA_DRIVEN and config.calibration is None:
            raise UsageError(
                f"the importance {step.importance!r} is judged by data", where=where, fix="give --train DATA"
            )
    if config.validation is None:
        if step.training.patience is not None:
            raise UsageError("patience needs data to judge the epochs by", where=where, fix="give --validation DATA")
        if isinstance(step, Prune | Sparsify) and step.max_drop is not None:
            raise UsageError("max-drop needs data to judge the rounds by", where=where, fix="give --validation DATA")
        if isinstance(step, Distil) and step.student == "search":
            raise UsageError(
                "the search needs data to judge the students by", where=where, fix="give --validation DATA"
            )
    if isinstance(step, Qat):
        if not is_last:
            raise UsageError(
                "must be the last step: what comes after it would undo what it fits to the int8 grid", where=where
            )
        for job in jobs:
            _check_qat(job)


def _check_qat(job: Job) -> None:
    where = f"target {job.target.name!r}"
    if not job.scheme.is_quantized:
        raise UsageError(
            "is not quantized, so there is nothing to train for", where=where, fix="take an int8 target: android-int8"
        )
    if job.recipe not in ((), ("auto",)):
        # They would run after training, and rescale or round anew the weights that it fitted to the file's grid.
        raise UsageError(
            f"the recipe's passes ({', '.join(job.recipe)}) would undo what training fits to the int8 grid",
            where=where,
            fix='set recipe = "none", or "auto", which keeps a pass only where the file gets better',
        )
