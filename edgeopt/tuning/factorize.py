"""Low-rank factorization as a step of a recipe: to a measured goal where one is set, then trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from edgeopt.compression.base import run_pass
from edgeopt.compression.fine_tune import FineTuning
from edgeopt.compression.low_rank.low_rank import LowRank
from edgeopt.compression.sparsity.constraints import kept_zeros
from edgeopt.device_profiles.channels import channel_multiple
from edgeopt.errors import ConversionError
from edgeopt.tuning.context import is_first_process
from edgeopt.tuning.step_cache import StepCache
from edgeopt.tuning.timing import time_together
from edgeopt.types import Artifact, Model, Sample

if TYPE_CHECKING:
    from edgeopt.compression.steps import Factorize
    from edgeopt.tuning.context import StepContext
    from edgeopt.workbench import Workbench

#: Seconds of timing per file.
_TIMING_S = 2.0
#: Where the split model is kept while it is trained.
_SPLIT = "split"


def factorize(model: Model, settings: Factorize, context: StepContext) -> Model:
    """The model with large layers split in two, then trained with the whole model as teacher where there is training
    data.

    Raises any error of `LowRank` and `FineTuning`, and those of exporting, where size or latency is the goal.
    """
    multiple = settings.multiple or channel_multiple(context.job.device, context.job.scheme.precision)
    pass_ = LowRank(
        to=settings.to,
        energy=settings.energy,
        activation_aware=settings.activation_aware and context.inputs.samples is not None,
        multiple=multiple,
        protect=settings.protect,
        cost=_cost(settings, context),
    )
    split = _split(pass_, model, context)
    if context.training is None:
        context.progress.step("Without training data, nothing makes up for what factorization lost")
        return split
    recovery = FineTuning(
        training=context.training,
        validation=context.validation,
        config=settings.training,
        teaching=settings.teaching,
        teacher=model,
        constraint=kept_zeros(split),
        checkpoint_dir=context.state_dir / "checkpoints",
    )
    return run_pass(recovery, split, context.inputs)


def _split(pass_: LowRank, model: Model, context: StepContext) -> Model:
    """The split model, from an interrupted run where there is one: training goes on with the very ranks that it began
    with, which a second measurement might choose otherwise."""
    kept = StepCache(context.state_dir)
    if (split := kept.load(_SPLIT, model)) is None:
        split = run_pass(pass_, model, context.inputs)
        if is_first_process():
            with suppress(ConversionError):  # of a structure that can't be described
                kept.save(_SPLIT, split, model)
    return split


def _cost(settings: Factorize, context: StepContext) -> Callable[[Model], float] | None:
    """Bytes or milliseconds of the file that is exported for a model; None for goals that can be counted."""
    if settings.to is None or settings.to.what not in ("size", "latency"):
        return None
    if settings.to.what == "size":
        return lambda model: _size(model, context)
    return _Latency(context)


def _size(model: Model, context: StepContext) -> float:
    bench = context.bench(model)
    size = _file(bench, context).size_bytes
    bench.clear()  # a search for ranks exports many
    return float(size)


class _Latency:
    """Latency of a model's file, in ms at the speed that the machine had for the first one: all later files are timed
    in turns with that one."""

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._first: tuple[Artifact, float] | None = None

    def __call__(self, model: Model) -> float:
        context, bench = self._context, self._context.bench(model)
        artifact = _file(bench, context)
        before = artifact if self._first is None else self._first[0]
        sample = Sample(context.original.example_inputs, None, "example input")
        files = (before, artifact)
        runtime = context.job.target.runtimes[0]
        timed = time_together(files, runtime, sample, context.threads, _TIMING_S, context.job.scheme.npu)
        if self._first is None:
            self._first = artifact, timed[0].ms
            return timed[0].ms
        bench.clear()
        return self._first[1] * timed[1].ratio


def _file(bench: Workbench, context: StepContext) -> Artifact:
    job = context.job
    if job.scheme.is_plain_float:
        return bench.float_artifact(job.target.format)
    return bench.quantized_artifact(job.target.format, job.scheme, job.estimator)[0]
