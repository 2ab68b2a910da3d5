"""ONNX Runtime on the CPU: runs .onnx files and times their operators."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.runtimes.base import Session, check_shape
from edgeopt.telemetry import opt_out
from edgeopt.types import Array, Format, OpTiming, Signature

if TYPE_CHECKING:
    import onnxruntime


class OnnxRuntime:
    """The CPU execution provider, all graph optimizations on."""

    name = "onnxruntime"
    formats: tuple[Format, ...] = ("onnx",)
    emulates: str | None = None

    def unavailable(self) -> str | None:
        return None if find_spec("onnxruntime") else "the package onnxruntime is not installed: pip install onnxruntime"

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        missing = self.unavailable()
        if missing:
            raise MissingError(missing)
        return _OnnxSession(path, signature, threads)


class _OnnxSession(Session):
    def __init__(self, path: Path, signature: Signature, threads: int) -> None:
        super().__init__(signature)
        self._path = path
        self._threads = threads
        self._session: onnxruntime.InferenceSession | None = _open(path, threads, profile_prefix=None)
        self._outputs = [t.native_name for t in signature.outputs]

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise ValueError("the session is closed")
        return self._run(self._session, self._feed(inputs))

    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        feed = self._feed(self.encode(inputs))
        with tempfile.TemporaryDirectory() as scratch:
            session = _open(self._path, self._threads, profile_prefix=Path(scratch) / "profile")
            for _ in range(repetitions):
                self._run(session, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _op_timings(events)

    def close(self) -> None:
        self._session = None

    def _feed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for tensor in self.signature.inputs:
            check_shape(inputs[tensor.name], tensor)
        return {t.native_name: inputs[t.name] for t in self.signature.inputs}

    def _run(self, session: onnxruntime.InferenceSession, feed: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = session.run(self._outputs, dict(feed))
        # The bindings raise a dozen unrelated classes; what the model was fed is all that can vary here.
        except Exception as error:
            raise DataError(f"ONNX Runtime can't run it: {_first_line(error)}", where=self._path.name) from error
        return {t.name: value for t, value in zip(self.signature.outputs, values, strict=True)}


def _open(path: Path, threads: int, profile_prefix: Path | None) -> onnxruntime.InferenceSession:
    opt_out()
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # The bindings raise a dozen unrelated classes for one thing: the file was refused.
    except Exception as error:
        raise ConversionError(f"ONNX Runtime refuses the file: {_first_line(error)}", where=str(path)) from error


def _op_timings(events: list[dict[str, object]]) -> tuple[OpTiming, ...]:
    """Median of each node's kernel times over the repetitions; ONNX Runtime reports microseconds."""
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        name, details, duration = str(event.get("name", "")), event.get("args"), event.get("dur")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or not isinstance(details, dict):
            continue
        if isinstance(duration, int | float):
            # A fused kernel is called "<first node>_token_<n>".
            node = re.sub(r"_token_\d+$", "", name.removesuffix("_kernel_time"))
            key = (node, str(details.get("op_name", "")))
            times.setdefault(key, []).append(float(duration))
    timings = (OpTiming(name, kind, median(spans) / 1000) for (name, kind), spans in times.items())
    return tuple(sorted(timings, key=lambda t: (-t.ms, t.name)))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
