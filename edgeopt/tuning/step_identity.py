"""What decides a step's result beside the model that goes in, so that a finished one is known again by it."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from edgeopt.compression.base import state_digest
from edgeopt.compression.steps import Distil, Goal, Qat, Sparsify, Step
from edgeopt.device_profiles.channels import channel_multiple
from edgeopt.sources import SourceOptions, load_model
from edgeopt.tuning.own_student import names_network
from edgeopt.types import Model, TextPreprocessing
from edgeopt.user_code import load_user_object

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset
    from edgeopt.plan import Job
    from edgeopt.tuning.context import StepData

#: Code that a user does not write: its version tells one from another.
_INSTALLED = tuple(
    f"{Path(folder).resolve()}{os.sep}"
    for folder in (
        *map(sysconfig.get_paths().__getitem__, ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parent.parent),
    )
)


def identity_of(step: Step, job: Job, config: RunConfig, data: StepData, original: Model) -> tuple[object, ...]:
    """Everything beside the model that the step is given, and our own code, that decides what it makes.

    A teacher is loaded for it, and a user's loss imported, so that neither fails after hours of earlier steps.

    Args:
        original: the model as it was loaded.

    Raises:
        UsageError: no such loss, or one that the data don't allow.
        any error of `load_model` for the teacher.
    """
    # Where files lie makes no difference, what is in them does.
    settings = replace(step, teaching=replace(step.teaching, teacher_cache=None))
    if isinstance(settings, Distil):
        student = "" if names_network(settings) else settings.student
        settings = replace(settings, teacher=settings.teacher and "", teacher_weights=None, student=student)
    return (
        type(step).__name__, sorted(asdict(settings).items()),
        _loss(step, data.training), _teacher(step, original),
        *_target(step, job, config),
        config.seed, config.num_calibration_samples,
        *(None if part is None else part.fingerprint() for part in (data.training, data.validation, data.calibration)),
        _model(original),
    )  # fmt: skip


def is_measured(step: Step) -> bool:
    """Whether the step exports and measures files on its way to its goal."""
    goal = getattr(step, "to", None)
    return isinstance(goal, Goal) and goal.what in ("size", "latency")


def code_of(start: Iterable[ModuleType | None]) -> str:
    """SHA-256 of the user's own files among these Python modules and all that they import, wherever they lie."""
    found: dict[str, bytes] = {}
    waiting = [module for module in start if module is not None]
    while waiting:
        module = waiting.pop()
        file = getattr(module, "__file__", None)
        if file is None or file in found or str(Path(file).resolve()).startswith(_INSTALLED):
            continue
        try:
            found[file] = Path(file).read_bytes()
        except OSError:  # loaded from an archive, say
            continue
        waiting += _used_by(module)
    contents = sorted(hashlib.sha256(content).digest() for content in found.values())
    return hashlib.sha256(b"".join(contents)).hexdigest()


def _used_by(module: ModuleType) -> Iterator[ModuleType]:
    for value in list(vars(module).values()):
        name = getattr(value, "__module__", None)
        used = value if isinstance(value, ModuleType) else sys.modules.get(name) if isinstance(name, str) else None
        if used is not None:
            yield used


def _model(model: Model) -> tuple[object, ...]:
    """Of a model beside its weights: its code, and what it makes of the data, which are known by their raw content."""
    parts = () if model.module is None else model.module.modules()
    tokenizer = ""
    preprocessing = model.preprocessing
    if isinstance(preprocessing, TextPreprocessing):
        path = Path(preprocessing.tokenizer)
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        tokenizer = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
        preprocessing = replace(preprocessing, tokenizer="")
    return (
        model.source_sha256, code_of(sys.modules.get(type(part).__module__) for part in parts),
        model.inputs, model.labels, preprocessing, tokenizer,
    )  # fmt: skip


def _teacher(step: Step, original: Model) -> tuple[object, ...]:
    if not isinstance(step, Distil):
        return ()
    if step.teacher is None:
        return (state_digest(original.module),) if original.module is not None else ()
    teacher = load_model(step.teacher, SourceOptions(weights=step.teacher_weights, inputs=original.inputs))
    return (*_model(teacher), "" if teacher.module is None else state_digest(teacher.module))


def _loss(step: Step, training: Dataset | None) -> str:
    from edgeopt.training.losses import load_loss

    teaching = step.taught if isinstance(step, Distil) else step.teaching
    spec = teaching.loss
    writes_labels = isinstance(step, Distil) and step.sequence_level
    is_labelled = training is None or training.is_labelled or writes_labels
    load_loss(spec, is_labelled, teaching.alpha, teaching.temperature, label_smoothing=teaching.label_smoothing)
    return code_of([load_user_object(spec, "loss").module]) if spec and re.search(r":[\w.]+$", spec) else ""


def _target(step: Step, job: Job, config: RunConfig) -> tuple[object, ...]:
    """What a step takes from the target: all of its arithmetic and kernels where it measures files or trains for them,
    else its width step at most, so that several targets share the result."""
    keeps_widths = isinstance(step, Sparsify) or (
        isinstance(step, Distil) and (step.student == "model" or names_network(step))
    )
    multiple = None if keeps_widths else channel_multiple(job.device, job.scheme.precision)
    if not isinstance(step, Qat) and not is_measured(step):
        return (multiple,)
    return (
        multiple, job.target.format, job.target.runtimes, job.scheme, job.estimator, job.device.name, config.threads,
        config.keep_float, config.int16_activations,
    )  # fmt: skip
