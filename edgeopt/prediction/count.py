"""What the operators of a file ask of a processor, read without running it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from edgeopt.errors import UsageError
from edgeopt.prediction.work import FileWork
from edgeopt.types import Format

READERS: dict[Format, str] = {
    "litert": "edgeopt.prediction.count_litert",
    "onnx": "edgeopt.prediction.count_onnx",
    "executorch": "edgeopt.prediction.count_executorch",
}


class Reader(Protocol):
    def count(self, path: Path) -> FileWork: ...


def count(path: Path, format_: Format) -> FileWork:
    """The work of each operator. Raises UsageError where the file is corrupt, or its format is not one for CPUs."""
    if format_ not in READERS:
        raise UsageError(
            f"is {format_}, which decides on the device which of its processors runs what",
            where=str(path),
            fix="measure it there: no CPU latency can be told",
        )
    reader: Reader = import_module(READERS[format_])
    return reader.count(path)
