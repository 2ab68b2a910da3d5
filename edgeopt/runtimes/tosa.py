"""TOSA's integer arithmetic, on Arm's reference model: what an Ethos-U computes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.formats.tosa import read
from edgeopt.runtimes.base import Session
from edgeopt.runtimes.tosa_convert import OTHERWISE, to_tosa
from edgeopt.runtimes.tosa_program import SUFFIX as PROGRAM_SUFFIX
from edgeopt.runtimes.tosa_program import open_program, run_graph
from edgeopt.types import Array, Format, Signature

#: Module -> distribution.
_PACKAGES = {
    "tosa_reference_model": "tosa-tools",
    "tosa_converter_for_tflite": "tosa-converter-for-tflite",
    "model_converter": "ai-ml-sdk-model-converter",
}


class TosaRuntime:
    """See `edgeopt.runtimes.base.Runtime`.

    It opens .tflite files, .tosa files (one TOSA flatbuffer whose inputs and outputs have the order and the types of
    the signature) and archives of such parts, see `tosa_program`. About a second for 0.4 G multiply-accumulates.
    """

    name = "tosa"
    formats: tuple[Format, ...] = ("litert", "executorch")
    emulates: str | None = "the NPU's integer arithmetic, on Arm's TOSA reference model"

    def unavailable(self) -> str | None:
        for module, distribution in _PACKAGES.items():
            if find_spec(module) is None:
                return MissingError.extra(distribution, "ethos-u", "the TOSA reference model").line()
        return None

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        del threads  # The reference model has one.
        if reason := self.unavailable():
            raise MissingError(reason, where="runtime tosa")
        if path.name.endswith(PROGRAM_SUFFIX):
            return open_program(path, signature)
        _check_static(path, signature)
        if path.suffix == ".tosa":
            inputs = tuple(tensor.name for tensor in signature.inputs)
            outputs = tuple(tensor.name for tensor in signature.outputs)
            return TosaSession(path, signature, path.read_bytes(), inputs, outputs)
        if path.suffix == ".tflite":
            found = to_tosa(path)
            ours = {tensor.native_name: tensor.name for tensor in (*signature.inputs, *signature.outputs)}
            try:
                inputs = tuple(ours[name] for name in found.inputs)
                outputs = tuple(ours[name] for name in found.outputs)
            except KeyError as error:
                raise ConversionError(f"the file has no tensor {error} in its signature", where=str(path)) from error
            return TosaSession(path, signature, found.graph, inputs, outputs)
        raise ConversionError("has no TOSA form", where=str(path), fix="give a .tflite or .tosa file")


class TosaSession(Session):
    """One TOSA graph.

    Args:
        inputs, outputs: names (`SignatureTensor.name`) in the graph's order.
    """

    def __init__(
        self, path: Path, signature: Signature, graph: bytes, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        super().__init__(signature)
        found = read(graph, str(path))
        if len(found.inputs) != len(inputs) or len(found.outputs) != len(outputs):
            told = f"has {len(found.inputs)} inputs and {len(found.outputs)} outputs"
            raise ConversionError(f"{told}, its signature {len(inputs)} and {len(outputs)}", where=str(path))
        self._graph: bytes | None = graph
        self._path = path
        self._inputs = tuple(zip(inputs, found.inputs, strict=True))
        self._outputs = tuple(zip(outputs, found.outputs, strict=True))

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._graph is None:
            raise RuntimeError("the session is closed")
        values = []
        for name, expected in self._inputs:
            value = inputs[name]
            if value.shape != expected.shape:
                told = f"has the shape {value.shape}, the file takes {expected.shape}"
                raise DataError(told, where=f"input {name!r}")
            values.append(value.astype(expected.dtype, copy=False))
        try:
            results = run_graph(self._graph, values, self._path)
        except DataError as error:  # Not the data's fault: what runs here was converted.
            raise ConversionError(error.problem, where=str(self._path), fix=OTHERWISE) from error
        return {name: result.reshape(made.shape) for (name, made), result in zip(self._outputs, results, strict=True)}

    def close(self) -> None:
        self._graph = None


def _check_static(path: Path, signature: Signature) -> None:
    for tensor in signature.inputs:
        free = next((size for size in tensor.shape if isinstance(size, str)), None)
        if free is not None:
            raise ConversionError(
                f"the input {tensor.name!r} has the dynamic dimension {free!r}, and TOSA graphs are static",
                where=str(path),
                fix="give it a fixed size",
            )
