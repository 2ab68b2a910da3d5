"""The check from end to end: connect, copy, run, compare, measure, clean up."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import conditions, figures
from .contents import read
from .device import Device, Facts, Workspace
from .errors import MISSING, CheckError
from .finding import find
from .transport import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conditions import State
    from .contents import Contents, Stored, Vector
    from .programs import Figures, Program

#: Beyond the files themselves, for outputs and what programs write.
_SLACK_KB = 2048
_FEWEST_RUNS, _MOST_RUNS = 10, 5000


@dataclass(frozen=True)
class Settings:
    """What the flags say. `runs` None: as many as fit into `seconds`. `runner` and `benchmark` are files here."""

    adb: str | None = None
    ssh: str | None = None
    ssh_config: Path | None = None
    directory: str | None = None
    threads: int = 1
    cpus: str = "big"
    runs: int | None = None
    seconds: float = 5.0
    warmup: int = 5
    timeout: float = 120.0
    runner: Path | None = None
    benchmark: Path | None = None


@dataclass(frozen=True)
class Difference:
    """How far one output is from its golden vector, as a fraction of that one's range."""

    vector: int
    output: str
    value: float


@dataclass(frozen=True)
class Result:
    """What was found out. `differences` is None, with the reason in `not_checked`, where outputs can't be had."""

    contents: Contents
    transport: str
    facts: Facts
    program: str
    version: str | None
    settings: Settings
    cpus: tuple[int, ...]
    warmup: int
    differences: tuple[Difference, ...] | None
    timing: Figures
    before: State
    after: State
    throttling: tuple[str, ...]
    seconds: float
    not_checked: tuple[tuple[str, str], ...] = ()


def check(
    bundle: Path,
    settings: Settings,
    say: Callable[[str], None],
    supply: Callable[[Facts], Path | None] = lambda _: None,
) -> Result:
    """Check the bundle's model on a device. `say` is told of each step; `supply` may know a runner for a device for
    which `settings` names none.

    Raises CheckError with the exit code where it can't be done. Whatever happens, the device is left as it was, as far
    as it can still be reached.
    """
    contents = read(bundle)
    started = time.monotonic()
    transport = connect(settings.adb, settings.ssh, settings.directory, settings.ssh_config)
    try:
        device = Device(transport)
        facts = device.facts()
        say(f"{facts.name}, {facts.os_version or facts.os}, {facts.abi}, over {transport.kind}")
        _check_space(contents, facts, transport.name)
        with Workspace(device, facts) as workspace:
            if workspace.swept:
                say(f"removed what {workspace.swept} broken-off checks had left")
            say("copying the model")
            runner = settings.runner or (supply(facts) if settings.benchmark is None else None)
            program = find(contents, workspace, facts, settings.threads, runner, settings.benchmark)
            inputs = [
                [workspace.put(stored.path, f"in/{k}-{i}") for i, stored in enumerate(vector.inputs)]
                for k, vector in enumerate(contents.vectors)
            ]
            return _measure(contents, settings, facts, device, program, inputs, started, say)
    finally:
        transport.close()


def _check_space(contents: Contents, facts: Facts, name: str) -> None:
    files = [contents.model, *(stored.path for vector in contents.vectors for stored in vector.inputs)]
    needed = sum(path.stat().st_size for path in files) // 1024 + _SLACK_KB
    if facts.free_kb is not None and facts.free_kb < needed:
        raise CheckError(
            f"no space left on {name}: the check needs {needed / 1024:.1f} MiB, {facts.free_kb / 1024:.1f} are free; "
            "free some, or name another --directory", MISSING
        )  # fmt: skip


def _measure(
    contents: Contents,
    settings: Settings,
    facts: Facts,
    device: Device,
    program: Program,
    inputs: list[list[str]],
    started: float,
    say: Callable[[str], None],
) -> Result:
    before = conditions.look(device)
    not_checked: list[tuple[str, str]] = []
    cpus = conditions.choose_cpus(settings.cpus, before, settings.threads)
    if cpus and "taskset" not in facts.tools:
        not_checked.append(("affinity", "the device has no taskset; it ran on whatever cores the system chose"))
        cpus = ()
    mask = conditions.mask(cpus)
    differences, slowest = _golden(contents, settings, program, inputs, mask, say)
    if differences is None:
        not_checked.append(("golden", f"{program.name} does not write outputs; give --runner"))
    runs = settings.runs or _runs_for(settings.seconds, slowest)
    say(f"timing {runs} runs")
    limit = settings.timeout + settings.seconds
    timing = program.run(contents.vectors[0], inputs[0], settings.warmup, runs, mask, limit)
    after = conditions.look(device)
    if not timing.latencies_ms and "p50" not in timing.summary_ms:
        not_checked.append(("p50", f"{program.name} tells no median, the mean stands for it"))
    if facts.emulated:
        not_checked.append(("latency_ms", "this is Android's emulator; its times are not those of a device"))
    if timing.peak_bytes is None:
        not_checked.append(("peak_memory_bytes", f"{program.name} does not tell"))
    return Result(
        contents=contents,
        transport=device.transport.kind,
        facts=facts,
        program=program.name,
        version=program.version,
        settings=settings,
        cpus=cpus,
        warmup=settings.warmup,
        differences=differences,
        timing=timing,
        before=before,
        after=after,
        throttling=(*conditions.capped(before), *conditions.throttling(before, after, timing.latencies_ms)),
        seconds=time.monotonic() - started,
        not_checked=tuple(not_checked),
    )


def _golden(
    contents: Contents,
    settings: Settings,
    program: Program,
    inputs: list[list[str]],
    mask: str,
    say: Callable[[str], None],
) -> tuple[tuple[Difference, ...] | None, float | None]:
    """Every golden vector's differences, None where no outputs come; and how long one inference took at most, in ms."""
    differences: list[Difference] = []
    times: list[float] = []
    for number, vector in enumerate(contents.vectors):
        say(f"golden vector {number + 1} of {len(contents.vectors)}")
        found = program.run(vector, inputs[number], 0, 1, mask, settings.timeout)
        times += found.latencies_ms or found.summary_ms.values()
        if found.outputs is None:
            return None, max(times, default=None)
        differences += _compare(number, vector, found.outputs)
    return tuple(differences), max(times, default=None)


def _compare(number: int, vector: Vector, outputs: tuple[bytes, ...]) -> list[Difference]:
    return [
        Difference(number, stored.tensor.name, _difference(stored, raw)) for stored, raw in zip(vector.outputs, outputs)
    ]


def _difference(stored: Stored, raw: bytes) -> float:
    """Infinite where the output has another size than the golden one."""
    if len(raw) != stored.size_bytes:
        return math.inf
    dtype = stored.tensor.dtype
    return figures.deviation(figures.decode(raw, dtype), figures.decode(stored.path.read_bytes(), dtype))


def _runs_for(seconds: float, one_ms: float | None) -> int:
    if not one_ms or one_ms <= 0:
        return _FEWEST_RUNS
    return max(_FEWEST_RUNS, min(_MOST_RUNS, int(seconds * 1e3 / one_ms)))
