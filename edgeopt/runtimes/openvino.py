"""OpenVINO on the CPU: runs .onnx files and times their operators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.runtimes.base import Session, check_shape
from edgeopt.types import Array, Format, OpTiming, Signature, SignatureTensor

if TYPE_CHECKING:
    import openvino


_UNNAMED = re.compile(r"dim\d+")
_WARM_UP = 5


class OpenVinoRuntime:
    """OpenVINO's CPU plugin, one stream; what is float in the file is computed in float32, on every machine."""

    name = "openvino"
    formats: tuple[Format, ...] = ("onnx",)
    emulates: str | None = None

    def unavailable(self) -> str | None:
        spec = find_spec("openvino")
        # A folder of that name on the path is found too, without a file to load.
        if spec is None or spec.origin is None:
            return "the package openvino is not installed: pip install 'edgeopt[openvino]'"
        return None

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        missing = self.unavailable()
        if missing:
            raise MissingError(missing)
        return _OpenVinoSession(path, signature, threads)


class _OpenVinoSession(Session):
    def __init__(self, path: Path, signature: Signature, threads: int) -> None:
        super().__init__(signature)
        self._path = path
        self._threads = threads
        self._model = read(path)
        self._input_positions = _positions(path, self._model.inputs, signature.inputs)
        self._output_positions = _positions(path, self._model.outputs, signature.outputs)
        compiled = compile_model(self._model, path, "CPU", threads)
        self._request: openvino.InferRequest | None = compiled.create_infer_request()

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._request is None:
            raise ValueError("the session is closed")
        return self._run(self._request, inputs)

    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        """Mean time of each operator: OpenVINO tells the mean over all runs since the start, in microseconds. That of
        the first few, of which the very first takes a hundred times as long, is subtracted."""
        feed = self.encode(inputs)
        request = compile_model(self._model, self._path, "CPU", self._threads, timed=True).create_infer_request()
        for _ in range(_WARM_UP):
            self._run(request, feed)
        before = _means(request)
        for _ in range(repetitions):
            self._run(request, feed)
        total = _WARM_UP + repetitions
        timings = (
            OpTiming(name, kind, max(0.0, total * mean - _WARM_UP * before.get((name, kind), 0.0)) / repetitions)
            for (name, kind), mean in _means(request).items()
        )
        return tuple(sorted(timings, key=lambda t: (-t.ms, t.name)))

    def close(self) -> None:
        self._request = None

    def _run(self, request: openvino.InferRequest, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feed: dict[int, Array] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for position, tensor in zip(self._input_positions, self.signature.inputs, strict=True):
            values = inputs[tensor.name]
            check_shape(values, tensor)
            _check_names(values, tensor, sizes)
            feed[position] = np.ascontiguousarray(values, dtype=tensor.dtype)
        try:
            results = request.infer(feed, share_inputs=True)
        # The bindings raise RuntimeError and its kin for everything; what the model was fed is all that can vary here.
        except Exception as error:
            raise DataError(f"OpenVINO can't run it: {last_line(error)}", where=self._path.name) from error
        return {
            t.name: results[position]
            for t, position in zip(self.signature.outputs, self._output_positions, strict=True)
        }


def read(path: Path) -> openvino.Model:
    """Convert a file to OpenVINO's graph, by the ONNX front end alone.

    Operators are named after the file's nodes: "features.0/Conv", and "features.0/Conv/Reshape" for one of the several
    that a node became. OpenVINO would number the latter, in each process differently.

    Raises:
        ConversionError: naming what it has no conversion for.
    """
    import edgeopt.runtimes.openvino_import  # noqa: F401, I001 - before openvino, which it keeps quiet
    from openvino.frontend import FrontEndManager

    try:
        front_end = FrontEndManager().load_by_framework("onnx")
        model: openvino.Model = front_end.convert(front_end.load(str(path)))
    # The bindings raise RuntimeError and its kin for one thing: the file was refused.
    except Exception as error:
        raise ConversionError(f"OpenVINO refuses the file: {last_line(error)}", where=str(path)) from error
    _name_after_nodes(model)
    return model


def _means(request: openvino.InferRequest) -> dict[tuple[str, str], float]:
    """(operator, type) -> milliseconds, the mean over a request's runs so far."""
    return {
        (node.node_name, node.node_type): node.real_time.total_seconds() * 1000
        for node in request.get_profiling_info()
        if str(node.status).endswith(".EXECUTED")
    }


def _name_after_nodes(model: openvino.Model) -> None:
    """Give operators that the file does not name the name of the named one that they work for."""
    owners: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for op in reversed(model.get_ordered_ops()):
        name = op.get_friendly_name()
        if any(port.get_names() for port in op.outputs()) or op.get_type_name() in ("Parameter", "Result"):
            owners[name] = name
            continue
        users = sorted(owners[user.get_node().get_friendly_name()] for port in op.outputs() for user in _users(port))
        owner = users[0] if users else op.get_type_name()
        new = f"{owner}/{op.get_type_name()}"
        taken[new] += 1
        op.set_friendly_name(f"{new}_{taken[new]}")
        owners[op.get_friendly_name()] = owner


def _users(port: openvino.Output) -> list[openvino.Input]:
    return list(port.get_target_inputs())


def compile_model(
    model: openvino.Model, path: Path, device: str, threads: int, *, timed: bool = False
) -> openvino.CompiledModel:
    """Compile a graph for a device of this machine; `timed` counts the time of every operator.

    Without the hint the CPU plugin computes in bfloat16 on machines that have it, which costs float operators 8 of
    their 24 bits. Pinned threads would all sit on the same cores in several processes.

    Raises:
        ConversionError: when the device's compiler refuses the graph.
    """
    import openvino

    settings: dict[str, str | int | bool] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "PERF_COUNT": timed}
    if device == "CPU":
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    try:
        return openvino.Core().compile_model(model, device, settings)
    except Exception as error:  # as above
        raise ConversionError(f"OpenVINO can't compile it for {device}: {last_line(error)}", where=str(path)) from error


def last_line(error: Exception) -> str:
    """What went wrong: OpenVINO's messages begin with the places in its source that the error passed through."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return told[-1].removeprefix("-- ") if told else type(error).__name__


def _positions(path: Path, ports: list[openvino.ConstOutput], wanted: tuple[SignatureTensor, ...]) -> tuple[int, ...]:
    """Where each tensor of the signature stands among the graph's inputs or outputs, by name."""
    found = []
    for tensor in wanted:
        position = next((i for i, port in enumerate(ports) if tensor.native_name in port.get_names()), None)
        if position is None:
            raise ConversionError(f"OpenVINO's graph of the file has no {tensor.native_name!r}", where=str(path))
        found.append(position)
    return tuple(found)


def _check_names(values: Array, tensor: SignatureTensor, sizes: dict[str, tuple[int, str]]) -> None:
    """`sizes` collects dimension name -> (size, the input that had it). OpenVINO itself keeps no names: it would read
    past the end of the smaller of two tensors."""
    for name, size in zip(tensor.shape, values.shape, strict=True):
        # A dimension that the file leaves unnamed is called after its axis, in every tensor.
        if isinstance(name, str) and not _UNNAMED.fullmatch(name):
            known, other = sizes.setdefault(name, (size, tensor.name))
            if known != size:
                raise DataError(
                    f"its dimension {name!r} is {size}, that of {other!r} is {known}", where=f"input {tensor.name!r}"
                )
