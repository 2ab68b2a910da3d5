"""LiteRT on this machine's CPU: XNNPACK kernels where they exist, LiteRT's own elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.runtimes.base import Session
from edgeopt.runtimes.litert_profile import profile
from edgeopt.types import Array, Format, OpTiming, Signature, SignatureTensor

if TYPE_CHECKING:
    from ai_edge_litert import interpreter as litert


class LiteRTRuntime:
    """See `edgeopt.runtimes.base.Runtime`. The default delegate (XNNPACK, static and dynamic int8 included) is on."""

    name = "litert"
    formats: tuple[Format, ...] = ("litert",)
    emulates: str | None = None

    def unavailable(self) -> str | None:
        if find_spec("ai_edge_litert") is None:
            return "the package ai-edge-litert is not installed; pip install ai-edge-litert"
        return None

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        reason = self.unavailable()
        if reason:
            raise MissingError(reason, where="runtime litert")
        from ai_edge_litert import interpreter as litert

        try:
            interpreter = litert.Interpreter(str(path), num_threads=threads)
            return LiteRTSession(interpreter, signature, path, threads)
        except (ValueError, RuntimeError) as error:
            raise ConversionError(f"LiteRT refuses the file: {error}", where=str(path)) from error


class LiteRTSession(Session):
    """Feeds tensors by index: a signature runner adds a dictionary and a lock per call."""

    def __init__(self, interpreter: litert.Interpreter, signature: Signature, path: Path, threads: int) -> None:
        super().__init__(signature)
        self._interpreter: litert.Interpreter | None = interpreter
        self._path, self._threads = path, threads
        interpreter.allocate_tensors()
        runner = interpreter.get_signature_runner() if interpreter.get_signature_list() else None
        inputs = runner.get_input_details().values() if runner else interpreter.get_input_details()
        outputs = runner.get_output_details().values() if runner else interpreter.get_output_details()
        names = list(runner.get_input_details()) if runner else [d["name"] for d in inputs]
        output_names = list(runner.get_output_details()) if runner else [d["name"] for d in outputs]
        indices = {name: d["index"] for name, d in zip(names, inputs, strict=True)}
        output_indices = {name: d["index"] for name, d in zip(output_names, outputs, strict=True)}
        self._inputs = [(t, indices[t.native_name]) for t in signature.inputs]
        self._outputs = [(t.name, output_indices[t.native_name]) for t in signature.outputs]
        self._shapes = {d["index"]: tuple(int(n) for n in d["shape"]) for d in inputs}

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        interpreter = self._interpreter
        if interpreter is None:
            raise RuntimeError("the session is closed")
        resized = [index for t, index in self._inputs if self._resize(interpreter, t, index, inputs[t.name].shape)]
        if resized:
            interpreter.allocate_tensors()
        for tensor, index in self._inputs:
            interpreter.set_tensor(index, inputs[tensor.name])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in self._outputs}

    def _resize(
        self, interpreter: litert.Interpreter, tensor: SignatureTensor, index: int, shape: tuple[int, ...]
    ) -> bool:
        if shape == self._shapes[index]:
            return False
        fits = len(shape) == len(tensor.shape) and all(
            isinstance(expected, str) or expected == size for expected, size in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise DataError(f"has the shape {shape}, the file takes {tensor.shape}", where=f"input {tensor.name!r}")
        interpreter.resize_tensor_input(index, shape)
        self._shapes[index] = shape
        return True

    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        """Median time per operator from LiteRT's profiler, which runs the file once more in its own instance."""
        native = self.encode(inputs)
        return profile(self._path, self.signature, native, self._threads, repetitions)

    def close(self) -> None:
        self._interpreter = None
