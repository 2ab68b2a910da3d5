"""What a model file holds and computes; exporters, runtimes and `inspect` all look through here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

from edgeopt.errors import UsageError
from edgeopt.types import FileSummary, Format

SUFFIXES: dict[str, Format] = {
    ".tflite": "litert",
    ".onnx": "onnx",
    ".pte": "executorch",
    ".mlpackage": "coreml",
}

READERS: dict[Format, str] = {
    "litert": "edgeopt.formats.litert",
    "onnx": "edgeopt.formats.onnx",
    "executorch": "edgeopt.formats.executorch",
    "coreml": "edgeopt.formats.coreml",
}


class Reader(Protocol):
    def summarize(self, path: Path) -> FileSummary: ...


def summarize(path: Path) -> FileSummary:
    """Read one model file. Raises UsageError when the suffix is unknown, the file is absent or it is corrupt."""
    format_ = SUFFIXES.get(path.suffix)
    if format_ is None:
        raise UsageError("is not a model file", where=str(path), fix=f"give one of {', '.join(SUFFIXES)}")
    if not (path.is_dir() if format_ == "coreml" else path.is_file()):
        raise UsageError("no such file", where=str(path))
    reader: Reader = import_module(READERS[format_])
    return reader.summarize(path)
