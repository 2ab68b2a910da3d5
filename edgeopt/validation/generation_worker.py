"""The fresh process in which networks that write are timed and weighed, as `edgeopt.validation.worker` is for single
files: `python -m edgeopt.validation.generation_worker`. A request comes on stdin as JSON, the reply goes to stdout.
"""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np

from edgeopt.generation.writer import Writer, Written
from edgeopt.json_data import from_plain, loads
from edgeopt.runtimes.base import Runtime, Session
from edgeopt.types import Array, Generation, PartName, Signature
from edgeopt.validation.worker import Failure, modules_on_file, peak, reset_peak, respond

#: Sequences written for the memory figure; the first ones make a runtime allocate what it keeps.
MEMORY_SEQUENCES = 2
#: Pairs of sequences that are timed at least, however long they take.
MIN_SEQUENCES = 3


@dataclass(frozen=True, slots=True)
class PartRequest:
    path: str
    signature: Signature


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Networks to open, each a mapping of parts; `runtimes`: `module:Class` for each.

    Attributes:
        sources: .npz files, each with the inputs to write from by their names.
        imports: modules to load before memory is read first, so that libraries don't count as the network's.
    """

    task: Literal["time", "memory"]
    networks: tuple[dict[PartName, PartRequest], ...]
    runtimes: tuple[str, ...]
    generation: Generation
    beams: int
    length_penalty: float
    early_stopping: bool
    max_new: int | None
    sources: tuple[str, ...]
    threads: int
    budget_s: float
    imports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one sequence, in milliseconds; see `edgeopt.generation.writer.Written`."""

    reading_ms: float
    first_token_ms: float
    token_ms: tuple[float, ...]
    total_ms: float


@dataclass(frozen=True, slots=True)
class GenerationReply:
    """What was measured.

    Attributes:
        costs: per network, of each sequence; sequences with the same index are the same tokens, written right after
            each other.
        cache_bytes: per network.
        peak_bytes: growth of the peak resident memory.
        modules: names of the modules on file that were loaded.
        failure: set when nothing was measured.
    """

    costs: tuple[tuple[Cost, ...], ...] = ()
    cache_bytes: tuple[int, ...] = ()
    peak_bytes: int | None = None
    modules: tuple[str, ...] = ()
    failure: Failure | None = None


def time_in_turns(
    writers: list[Writer], sources: list[dict[str, Array]], max_new: int | None, budget_s: float
) -> tuple[tuple[Cost, ...], ...]:
    """Let the last network write, then all of them, in turns, what it wrote: the same work for each.

    Which one comes first changes with every sequence. Sources are taken round and round until the budget is used.
    """
    costs: list[list[Cost]] = [[] for _ in writers]
    originals: list[Written] = []
    gc.collect()
    gc.disable()
    try:
        start = perf_counter()
        done = 0
        while done < MIN_SEQUENCES or perf_counter() - start < budget_s:
            place = done % len(sources)
            if place == len(originals):
                originals.append(writers[-1].write(sources[place], max_new))
                if place == 0:  # what only the first run of a network does
                    for writer in writers:
                        writer.replay(sources[0], originals[0])
            for turn in range(len(writers)):
                network = (turn + done) % len(writers)
                again, _ = writers[network].replay(sources[place], originals[place])
                costs[network].append(Cost(again.reading_ms, again.first_token_ms, again.token_ms, again.total_ms))
            done += 1
    finally:
        gc.enable()
    return tuple(tuple(found) for found in costs)


def _serve(request: GenerationRequest, opened: list[Session]) -> GenerationReply:
    """Measure; sessions are left in `opened`, for a runtime that crashes while it closes must not lose the figures."""
    sources = [_load(path) for path in request.sources]
    if request.task == "memory":
        for name in request.imports:
            with suppress(ImportError):  # loaded under an alias in the other process
                importlib.import_module(name)
        gc.collect()
        before = reset_peak()
        writer = _open(request, 0, opened)
        for source in sources[:MEMORY_SEQUENCES]:
            writer.write(source, request.max_new)
        return GenerationReply(peak_bytes=max(peak() - before, 0))
    writers = [_open(request, index, opened) for index in range(len(request.networks))]
    costs = time_in_turns(writers, sources, request.max_new, request.budget_s)
    return GenerationReply(costs, tuple(w.cache_bytes for w in writers), modules=modules_on_file())


def _open(request: GenerationRequest, index: int, opened: list[Session]) -> Writer:
    module, _, name = request.runtimes[index].partition(":")
    runtime: Runtime = getattr(importlib.import_module(module), name)()
    sessions: dict[PartName, Session] = {}
    for part, file in request.networks[index].items():
        sessions[part] = runtime.open(Path(file.path), file.signature, request.threads)
        opened.append(sessions[part])
    return Writer(
        sessions,
        request.generation,
        request.beams,
        length_penalty=request.length_penalty,
        early_stopping=request.early_stopping,
    )


def _load(path: str) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def main() -> None:
    respond(
        lambda text, opened: _serve(from_plain(GenerationRequest, loads(text, "request"), "request"), opened),
        lambda failure: GenerationReply(failure=failure),
    )


if __name__ == "__main__":
    main()
