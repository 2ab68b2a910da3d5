"""Programs of which an accelerator takes only parts: TOSA graphs, and between them ExecuTorch's portable kernels.

An archive holds the parts and `program.json`:

    {"inputs": [name, ...], "outputs": [name, ...],
     "steps": [{"file": "000.tosa", "reads": [name, ...], "makes": [name or "", ...]}, ...]}

Steps run in their order. Values that nothing reads have the name "".
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Signature

if TYPE_CHECKING:
    from executorch.runtime import Method, Program

SUFFIX = ".tosa.zip"
#: More than any model that the accelerators take; keeps a hostile archive from filling the memory.
_LARGEST_PART = 1 << 31
#: Places of the fields in the flatbuffer table `Version` of TOSA's schema (tosa.fbs).
_MINOR_FIELD, _DRAFT_FIELD = 6, 10


@dataclass(frozen=True, slots=True)
class _Step:
    file: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def open_program(path: Path, signature: Signature) -> Session:
    """Open an archive of TOSA graphs and portable programs; inputs and outputs in the order of the signature.

    Raises:
        UsageError: the archive is damaged.
        ConversionError: ExecuTorch's runtime refuses a part.
    """
    return _ProgramSession(path, signature)


def tosa_graphs(path: Path) -> tuple[bytes, ...]:
    """The TOSA flatbuffers of a program, in the order in which they run: one of a .tosa file, several of an archive.

    Raises UsageError when the archive is damaged.
    """
    if not path.name.endswith(SUFFIX):
        return (path.read_bytes(),)
    return tuple(_open(path).graphs.values())


@dataclass(frozen=True, slots=True)
class _Archive:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[_Step, ...]
    parts: Mapping[str, bytes]

    @property
    def graphs(self) -> dict[str, bytes]:
        return {step.file: self.parts[step.file] for step in self.steps if step.file.endswith(".tosa")}


def _open(path: Path) -> _Archive:
    try:
        with zipfile.ZipFile(path) as archive:
            content = json.loads(_read(archive, "program.json"))
            steps = tuple(
                _Step(str(s["file"]), tuple(map(str, s["reads"])), tuple(map(str, s["makes"])))
                for s in content["steps"]
            )
            return _Archive(
                inputs=tuple(map(str, content["inputs"])),
                outputs=tuple(map(str, content["outputs"])),
                steps=steps,
                parts={step.file: _read(archive, step.file) for step in steps},
            )
    except (zipfile.BadZipFile, ValueError, LookupError, TypeError, OSError) as error:
        raise UsageError("is not a readable TOSA program", where=str(path), fix="export it again") from error


class _ProgramSession(Session):
    def __init__(self, path: Path, signature: Signature) -> None:
        super().__init__(signature)
        self._path = path
        self._closed = False
        self._archive = _open(path)
        self._graphs = self._archive.graphs
        others = (step.file for step in self._archive.steps if step.file not in self._graphs)
        self._methods = {name: _load(self._archive.parts[name], path) for name in others}
        found = len(self._archive.inputs), len(self._archive.outputs)
        if found != (len(signature.inputs), len(signature.outputs)):
            told = f"has {found[0]} inputs and {found[1]} outputs"
            raise ConversionError(
                f"{told}, its signature {len(signature.inputs)} and {len(signature.outputs)}", where=str(path)
            )

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._closed:
            raise DataError("the session is closed", where=self._path.name)
        values = {name: inputs[t.name] for name, t in zip(self._archive.inputs, self.signature.inputs, strict=True)}
        for step in self._archive.steps:
            arguments = [values[name] for name in step.reads]
            if step.file in self._graphs:
                results = run_graph(self._graphs[step.file], arguments, self._path)
            else:
                results = _execute(self._methods[step.file][1], arguments, self._path)
            values |= {name: value for name, value in zip(step.makes, results, strict=False) if name}
        return {t.name: values[name] for name, t in zip(self._archive.outputs, self.signature.outputs, strict=True)}

    def close(self) -> None:
        self._closed = True
        self._methods = {}
        self._graphs = {}


def run_graph(graph: bytes, inputs: list[Array], path: Path) -> list[Array]:
    """One TOSA graph on the reference model. Raises DataError naming the file when it does not run."""
    import tosa_reference_model

    try:
        outputs, status = tosa_reference_model.run(
            _as_of_today(graph),
            [np.ascontiguousarray(values) for values in inputs],
            initialize_variable_tensor_from_numpy=1,
        )
    except (ValueError, RuntimeError) as error:
        raise DataError(f"the TOSA reference model could not run it ({error})", where=path.name) from error
    if status != tosa_reference_model.GraphStatus.TOSA_VALID:
        raise DataError(f"the TOSA reference model calls the graph {status.name}", where=path.name)
    return list(outputs)


def _as_of_today(graph: bytes) -> bytes:
    """The graph, said to be of the TOSA version that the reference model has.

    It runs older minor versions, to which newer ones only add, but tells so on the standard output at every run.
    """
    import tosa_serializer
    from tosa.TosaGraph import TosaGraph

    version = TosaGraph.GetRootAs(graph, 0).Version()
    newest = tosa_serializer.TOSA_VERSION_MINOR
    if version is None or version._Major() != tosa_serializer.TOSA_VERSION_MAJOR or version._Minor() >= newest:
        return graph
    table = version._tab
    minor, draft = table.Offset(_MINOR_FIELD), table.Offset(_DRAFT_FIELD)
    if not minor or not draft:  # left out where it has its default
        return graph
    stamped = bytearray(graph)
    stamped[table.Pos + minor : table.Pos + minor + 4] = newest.to_bytes(4, "little")
    stamped[table.Pos + draft] = bool(tosa_serializer.TOSA_VERSION_DRAFT)
    return bytes(stamped)


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > _LARGEST_PART:
        raise ValueError(f"{name} is too large")
    return archive.read(name)


def _load(data: bytes, path: Path) -> tuple[Program, Method]:
    """The method lives as long as its program does."""
    from executorch.kernels import quantized  # noqa: F401 - registers the kernels that quantize and dequantize
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(data)
        method = program.load_method("forward")
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConversionError(f"ExecuTorch refuses a part of the program ({error})", where=str(path)) from error
    if method is None:
        raise ConversionError("a part of the program has no method 'forward'", where=str(path))
    return program, method


def _execute(method: Method, inputs: list[Array], path: Path) -> list[Array]:
    import torch

    try:
        results = method.execute([torch.from_numpy(np.array(values)) for values in inputs])
    except RuntimeError as error:
        raise DataError(f"ExecuTorch could not run a part of it ({error})", where=path.name) from error
    return [result.numpy().copy() for result in results]
