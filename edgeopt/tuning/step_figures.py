"""What every step of a recipe did to accuracy and cost, measured on the file that is exported after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.compression.cost import macs_of, parameters_of
from edgeopt.errors import ConversionError
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.tuning.estimates import estimate, is_emulated
from edgeopt.tuning.timing import time_together
from edgeopt.types import Artifact, Model, Npu, Sample, StepFigures
from edgeopt.validation.fidelity import Fidelity

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress
    from edgeopt.runtimes.base import Session
    from edgeopt.validation.metrics import Metric

#: Samples that every step's file is run on; the shipped file's own proof takes them all.
SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Stage:
    """One row: a step's name, the model after it, and its file."""

    step: str
    model: Model
    artifact: Artifact


def figures(
    stages: Sequence[Stage],
    twin: Artifact,
    runtime: str,
    samples: Dataset,
    metric: Callable[[], Metric] | None,
    threads: int,
    progress: Progress,
    npu: Npu | None = None,
) -> tuple[StepFigures, ...]:
    """Measure all stages under the same conditions: on the same samples, and timed in turns.

    Args:
        twin: float file of the model as it was loaded.
        samples: the first of them are taken; see `edgeopt.datasets.select` for a fair choice.
        npu: the accelerator that the files are for, whose latency is estimated.
    """
    first = samples[0]
    made = tuple(stage.artifact for stage in stages)
    accuracies = _accuracies(made, twin, runtime, samples, metric, progress)
    progress.step("Timing the steps")
    times = _times(made, twin, runtime, first, threads, npu)
    return tuple(
        StepFigures(
            step=stage.step,
            samples=len(samples),
            score=accuracy.score,
            agreement=accuracy.agreement,
            sqnr_db=accuracy.sqnr_db,
            macs=_macs(stage.model),
            parameters=None if stage.model.module is None else parameters_of(stage.model),
            size_bytes=stage.artifact.size_bytes,
            latency_ms=latency_ms,
            spread_ms=spread_ms,
        )
        for stage, accuracy, (latency_ms, spread_ms) in zip(stages, accuracies, times, strict=True)
    )


def _times(
    files: tuple[Artifact, ...], twin: Artifact, runtime: str, sample: Sample, threads: int, npu: Npu | None
) -> list[tuple[float | None, tuple[float, float] | None]]:
    """Latency and its spread; of an accelerator's files what its compiler estimates, if it does."""
    if npu is not None and is_emulated(files, runtime):
        return [(estimate(artifact, npu).ms, None) for artifact in files]
    timed = time_together((twin, *files), runtime, sample, threads)[1:]
    return [(time.ms, time.spread) for time in timed]


@dataclass(frozen=True, slots=True)
class _Accuracy:
    score: float | None
    agreement: float | None
    sqnr_db: float | None


class _Running:
    """One file's session with what it accumulates."""

    def __init__(self, session: Session, metric: Metric | None) -> None:
        self._session = session
        self._metric = metric
        self._fidelity = Fidelity()

    def update(self, sample: Sample, expected: Session) -> None:
        found = self._session.run(sample.inputs)
        self._fidelity.update(expected.run(sample.inputs), found)
        if self._metric is not None:
            self._metric.update(found, sample)

    def result(self) -> _Accuracy:
        outputs = self._fidelity.results()
        return _Accuracy(
            self._metric.value() if self._metric is not None else None,
            min((o.agreement for o in outputs if o.agreement is not None), default=None),
            min((o.sqnr_db for o in outputs if o.sqnr_db is not None), default=None),
        )


def _accuracies(
    files: Sequence[Artifact],
    twin: Artifact,
    runtime: str,
    samples: Dataset,
    metric: Callable[[], Metric] | None,
    progress: Progress,
) -> list[_Accuracy]:
    results = []
    opener = load_runtime(runtime)
    host = opener if not is_emulated(files, runtime) else load_runtime(HOST_RUNTIMES[twin.format])
    for number, artifact in enumerate(files, 1):
        with ExitStack() as stack:
            expected = stack.enter_context(host.open(twin.path, twin.signature))
            session = stack.enter_context(opener.open(artifact.runnable, artifact.signature))
            running = _Running(session, metric() if metric is not None else None)
            for sample in progress.track(samples, f"Scoring step {number} of {len(files)}", len(samples)):
                running.update(sample, expected)
            results.append(running.result())
    return results


def _macs(model: Model) -> int | None:
    if model.module is None:
        return None
    try:
        return macs_of(model)
    except ConversionError:
        return None
