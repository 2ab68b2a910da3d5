"""Qualcomm's own x86 emulator of its HTP: what a .onnx file computes on the phone, to be had on a laptop.

Nodes that HTP does not take run on ONNX Runtime's CPU kernels, as they would on the device. Its times and cycle counts
are this machine's, and are not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgeopt.errors import DataError, MissingError
from edgeopt.formats.onnx import load
from edgeopt.formats.onnx_hexagon import made_for
from edgeopt.runtimes.base import Session
from edgeopt.runtimes.qnn_htp_process import DEFAULT, HtpProcess, missing
from edgeopt.types import Array, Format, Signature


class QnnHtpRuntime:
    """ONNX Runtime with the QNN provider, emulating the Hexagon that the file says it was made for."""

    name = "qnn-htp"
    formats: tuple[Format, ...] = ("onnx",)
    emulates: str | None = "Qualcomm's own x86 emulator of its HTP, numerics only"

    def unavailable(self) -> str | None:
        return missing()

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        del threads  # the emulator has its own
        problem = missing()
        if problem is not None:
            raise MissingError(problem)
        return _HtpSession(path, signature)


class _HtpSession(Session):
    def __init__(self, path: Path, signature: Signature) -> None:
        super().__init__(signature)
        self._process = HtpProcess(path, made_for(load(path, weights=False)) or DEFAULT)

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for tensor in self.signature.inputs:
            given = inputs[tensor.name].shape
            if len(given) != len(tensor.shape) or any(
                isinstance(wanted, int) and wanted != size for wanted, size in zip(tensor.shape, given, strict=True)
            ):
                raise DataError(
                    f"has the shape {given}, the model takes {tensor.shape}", where=f"input {tensor.name!r}"
                )
        feed = {t.native_name: np.ascontiguousarray(inputs[t.name]) for t in self.signature.inputs}
        found = self._process.run(feed)
        return {t.name: found[t.native_name] for t in self.signature.outputs}

    def close(self) -> None:
        self._process.close()
