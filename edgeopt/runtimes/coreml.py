"""Core ML itself, on a Mac."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.formats.coreml_program import missing, quiet_coremltools
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Format, Signature

if TYPE_CHECKING:
    from coremltools.models import MLModel


class CoreMLRuntime:
    """Runs .mlpackage files on the compute units that Core ML picks. See `edgeopt.runtimes.base.Runtime`."""

    name = "coreml"
    formats: tuple[Format, ...] = ("coreml",)
    emulates: str | None = None

    def unavailable(self) -> str | None:
        if platform.system() != "Darwin":
            return "Core ML runs on macOS and iOS only"
        return missing()

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        """Core ML has no say in its number of threads; `threads` is not used."""
        del threads
        if (reason := self.unavailable()) is not None:
            raise MissingError(reason)
        with quiet_coremltools():
            import coremltools as ct

            try:
                return _Session(ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.ALL), path, signature)
            # The bindings raise plain RuntimeErrors, and Exceptions for what they can't read.
            except Exception as error:
                raise ConversionError(f"Core ML refuses the file ({_line(error)})", where=str(path)) from error


class _Session(Session):
    def __init__(self, model: MLModel, path: Path, signature: Signature) -> None:
        super().__init__(signature)
        self._model: MLModel | None = model
        self._path = path

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._model is None:
            raise DataError("the session is closed", where=self._path.name)
        feed = {t.native_name: np.ascontiguousarray(inputs[t.name]) for t in self.signature.inputs}
        try:
            found = self._model.predict(feed)
        except RuntimeError as error:
            raise DataError(f"Core ML could not run it ({_line(error)})", where=self._path.name) from error
        return {t.name: np.asarray(found[t.native_name], dtype=t.dtype) for t in self.signature.outputs}

    def close(self) -> None:
        self._model = None


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
