"""What one entry of the study came to: read off its bundle, and kept as JSON."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeopt.bundle.generation_contents import WrittenExample
from edgeopt.bundle.generation_reader import GenerationBundle
from edgeopt.case_studies.whole_file import write_whole
from edgeopt.errors import ConversionError, MissingError, UsageError
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.progress import Progress
from edgeopt.types import Array, Measurement, PartName, Report

#: Whose instructions are counted: a phone's large core of 2018, the oldest with int8 dot products.
CORE = "cortex-a76"
_FLOAT = "float"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its quartiles, where it was measured more than once."""

    value: float
    unit: str
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of one entry.

    Attributes:
        key: see `edgeopt.case_studies.entries.key_of`.
        passed: whether the gates of its run held.
        files: model file, relative to the bundle -> its SHA-256.
        packed_bytes: of these files, each compressed by DEFLATE as a .zip or .apk does.
        shipped: name of a measurement -> figure, on this machine.
        teacher: the same of the teacher's float files in the same run, taken in turns with the shipped ones.
        instructions: of one run of each part on an emulated `CORE`.
        not_counted: why these are missing; None where they are not.
    """

    entry: str
    key: str
    target: str
    runtime: str
    passed: bool
    files: Mapping[str, str]
    size_bytes: int
    packed_bytes: int
    shipped: Mapping[str, Figure]
    teacher: Mapping[str, Figure]
    instructions: Mapping[PartName, int]
    not_counted: str | None
    examples: tuple[WrittenExample, ...]


def read_outcome(entry: str, key: str, bundle: GenerationBundle, progress: Progress) -> Outcome:
    """What the bundle's report tells, its sizes, and instructions where they can be counted."""
    report = bundle.report()
    files = {
        f"{part}/{name}": item.sha256
        for part, loaded in bundle.parts.items()
        for name, item in loaded.manifest.files.items()
        if _is_model(name, loaded.manifest.model.file)
    }
    shipped = _figures(report, of_teacher=False)
    instructions, not_counted = _instructions(bundle, progress)
    return Outcome(
        entry=entry,
        key=key,
        target=bundle.target.name,
        runtime=report.runtime,
        passed=report.status == "passed",
        files=files,
        size_bytes=bundle.size_bytes,
        packed_bytes=sum(_packed(bundle.path / name) for name in files),
        shipped=shipped or _figures(report, of_teacher=True),
        teacher=_figures(report, of_teacher=True),
        instructions=instructions,
        not_counted=not_counted,
        examples=bundle.examples(),
    )


def save_outcome(outcome: Outcome, directory: Path) -> None:
    write_whole(directory / f"{outcome.key}.json", dumps(outcome))


def load_outcome(key: str, directory: Path) -> Outcome | None:
    """What was kept under that key; None where there is nothing, or nothing that can be read."""
    path = directory / f"{key}.json"
    try:
        return from_plain(Outcome, loads(path.read_bytes(), str(path)), str(path))
    except (OSError, UsageError):
        return None


def _is_model(name: str, model: str) -> bool:
    """Whether that file of a bundle is the shipped model, or belongs to it where that is a folder."""
    return name == model or name.startswith(f"{model}/")


def _figures(report: Report, *, of_teacher: bool) -> dict[str, Figure]:
    chosen = (m for m in report.measurements if (m.subject == _FLOAT) is of_teacher and _is_of_this_machine(m))
    return {m.name: Figure(m.value, m.unit, m.spread) for m in chosen}


def _is_of_this_machine(measurement: Measurement) -> bool:
    return measurement.provenance == "measured-host"


def _packed(path: Path) -> int:
    packer, size = zlib.compressobj(9), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def _instructions(bundle: GenerationBundle, progress: Progress) -> tuple[dict[PartName, int], str | None]:
    """Of each part, or none and why: the bundle is made and proven, and must not be lost for want of a count."""
    from edgeopt.emulator.cores import core_for
    from edgeopt.emulator.counting import count

    counts: dict[PartName, int] = {}
    for part, loaded in bundle.parts.items():
        inputs = {tensor.name: _any_input(tensor.shape, tensor.dtype) for tensor in loaded.signature.inputs}
        progress.step(f"Counting instructions of the {part}")
        try:
            counted = count(loaded.runnable_path, bundle.format, loaded.signature, inputs, core_for(CORE))
        except (MissingError, ConversionError) as error:
            return {}, error.line()
        counts[part] = counted.total
    return counts, None


def _any_input(shape: tuple[int | str, ...], dtype: str) -> Array:
    """Ones: valid as tokens, as a position and as a mask that hides nothing. Dense kernels do the same work for any
    values."""
    sizes = [size if isinstance(size, int) else 1 for size in shape]
    values: Array = np.ones(sizes, dtype)
    return values
