"""The fresh process in which files are timed and weighed: `python -m edgeopt.validation.worker`.

A request comes on stdin as JSON, the reply goes to stdout as JSON; both are dataclasses below. Whatever the vendor's
libraries print goes to stderr. The process holds nothing but the runtime and the files, so neither the memory nor the
threads of the program that asks have a part in the figures.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np

from edgeopt.errors import EdgeoptError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.runtimes.base import Runtime, Session
from edgeopt.types import Array, Signature

#: Length of one round of one file; long enough to average over the timer, short enough to meet the same conditions.
ROUND_S = 0.03
WARM_UP_S = 0.1
MIN_ROUNDS, MAX_ROUNDS, MAX_INVOCATIONS = 3, 400, 1000
#: Rounds stop early once the median is known this well (half its 95 % interval, relative), checked from this many on.
SETTLED, SETTLED_ROUNDS = 0.01, 20

MEMORY_RUNS = 5


@dataclass(frozen=True, slots=True)
class FileRequest:
    """One file to open: `runtime` is `module:Class`, `inputs` an .npz with the model's inputs as arr_0, arr_1..."""

    path: str
    signature: Signature
    runtime: str
    inputs: str
    input_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """`imports`: modules to load before memory is read first, so that libraries don't count as the model's."""

    task: Literal["latency", "memory"]
    files: tuple[FileRequest, ...]
    threads: int
    budget_s: float
    imports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """An `EdgeoptError` on its way to the process that asked."""

    kind: str
    problem: str
    where: str | None
    fix: str | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What was measured.

    Attributes:
        rounds_ms: per file, each round's median time of one invocation, in milliseconds; rounds of different files
            with the same index were taken right after each other.
        invocations: per file, how many were timed.
        peak_bytes: growth of the peak resident memory.
        modules: names of the modules on file that were loaded.
        failure: set when nothing was measured.
    """

    rounds_ms: tuple[tuple[float, ...], ...] = ()
    invocations: tuple[int, ...] = ()
    peak_bytes: int | None = None
    modules: tuple[str, ...] = ()
    failure: Failure | None = None


def time_rounds(
    sessions: Sequence[Session], inputs: Sequence[Mapping[str, Array]], budget_s: float
) -> tuple[list[list[float]], list[int]]:
    """Time the sessions in turn, round by round: A, B, A, B, ... so that each round of one has its neighbour of the
    other under the same clock and temperature.

    Returns per session the median time of an invocation in each round, in milliseconds, and the number timed.
    """
    pairs = list(zip(sessions, inputs, strict=True))
    counts = [_invocations_per_round(session, native) for session, native in pairs]
    rounds: list[list[float]] = [[] for _ in pairs]
    gc.collect()
    gc.disable()
    try:
        start = perf_counter()
        while not _enough(rounds, perf_counter() - start, budget_s):
            for (session, native), count, results in zip(pairs, counts, rounds, strict=True):
                results.append(_median_ms(session, native, count))
    finally:
        gc.enable()
    return rounds, [count * len(results) for count, results in zip(counts, rounds, strict=True)]


def _invocations_per_round(session: Session, native: Mapping[str, Array]) -> int:
    """Warm up, and see from it how many fill a round."""
    start = perf_counter()
    fastest = math.inf
    while True:
        before = perf_counter()
        session.run_native(native)
        now = perf_counter()
        fastest = min(fastest, now - before)
        if now - start >= WARM_UP_S:
            return min(max(int(ROUND_S / fastest), 1), MAX_INVOCATIONS)


def _median_ms(session: Session, native: Mapping[str, Array], count: int) -> float:
    times = []
    for _ in range(count):
        before = perf_counter()
        session.run_native(native)
        times.append(perf_counter() - before)
    return statistics.median(times) * 1e3


def _enough(rounds: Sequence[Sequence[float]], elapsed_s: float, budget_s: float) -> bool:
    done = len(rounds[0])
    if done < MIN_ROUNDS:
        return False
    if elapsed_s >= budget_s or done >= MAX_ROUNDS:
        return True
    return done >= SETTLED_ROUNDS and done % 5 == 0 and all(_is_settled(results) for results in rounds)


def _is_settled(results: Sequence[float]) -> bool:
    # 1.57 IQR / sqrt(n): McGill, Tukey and Larsen, "Variations of Box Plots", 1978.
    low, middle, high = statistics.quantiles(results, n=4)
    return 1.57 * (high - low) / math.sqrt(len(results)) <= SETTLED * middle


def _peak_growth(file: FileRequest, threads: int, opened: list[Session]) -> int:
    """Bytes by which opening a file and running it raises the process's peak resident memory."""
    inputs = _load_inputs(file)
    gc.collect()
    before = reset_peak()
    session = _open(file, threads)
    opened.append(session)
    native = session.encode(inputs)
    for _ in range(MEMORY_RUNS):
        session.run_native(native)
    return max(peak() - before, 0)


