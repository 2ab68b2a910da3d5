"""The graph inside an XNNPACK delegate, to be read and given further outputs.

The flatbuffer compiler in ExecuTorch's wheel makes the reader and writer from XNNPACK's schema: its JSON would round
the scales.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeopt.formats.executorch import XNN_INVALID, executorch_root, find_flatc, xnn_flatbuffer
from edgeopt.types import DType, QuantParams

_SCHEMA = "backends/xnnpack/serialization/schema.fbs"
_EXTERNAL_OUTPUT = 2  # XNN_VALUE_FLAG_EXTERNAL_OUTPUT of xnnpack.h
_ALIGNMENT = 16
#: xnn_datatype -> element type in memory; others are weights.
_DTYPES: dict[int, DType] = {1: "float32", 2: "float16", 3: "int8"}


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: `external` is the position among the delegate's arguments, None inside."""

    dims: tuple[int, ...]
    dtype: DType | None
    is_constant: bool
    external: int | None
    quantization: QuantParams | None


@dataclass(frozen=True, slots=True)
class Node:
    """An operator; `permutation` of a transpose."""

    type: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    debug_handle: int
    permutation: tuple[int, ...] | None


class DelegateGraph:
    """One delegate's blob, parsed. Ids are the graph's own."""

    def __init__(self, blob: bytes, schema: ModuleType) -> None:
        flat = xnn_flatbuffer(blob)
        self._identifier = flat[4:8]
        self._constants = _constant_data(blob)
        self._schema = schema
        self._graph: Any = schema.XNNGraphT.InitFromPackedBuf(flat, 0)
        self._values = {int(_plain(v).idOut): v.xvalueUnion for v in self._graph.xvalues}
        self.values = {number: _value(union) for number, union in self._values.items()}
        self.nodes = [self._node(node) for node in self._graph.xnodes]

    def give_out(self, value: int) -> int:
        """Make an inner value an output; returns its position among the delegate's arguments."""
        tensor = getattr(self._values[value], "tensorValue", self._values[value])
        position = int(self._graph.numExterns)
        tensor.externalId, tensor.flags = position, int(tensor.flags) | _EXTERNAL_OUTPUT
        self._graph.numExterns = position + 1
        self._graph.outputIds = [*(int(i) for i in self._graph.outputIds), value]
        return position

    def blob(self) -> bytes:
        """As the delegate takes it."""
        import flatbuffers
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self._graph.Pack(builder), file_identifier=self._identifier)
        flat = bytes(builder.Output())
        start = _aligned(XNNHeader.EXPECTED_LENGTH)
        header: bytes = XNNHeader(start, len(flat), start + _aligned(len(flat)), len(self._constants)).to_bytes()
        return header.ljust(start, b"\0") + flat.ljust(_aligned(len(flat)), b"\0") + self._constants

    def _node(self, node: Any) -> Node:
        kinds = {v: k for k, v in vars(self._schema.XNodeUnion).items() if not k.startswith("_")}
        fields = {k: int(v) for k, v in vars(node.xnodeUnion).items() if k.endswith("Id") and int(v) != XNN_INVALID}
        permutation = getattr(node.xnodeUnion, "perm", None)
        return Node(
            type=kinds[node.xnodeUnionType].removeprefix("XNN").lstrip("_"),
            inputs=tuple(v for k, v in fields.items() if not k.startswith("output")),
            outputs=tuple(v for k, v in fields.items() if k.startswith("output")),
            debug_handle=int(node.debugHandle),
            permutation=None if permutation is None else tuple(int(axis) for axis in permutation),
        )


def load_schema() -> ModuleType:
    """Classes for XNNPACK's schema. Raises MissingError where ExecuTorch has no flatbuffer compiler."""
    root = executorch_root()
    with tempfile.TemporaryDirectory() as name:
        flags = ["--python", "--gen-object-api", "--gen-onefile", "-o", name]
        subprocess.run([str(find_flatc(root)), *flags, str(root / _SCHEMA)], check=True, capture_output=True)
        source = next(Path(name).glob("*_generated.py"))
        spec = importlib.util.spec_from_file_location("edgeopt_xnnpack_schema", source)
        if spec is None or spec.loader is None:
            raise ValueError("the flatbuffer compiler wrote no module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # This compiler calls some of its functions by another spelling than it defines them under.
        defined = {n.lower(): f for n, f in vars(module).items() if n.endswith("Creator")}
        for called in set(re.findall(r"\b(\w+Creator)\(", source.read_text())):
            setattr(module, called, defined[called.lower()])
    return module


def _plain(value: Any) -> Any:
    return getattr(value.xvalueUnion, "tensorValue", value.xvalueUnion)


def _value(union: Any) -> Value:
    tensor = getattr(union, "tensorValue", union)
    params: Any = getattr(union, "quantParams", None)
    zero_point = getattr(params, "zeroPoint", None)
    return Value(
        dims=() if tensor.dims is None else tuple(int(d) for d in tensor.dims),
        dtype=_DTYPES.get(int(tensor.datatype)),
        is_constant=int(tensor.constantBufferIdx) != 0,
        external=None if int(tensor.externalId) == XNN_INVALID else int(tensor.externalId),
        quantization=None if zero_point is None else QuantParams((float(params.scale),), (int(zero_point),)),
    )


def _constant_data(blob: bytes) -> bytes:
    """What follows the graph; empty where constants are named data of the program."""
    start, size = int.from_bytes(blob[18:22], "little"), int.from_bytes(blob[22:30], "little")
    return blob[start : start + size]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
