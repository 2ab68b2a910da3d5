"""Time, memory and size of networks that write, measured in fresh processes on this host."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgeopt import errors
from edgeopt.errors import ConversionError, EdgeoptError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.runtimes import RUNTIMES
from edgeopt.types import Array, Artifact, Generation, Measurement, PartName
from edgeopt.validation.generation_worker import Cost, GenerationReply, GenerationRequest, PartRequest

BUDGET_S = 5.0
TIMEOUT_S = 3600.0
Parts = Mapping[PartName, Artifact]


@dataclass(frozen=True, slots=True)
class TimedNetwork:
    """One network to measure: `subject` is what `Measurement.subject` calls it, `runtime` a name in `RUNTIMES`."""

    subject: str
    parts: Parts
    runtime: str


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which networks are measured; see `edgeopt.generation.writer.Writer`. `budget_s`: seconds of timing."""

    generation: Generation
    beams: int
    length_penalty: float
    early_stopping: bool
    max_new: int | None
    threads: int
    budget_s: float = BUDGET_S


def benchmark_generation(
    candidate: TimedNetwork,
    reference: TimedNetwork | None,
    sources: Sequence[Mapping[str, Array]],
    conditions: Conditions,
) -> tuple[Measurement, ...]:
    """Measure one network, or two at the same work.

    Both write the tokens that the reference wrote by itself (the candidate where there is none), in turns, in one
    process: a network that stops early is not faster for it. Over all sequences, with quartiles:
    `latency_ms` of a whole sequence; `encoder_latency_ms` or `prefill_latency_ms`; `time_to_first_token_ms`, which
    that is part of; `decoder_step_ms` of a later token; `tokens_per_second` of the tokens behind the first.
    `speedup` is the median of reference / candidate over whole sequences.
    `peak_memory_bytes` is by how much opening all parts and writing raises the peak resident memory of a process that
    has imported the runtime already; `cache_bytes`, within it, what the loop holds for the decoder. `size_bytes` is
    the sum over the parts.

    Args:
        sources: inputs to write from; at least one.

    Raises:
        MissingError: when the runtime is not on this machine.
        ConversionError: when the runtime refuses a file, or its process dies or does not end.
    """
    networks = (candidate,) if reference is None else (candidate, reference)
    with TemporaryDirectory(prefix="edgeopt-benchmark-") as folder:
        request = _request(networks, sources, conditions, Path(folder))
        timing = _ask(request)
        weighing = [
            replace(request, task="memory", networks=(parts,), runtimes=(runtime,), imports=timing.modules)
            for parts, runtime in zip(request.networks, request.runtimes, strict=True)
        ]
        # Unlike time, memory is not disturbed by another process beside it.
        with ThreadPoolExecutor(len(weighing)) as pool:
            peaks = [float(reply.peak_bytes or 0) for reply in pool.map(_ask, weighing)]
    measured: list[Measurement] = []
    for network, costs in zip(networks, timing.costs, strict=True):
        measured += _times(network, costs, conditions)
    if reference is not None:
        ratios = [slow.total_ms / fast.total_ms for fast, slow in zip(*timing.costs, strict=True)]
        measured.append(_spread("speedup", candidate, ratios, "x", conditions.threads))
    for network, peak, cache in zip(networks, peaks, timing.cache_bytes, strict=True):
        measured.append(_exact("peak_memory_bytes", network, peak, conditions.threads))
        measured.append(_exact("cache_bytes", network, float(cache)))
    return (*measured, *sizes(networks))


def sizes(networks: Sequence[TimedNetwork]) -> tuple[Measurement, ...]:
    """The files of each network together."""
    return tuple(_exact("size_bytes", network, float(total_size(network.parts))) for network in networks)


def total_size(parts: Parts) -> int:
    return sum(artifact.size_bytes for artifact in parts.values())


def _request(
    networks: Sequence[TimedNetwork], sources: Sequence[Mapping[str, Array]], conditions: Conditions, folder: Path
) -> GenerationRequest:
    files = [folder / f"{index}.npz" for index in range(len(sources))]
    for file, inputs in zip(files, sources, strict=True):
        arrays: dict[str, Array] = dict(inputs)
        np.savez(file, allow_pickle=False, **arrays)
    return GenerationRequest(
        task="time",
        networks=tuple(
            {part: PartRequest(str(file.path.resolve()), file.signature) for part, file in network.parts.items()}
            for network in networks
        ),
        runtimes=tuple(RUNTIMES[network.runtime] for network in networks),
        generation=conditions.generation,
        beams=conditions.beams,
        length_penalty=conditions.length_penalty,
        early_stopping=conditions.early_stopping,
        max_new=conditions.max_new,
        sources=tuple(str(file) for file in files),
        threads=conditions.threads,
        budget_s=conditions.budget_s,
    )


def _ask(request: GenerationRequest) -> GenerationReply:
    where = ", ".join(sorted({Path(part.path).name for parts in request.networks for part in parts.values()}))
    # -P: a numpy.py in the working directory must not get in. The package may run from a checkout.
    command = [sys.executable, "-P", "-m", "edgeopt.validation.generation_worker"]
    package_root = str(Path(errors.__file__).parents[1])
    search_path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
    pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(request.threads))
    try:
        done = subprocess.run(
            command,
            input=dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            env=os.environ | pools | {"PYTHONPATH": search_path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"measuring it did not end within {TIMEOUT_S:.0f} s", where=where) from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        cause = lines[-1] if lines and done.returncode > 0 else f"its process ended with {done.returncode}"
        raise ConversionError(f"measuring it failed: {cause}", where=where)
    reply = from_plain(GenerationReply, loads(done.stdout, "benchmark process"), "benchmark process")
    if reply.failure is not None:
        kind = getattr(errors, reply.failure.kind, EdgeoptError)
        raise kind(reply.failure.problem, where=reply.failure.where, fix=reply.failure.fix)
    return reply


def _times(network: TimedNetwork, costs: Sequence[Cost], conditions: Conditions) -> list[Measurement]:
    reading = "encoder_latency_ms" if conditions.generation.kind == "encoder-decoder" else "prefill_latency_ms"
    figures: dict[str, Callable[[Cost], float]] = {
        "latency_ms": lambda cost: cost.total_ms,
        "time_to_first_token_ms": lambda cost: cost.first_token_ms,
        reading: lambda cost: cost.reading_ms,
    }
    measured = [
        _spread(name, network, [figure(cost) for cost in costs], "ms", conditions.threads)
        for name, figure in figures.items()
    ]
    later = [cost.token_ms for cost in costs if cost.token_ms]
    if later:  # texts of a single token have none
        steps = [step for steps in later for step in steps]
        rates = [1e3 * len(steps) / sum(steps) for steps in later]
        measured.append(_spread("decoder_step_ms", network, steps, "ms", conditions.threads))
        measured.append(_spread("tokens_per_second", network, rates, "tokens/s", conditions.threads))
    return measured


def _spread(name: str, network: TimedNetwork, values: Sequence[float], unit: str, threads: int) -> Measurement:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return Measurement(
        name, network.subject, middle, unit, "measured-host", network.runtime, threads, len(values), (low, high)
    )


def _exact(name: str, network: TimedNetwork, value: float, threads: int | None = None) -> Measurement:
    return Measurement(name, network.subject, value, "bytes", "measured-host", network.runtime, threads)
