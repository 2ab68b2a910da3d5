"""Latency, speed-up, size and peak memory of exported files, measured in fresh processes on this host."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgeopt import errors
from edgeopt.errors import ConversionError, EdgeoptError, UsageError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.runtimes import RUNTIMES
from edgeopt.types import Array, Artifact, Measurement, Signature
from edgeopt.validation.worker import MEMORY_RUNS, FileRequest, Reply, Request

BUDGET_S = 2.0
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class TimedFile:
    """One file to measure.

    Attributes:
        subject: what `Measurement.subject` calls it.
        path, signature: the file.
        runtime: a name in `edgeopt.runtimes.RUNTIMES`.
        inputs: one sample in the model's terms.
    """

    subject: str
    path: Path
    signature: Signature
    runtime: str
    inputs: Mapping[str, Array]


def subject_of(artifact: Artifact, float_twin: Artifact | None) -> str:
    """What measurements call a file: "quantized", or "float" where it is its own twin. The fp32 file of a pruned model
    has a twin, that of the model as it was, and so counts as what was made of it."""
    return "float" if artifact.precision == "fp32" and float_twin is None else "quantized"


def benchmark(
    candidate: Artifact,
    reference: Artifact | None,
    runtime: str,
    inputs: Mapping[str, Array],
    threads: int,
    budget_s: float = BUDGET_S,
) -> tuple[Measurement, ...]:
    """Measure an exported file beside its float twin, if it has one; see `benchmark_pair`.

    Subjects are "quantized" and "float", see `subject_of`.
    """
    subject = subject_of(candidate, reference)
    first = TimedFile(subject, candidate.path, candidate.signature, runtime, inputs)
    second = TimedFile("float", reference.path, reference.signature, runtime, inputs) if reference else None
    return benchmark_pair(first, second, threads, budget_s)


def benchmark_pair(
    candidate: TimedFile, reference: TimedFile | None, threads: int, budget_s: float = BUDGET_S
) -> tuple[Measurement, ...]:
    """Measure one file, or two under the same conditions.

    `latency_ms` is the median over rounds of `Session.run_native` alone (inputs are encoded beforehand), both files
    taking turns in one process; spread is the quartiles. `speedup` is the median of reference / candidate over the
    pairs of neighbouring rounds. `peak_memory_bytes` is by how much opening and running a file raises the peak
    resident memory of a process that has imported the runtime already, one process per file. `size_bytes` is the
    file's.

    Args:
        threads: given to the runtime.
        budget_s: seconds of timing in all; slow models take longer, at least three rounds.

    Raises:
        MissingError: when the runtime is not on this machine.
        ConversionError: when the runtime refuses a file, or its process dies or does not end.
    """
    files = (candidate,) if reference is None else (candidate, reference)
    with TemporaryDirectory(prefix="edgeopt-benchmark-") as folder:
        requests = tuple(_request_of(file, Path(folder) / f"{i}.npz") for i, file in enumerate(files))
        timing = run_worker(Request("latency", requests, threads, budget_s))
        weighing = [Request("memory", (request,), threads, budget_s, timing.modules) for request in requests]
        # Unlike time, memory is not disturbed by another process beside it.
        with ThreadPoolExecutor(len(weighing)) as pool:
            peaks = [float(reply.peak_bytes or 0) for reply in pool.map(run_worker, weighing)]
    measured = [
        _measurement("latency_ms", file, _summary(rounds), "ms", threads, count)
        for file, rounds, count in zip(files, timing.rounds_ms, timing.invocations, strict=True)
    ]
    if reference is not None:
        ratios = [slow / fast for fast, slow in zip(*timing.rounds_ms, strict=True)]
        measured.append(_measurement("speedup", candidate, _summary(ratios), "x", threads, len(ratios)))
    memory = [
        _measurement("peak_memory_bytes", file, (peak, None), "bytes", threads, MEMORY_RUNS)
        for file, peak in zip(files, peaks, strict=True)
    ]
    sizes = [
        _measurement("size_bytes", file, (float(file.path.stat().st_size), None), "bytes", None, None) for file in files
    ]
    return (*measured, *memory, *sizes)


def run_worker(request: Request, timeout_s: float = TIMEOUT_S) -> Reply:
    """Have a fresh process do the request. Raises as `benchmark_pair` does."""
    where = ", ".join(Path(file.path).name for file in request.files)
    # -P: a numpy.py in the working directory must not get in. The package may run from a checkout.
    command = [sys.executable, "-P", "-m", "edgeopt.validation.worker"]
    try:
        done = subprocess.run(
            command,
            input=dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=_environment(request.threads),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"measuring it did not end within {timeout_s:.0f} s", where=where) from error
    if done.returncode:
        raise ConversionError(f"measuring it failed: {_cause_of_death(done)}", where=where)
    reply = from_plain(Reply, loads(done.stdout, "benchmark process"), "benchmark process")
    if reply.failure is not None:
        kind = getattr(errors, reply.failure.kind, EdgeoptError)
        raise kind(reply.failure.problem, where=reply.failure.where, fix=reply.failure.fix)
    return reply


def _request_of(file: TimedFile, inputs: Path) -> FileRequest:
    names = tuple(tensor.name for tensor in file.signature.inputs)
    missing = [name for name in names if name not in file.inputs]
    if missing:
        raise UsageError(f"the sample lacks the input {missing[0]!r}", where=str(file.path))
    np.savez(inputs, *(file.inputs[name] for name in names))
    return FileRequest(str(file.path.resolve()), file.signature, RUNTIMES[file.runtime], str(inputs), names)


def _environment(threads: int) -> dict[str, str]:
    package_root = str(Path(errors.__file__).parents[1])
    search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(pools, str(threads)) | {"PYTHONPATH": os.pathsep.join(search_path)}


def _cause_of_death(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its runtime died of {name}{hint}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"its process ended with {done.returncode}"


def _summary(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (low, high)


def _measurement(
    name: str,
    file: TimedFile,
    value: tuple[float, tuple[float, float] | None],
    unit: str,
    threads: int | None,
    repetitions: int | None,
) -> Measurement:
    return Measurement(
        name=name,
        subject=file.subject,
        value=value[0],
        unit=unit,
        provenance="measured-host",
        runtime=file.runtime,
        threads=threads,
        repetitions=repetitions,
        spread=value[1],
    )