def reset_peak() -> int:
    """Make the peak equal to the memory in use now (Linux: clear_refs 5) where that is allowed, and return it.

    Where it isn't, the peak so far, which the imports made, is what the model has to exceed: a lower bound.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Peak resident bytes of this program.

    VmHWM rather than ru_maxrss: the latter survives exec, so a child of a large parent starts with the parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # macOS counts bytes, others kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _open(file: FileRequest, threads: int) -> Session:
    module, _, name = file.runtime.partition(":")
    runtime: Runtime = getattr(importlib.import_module(module), name)()
    return runtime.open(Path(file.path), file.signature, threads)


def _load_inputs(file: FileRequest) -> dict[str, Array]:
    with np.load(file.inputs, allow_pickle=False) as arrays:
        return {name: arrays[f"arr_{i}"] for i, name in enumerate(file.input_names)}


def modules_on_file() -> tuple[str, ...]:
    specs = {name: getattr(module, "__spec__", None) for name, module in list(sys.modules.items())}
    return tuple(name for name, spec in specs.items() if spec is not None and spec.has_location and name != "__main__")


def _serve(request: Request, opened: list[Session]) -> Reply:
    """Measure; sessions are left in `opened`, for a runtime that crashes while it closes must not lose the figures."""
    if request.task == "memory":
        for name in request.imports:
            # One that was loaded under an alias in the other process is in the list by its real name too.
            with suppress(ImportError):
                importlib.import_module(name)
        return Reply(peak_bytes=_peak_growth(request.files[0], request.threads, opened))
    opened += [_open(file, request.threads) for file in request.files]
    inputs = [s.encode(_load_inputs(file)) for s, file in zip(opened, request.files, strict=True)]
    rounds, invocations = time_rounds(opened, inputs, request.budget_s)
    return Reply(tuple(tuple(r) for r in rounds), tuple(invocations), modules=modules_on_file())


def respond(answer: Callable[[str, list[Session]], object], refuse: Callable[[Failure], object]) -> None:
    """Answer the one request on standard input, on what was standard output, and end the process.

    Args:
        answer: request -> reply; puts every session that it opens into the list, which keeps them to the end.
        refuse: the reply where that raised an error of ours.
    """
    reply_to = os.dup(1)
    os.dup2(2, 1)  # libraries print there
    opened: list[Session] = []
    try:
        reply = answer(sys.stdin.read(), opened)
    except EdgeoptError as error:
        reply = refuse(Failure(type(error).__name__, error.problem, error.where, error.fix))
    with os.fdopen(reply_to, "w") as stream:
        stream.write(dumps(reply))
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    respond(
        lambda text, opened: _serve(from_plain(Request, loads(text, "request"), "request"), opened),
        lambda failure: Reply(failure=failure),
    )


if __name__ == "__main__":
    main()
