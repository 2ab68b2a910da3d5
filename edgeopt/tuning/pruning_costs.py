"""The costs that pruning can aim at, each as a share of what the model of before the step costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from edgeopt.compression.cost import layer_shapes, macs_of, parameters_of
from edgeopt.compression.pruning.planned_cost import planned_macs, planned_parameters
from edgeopt.compression.pruning.selection import channels_left
from edgeopt.runtimes import load_runtime
from edgeopt.tuning.estimates import estimate, is_emulated
from edgeopt.tuning.latency_table import LatencyTable, measure_table
from edgeopt.tuning.layer_bank import PROFILED_RUNS, Bench
from edgeopt.tuning.timing import Timed, time_together
from edgeopt.types import Artifact, Sample

if TYPE_CHECKING:
    from edgeopt.compression.pruning.groups import Plan, Prunable
    from edgeopt.compression.steps import GoalName
    from edgeopt.tuning.context import StepContext
    from edgeopt.types import Model
    from edgeopt.workbench import Workbench

#: Seconds of timing per file; a share is to be known to about two per cent.
TIMING_S = 2.0
#: Width of the quartiles, by the median, up to which one timing is enough; otherwise the median of so many.
STEADY, TIMINGS = 0.15, 5

Saving = Callable[["Plan"], float]


class Cost(ABC):
    """One cost of `steps.Goal`.

    Attributes:
        before: of the model before the step, in the cost's own unit.
        is_exact: whether predictions and measurements are counts; else both have errors.
        by_efficiency: whether units should leave by what they save, rather than by their importance alone.
        name: for messages.
    """

    before: float
    is_exact: bool = True
    by_efficiency: bool = False
    name: str = "cost"

    @abstractmethod
    def saving(self, model: Model, prunable: Prunable) -> Saving:
        """What plans will take off a model on the way, predicted, as a share of `before`."""

    @abstractmethod
    def measure(self, model: Model, predicted: float) -> float:
        """Of a pruned model, as a share of `before`; `predicted` is what was expected."""

    def text(self, share: float) -> str:
        """ "0.60x of the latency (3.1 ms)"."""
        return f"{share:.2f}x of the {self.name} ({self._amount(share * self.before)})"

    def _amount(self, value: float) -> str:
        return f"{value:,.0f}"


class ChannelCost(Cost):
    """Prunable channels: the goal "ratio". `prunable` is that of the model before the step."""

    name = "prunable channels"

    def __init__(self, prunable: Prunable) -> None:
        self.before = float(channels_left(prunable, {}))

    def saving(self, model: Model, prunable: Prunable) -> Saving:
        del model
        total = channels_left(prunable, {})
        return lambda plan: (total - channels_left(prunable, plan)) / self.before

    def measure(self, model: Model, predicted: float) -> float:
        del model
        return predicted


class CountedCost(Cost):
    """Multiply-accumulates or parameters, counted in torch."""

    def __init__(self, model: Model, what: GoalName) -> None:
        self._count = macs_of if what == "macs" else parameters_of
        self._planned = planned_macs if what == "macs" else planned_parameters
        self.name = "multiply-accumulates" if what == "macs" else "parameters"
        self.before = float(self._count(model))

    def saving(self, model: Model, prunable: Prunable) -> Saving:
        left = self._planned(model, prunable)
        total = left({})
        return lambda plan: (total - left(plan)) / self.before

    def measure(self, model: Model, predicted: float) -> float:
        del predicted
        return self._count(model) / self.before


class SizeCost(Cost):
    """Bytes of the exported file, predicted by its weights."""

    is_exact = False
    name = "file"

    def __init__(self, model: Model, context: StepContext) -> None:
        self._context = context
        self.before = float(self._size(model))

    def saving(self, model: Model, prunable: Prunable) -> Saving:
        left = planned_parameters(model, prunable)
        total = left({})
        per_weight = self._context.job.scheme.weight_bits / 8
        return lambda plan: (total - left(plan)) * per_weight / self.before

    def measure(self, model: Model, predicted: float) -> float:
        del predicted
        return self._size(model) / self.before

    def _amount(self, value: float) -> str:
        return f"{value / 1024:,.1f} KB"

    def _size(self, model: Model) -> int:
        bench = self._context.bench(model)
        size = exported(bench, self._context).size_bytes
        bench.clear()
        return size


class LatencyCost(Cost):
    """Milliseconds of the exported file in the target's first runtime, predicted by a table of its layers.

    `before` is measured once. Other files are timed in turns with that of before the step, so that their share holds
    on a machine that is busy now and idle then.
    """

    is_exact = False
    by_efficiency = True
    name = "latency"

    def __init__(self, model: Model, prunable: Prunable, multiple: int, max_ratio: float, context: StepContext) -> None:
        self._context = context
        self._widest = (layer_shapes(model), prunable, multiple, max_ratio)
        self._reference = exported(context.bench(model), context)
        self._runtime = context.job.target.runtimes[0]
        self._sample = _sample(model, context)
        self._table: LatencyTable | None = None
        context.progress.step(f"Timing {model.name} as it is")
        self.before = self._time([self._reference])[0].ms
        self._total = self._operators_ms() or self.before

    def saving(self, model: Model, prunable: Prunable) -> Saving:
        table, shapes = self._layer_times(), layer_shapes(model)
        return lambda plan: table.saving(shapes, prunable, plan) / self._total

    def measure(self, model: Model, predicted: float) -> float:
        del predicted
        context, bench = self._context, self._context.bench(model)
        files = [self._reference, exported(bench, context)]
        context.progress.step("Timing the pruned file beside the one of before")
        ratios = []
        for _ in range(TIMINGS):
            timed = self._time(files)
            ratios.append(timed[1].ratio)
            if all(time.spread[1] - time.spread[0] <= STEADY * time.ms for time in timed):
                break
        bench.clear()
        return median(ratios)

    def _amount(self, value: float) -> str:
        return f"{value:.3g} ms"

    def _time(self, files: list[Artifact]) -> tuple[Timed, ...]:
        npu = self._context.job.scheme.npu
        return time_together(files, self._runtime, self._sample, self._context.threads, TIMING_S, npu)

    def _operators_ms(self) -> float:
        """All operators of the file of before by the runtime's profiler, as the table's layers are timed: on a busy
        machine they take less than the whole, which is interrupted more often."""
        reference, npu = self._reference, self._context.job.scheme.npu
        if npu is not None and is_emulated((reference,), self._runtime):
            return sum(timing.ms for timing in estimate(reference, npu).operators)
        runtime = load_runtime(self._runtime)
        with runtime.open(reference.path, reference.signature, self._context.threads) as session:
            return sum(timing.ms for timing in session.profile(self._sample.inputs, PROFILED_RUNS))

    def _layer_times(self) -> LatencyTable:
        if self._table is None:
            context = self._context
            bench = Bench(context.job.target.format, context.job.scheme, self._runtime, context.threads)
            # Beside the step's own folder, so that other steps and runs of the model find it.
            folder = context.state_dir.parent / "layer-times"
            shapes, prunable, multiple, max_ratio = self._widest
            self._table = measure_table(shapes, prunable, bench, multiple, max_ratio, folder, context.progress)
        return self._table


def cost_for(
    what: GoalName, model: Model, prunable: Prunable, multiple: int, max_ratio: float, context: StepContext
) -> Cost:
    """The cost that a goal names; `model` is that of before the step.

    Raises ConversionError when the model can't be exported or counted, MissingError when the runtime is not here.
    """
    match what:
        case "ratio":
            return ChannelCost(prunable)
        case "size":
            return SizeCost(model, context)
        case "latency":
            return LatencyCost(model, prunable, multiple, max_ratio, context)
        case _:
            return CountedCost(model, what)


def exported(bench: Workbench, context: StepContext) -> Artifact:
    """The file that the run will ship of the bench's model."""
    job = context.job
    if job.scheme.is_plain_float:
        return bench.float_artifact(job.target.format)
    return bench.quantized_artifact(job.target.format, job.scheme, job.estimator)[0]


def _sample(model: Model, context: StepContext) -> Sample:
    """What files are timed on."""
    example = Sample(model.example_inputs, None, "example input")
    return next(context.inputs.samples(), example) if context.inputs.samples is not None else example
