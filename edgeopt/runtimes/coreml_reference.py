"""The program of an .mlpackage, run by our own interpreter: what the file computes, on machines without Core ML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, DataError, MissingError, UsageError
from edgeopt.formats.coreml_program import DAMAGE, missing, read_program
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Format, Signature

if TYPE_CHECKING:
    from edgeopt.formats.coreml_interpreter import Interpreter


class CoreMLReference:
    """Runs .mlpackage files operator by operator. See `edgeopt.runtimes.base.Runtime`.

    What it models and what it doesn't is told in `edgeopt.formats.coreml_interpreter`.
    """

    name = "coreml-reference"
    formats: tuple[Format, ...] = ("coreml",)
    emulates: str | None = (
        "not executed by Core ML: the file's own operators and weights in reference arithmetic, fp16 results rounded"
    )

    def unavailable(self) -> str | None:
        return missing()

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        if (reason := self.unavailable()) is not None:
            raise MissingError(reason)
        try:
            program = read_program(path)
        except UsageError as error:
            raise ConversionError(error.problem, where=error.where, fix=error.fix) from error
        import torch

        from edgeopt.formats.coreml_interpreter import Interpreter

        torch.set_num_threads(threads)
        try:
            return _Session(Interpreter(program), path, signature)
        except DAMAGE as error:  # weights are read only now
            raise ConversionError("is corrupt or truncated", where=str(path), fix="export it again") from error


class _Session(Session):
    def __init__(self, interpreter: Interpreter, path: Path, signature: Signature) -> None:
        super().__init__(signature)
        self._interpreter: Interpreter | None = interpreter
        self._path = path

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._interpreter is None:
            raise DataError("the session is closed", where=self._path.name)
        for tensor in self.signature.inputs:
            shape = inputs[tensor.name].shape
            fits = len(shape) == len(tensor.shape) and all(
                isinstance(want, str) or want == have for want, have in zip(tensor.shape, shape, strict=True)
            )
            if not fits:
                raise DataError(f"has shape {shape}, the model takes {tensor.shape}", where=f"input {tensor.name!r}")
        found = self._interpreter.run({t.native_name: inputs[t.name] for t in self.signature.inputs})
        return {t.name: found[t.native_name] for t in self.signature.outputs}

    def close(self) -> None:
        self._interpreter = None
