"""Runs three small int8 models on the emulated phone, and compares with what the runtimes gave on x86-64.

Models, inputs and outputs are in edgeopt/native/selftest: one network of a convolution, a depthwise one and two matrix
products, exported with `edgeopt export --io int8` for each runtime.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgeopt.emulator.cores import Core, all_cores, core_for
from edgeopt.emulator.installation import Emulator, output_of
from edgeopt.errors import MissingError
from edgeopt.native import SOURCES
from edgeopt.progress import Progress
from edgeopt.types import Format

_DIRECTORY = SOURCES / "selftest"
#: Model, type of its input and output, shape of its input in the file's layout.
_MODELS: Mapping[Format, tuple[str, Literal["int8", "uint8"], str]] = {
    "litert": ("model.tflite", "int8", "1,16,16,3"),
    "onnx": ("model.onnx", "uint8", "1,3,16,16"),
    "executorch": ("model.pte", "int8", "1,3,16,16"),
}
#: Quantization steps. Another version of a runtime may round otherwise; wrong instructions are further off.
_TOLERANCE = 1
#: The cold inference, one more to warm up, two as timed ones.
_RUNS = 4
#: Where instructions are counted.
_COUNTED = "cortex-a76"


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing that was tried. `problem` is None where it works."""

    name: str
    problem: str | None


def trials(emulator: Emulator, progress: Progress) -> tuple[Trial, ...]:
    """Every runtime on one core of each level, and counting with every runtime. Seconds."""
    wanted = [(format_, core, False) for core in representatives() for format_ in _MODELS]
    wanted += [(format_, core_for(_COUNTED), True) for format_ in _MODELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda trial: _tried(emulator, *trial), wanted)
        return tuple(progress.track(done, "Trying the emulated phone", len(wanted)))


def check(emulator: Emulator, progress: Progress) -> None:
    """Raises MissingError naming the first trial that fails."""
    for trial in trials(emulator, progress):
        if trial.problem is not None:
            raise MissingError(trial.problem, where=f"self-test: {trial.name}", fix="please report it")


def representatives() -> Iterator[Core]:
    """The first core of each level in the table."""
    seen = set()
    for core in all_cores():
        if core.level not in seen:
            seen.add(core.level)
            yield core


def _tried(emulator: Emulator, format_: Format, core: Core, counting: bool) -> Trial:
    name = f"counting {format_}" if counting else f"{format_} on {core.title}"
    with tempfile.TemporaryDirectory(prefix="edgeopt-selftest-") as directory:
        scratch = Path(directory)
        counts = scratch / "counts.json"
        try:
            _run(emulator, format_, core, scratch, f"{emulator.counter},out={counts}" if counting else None)
        except MissingError as error:
            return Trial(name, error.problem)
        return Trial(name, _difference(format_, scratch) or (_miscount(counts) if counting else None))


def _run(emulator: Emulator, format_: Format, core: Core, scratch: Path, plugin: str | None) -> None:
    model, dtype, shape = _MODELS[format_]
    given = _DIRECTORY / f"{format_}_input.bin"
    program = [
        *(str(emulator.runner(format_)), str(_DIRECTORY / model), "--threads", "1", "--mark", "--warmup", "1"),
        *("--runs", "2", "--input", f"{given}:{dtype}:{shape}", "--output-dir", str(scratch)),
    ]
    output_of(emulator.command(core, program, plugin=plugin), format_)


def _difference(format_: Format, scratch: Path) -> str | None:
    dtype = _MODELS[format_][1]
    expected = np.fromfile(_DIRECTORY / f"{format_}_output.bin", dtype).astype(int)
    found = np.fromfile(scratch / "output_0.bin", dtype).astype(int)
    if found.shape != expected.shape:
        return f"gives {found.size} numbers instead of {expected.size}"
    furthest = int(abs(found - expected).max())
    return None if furthest <= _TOLERANCE else f"is off by {furthest} quantization steps"


def _miscount(counts: Path) -> str | None:
    inferences = [sum(inference) for inference in json.loads(counts.read_bytes())["inferences"]]
    if len(inferences) != _RUNS or 0 in inferences:
        return f"counted {inferences} instructions in {_RUNS} inferences"
    return None
