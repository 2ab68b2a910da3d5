"""Latency of several files under the same conditions: in turns, in one fresh process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgeopt.runtimes import RUNTIMES
from edgeopt.tuning.estimates import is_emulated, known_ms
from edgeopt.types import Artifact, Npu, Sample
from edgeopt.validation.benchmark import run_worker
from edgeopt.validation.worker import FileRequest, Request

#: Seconds of timing per file.
BUDGET_S = 1.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One file's time.

    Attributes:
        ms: median over rounds of one inference.
        ratio: median over rounds of its time by that of the first file in the same round.
        spread: quartiles of its times, in ms.
    """

    ms: float
    ratio: float
    spread: tuple[float, float]


def time_together(
    files: Sequence[Artifact],
    runtime: str,
    sample: Sample,
    threads: int,
    budget_s: float = BUDGET_S,
    npu: Npu | None = None,
) -> tuple[Timed, ...]:
    """Time files in turns, round by round, so that a busy machine slows all of them alike.

    Files for an accelerator (`npu`) that the runtime emulates have the estimates of its compiler instead, without
    spread.

    Raises MissingError when the runtime is not on this machine, ConversionError when it refuses a file, UsageError
    when nobody can tell how long an accelerator takes.
    """
    if npu is not None and is_emulated(files, runtime):
        times = [known_ms(artifact, npu) for artifact in files]
        return tuple(Timed(ms, ms / times[0], (ms, ms)) for ms in times)
    with TemporaryDirectory(prefix="edgeopt-timing-") as folder:
        requests: list[FileRequest] = []
        for artifact in files:
            inputs = Path(folder) / f"{len(requests)}.npz"
            names = tuple(tensor.name for tensor in artifact.signature.inputs)
            np.savez(inputs, *(sample.inputs[name] for name in names))
            path = str(artifact.path.resolve())
            requests.append(FileRequest(path, artifact.signature, RUNTIMES[runtime], str(inputs), names))
        reply = run_worker(Request("latency", tuple(requests), threads, budget_s * len(files)))
    first = reply.rounds_ms[0]
    return tuple(
        Timed(
            ms=statistics.median(rounds),
            ratio=statistics.median(mine / theirs for mine, theirs in zip(rounds, first, strict=True)),
            spread=(float(np.percentile(rounds, 25)), float(np.percentile(rounds, 75))),
        )
        for rounds in reply.rounds_ms
    )
