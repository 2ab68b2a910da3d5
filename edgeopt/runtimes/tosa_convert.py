"""A .tflite file -> a TOSA flatbuffer, by Arm's converters."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import ConversionError
from edgeopt.formats.litert import readable
from edgeopt.runtimes.tosa_mlir import foreign, io_names, repaired
from edgeopt.runtimes.tosa_tables import with_wide_tables

#: Both converters take a second for a network of some megabytes.
_TIME_LIMIT_S = 900
_TO_MLIR = ("-m", "tosa_converter_for_tflite.cli", "--text", "--emit-debug-info")
_TO_FLATBUFFER = ("-c", "import sys; from model_converter.cli import main; sys.exit(main())", "--tosa-flatbuffer")
_ERROR = re.compile(r'(?:loc\("(?P<tensor>[^"]*)"\(.*)?error: (?P<said>.*)', re.IGNORECASE)
#: What to do about a file that TOSA can't express.
OTHERWISE = "take the runtime litert-reference, which has LiteRT's own kernels"


@dataclass(frozen=True, slots=True)
class Converted:
    """A TOSA flatbuffer with the .tflite file's names of its inputs and outputs, in the graph's order."""

    graph: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def to_tosa(path: Path) -> Converted:
    """Convert one .tflite file. The converters run in processes of their own: MLIR aborts on what it can't take.

    Raises ConversionError naming the first operator that has no TOSA form, or what the converters say.
    """
    with tempfile.TemporaryDirectory(prefix="tosa-") as scratch:
        mlir, flatbuffer = Path(scratch) / "program.mlir", Path(scratch) / "program.tosa"
        _run(path, [*_TO_MLIR, str(path.resolve()), "-o", str(mlir)])
        if not mlir.is_file():
            raise ConversionError("the TOSA converter wrote no file", where=str(path))
        text = mlir.read_text(encoding="utf-8", errors="replace")
        left = foreign(text)
        if left is not None:
            where = f"{path}: {left.kind} {readable(left.tensor)!r}"
            raise ConversionError("the operator has no TOSA form", where=where, fix=OTHERWISE)
        try:
            inputs, outputs = io_names(text)
        except ValueError as error:
            raise ConversionError(f"the TOSA converter's program has {error}", where=str(path)) from error
        mlir.write_text(with_wide_tables(repaired(text)), encoding="utf-8")
        _run(path, [*_TO_FLATBUFFER, "-i", str(mlir), "-o", str(flatbuffer)])
        if not flatbuffer.is_file() or flatbuffer.stat().st_size == 0:
            raise ConversionError("the TOSA serializer wrote no file, or an empty one", where=str(path))
        return Converted(flatbuffer.read_bytes(), tuple(inputs), tuple(outputs))


def _run(path: Path, arguments: list[str]) -> None:
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIME_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        minutes = _TIME_LIMIT_S // 60
        raise ConversionError(f"the TOSA converter did not finish in {minutes} minutes", where=str(path)) from error
    if done.returncode != 0:
        raise _refusal(path, (*done.stdout.splitlines(), *done.stderr.splitlines()), done.returncode)


def _refusal(path: Path, lines: tuple[str, ...], code: int) -> ConversionError:
    """The converter's first error; where it gives a place, that is the tensor which the operator makes."""
    found = next((match for line in lines if (match := _ERROR.search(line))), None)
    if found is None:
        return ConversionError(f"has no TOSA form: exit code {code}", where=str(path), fix=OTHERWISE)
    tensor = found["tensor"]
    where = str(path) if tensor is None else f"{path}: {readable(tensor)!r}"
    return ConversionError(f"has no TOSA form: {found['said'].strip()}", where=where, fix=OTHERWISE)
