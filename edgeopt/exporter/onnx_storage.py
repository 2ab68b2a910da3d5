"""Weights that are integers, or codes into a table, in the file only: ONNX Runtime expands them when it loads it.

Its constant folding computes what depends on constants only, but leaves DequantizeLinear alone (measured on ONNX
Runtime 1.31: it then decodes the weight at every call and loses the float kernel's blocked layout). So the weight is
decoded by Cast, Sub and Mul, or by GatherElements from a table, and runs exactly as fast as a float one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.codebooks import code_weight
from edgeopt.calibration.weights import quantize_weight, to_rows
from edgeopt.exporter.onnx_embedding import is_lookup
from edgeopt.exporter.onnx_rewrite import constants_of, int4_tensor, number, prune_initializers
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx

#: About what the nodes that decode one weight add to a file; saving less than this is no saving.
_NODE_BYTES = 512
_RECURRENT = ("LSTM", "GRU", "RNN")


def expand_at_load(proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme) -> onnx.ModelProto:
    """A copy in which every constant weight that gets smaller by it is stored as `scheme` says.

    4-bit weights need opset 21, the first in which Cast knows them.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    constants = constants_of(graph)
    decoded: dict[tuple[str, int], str | None] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for position, axis in () if exempt(node) else float_weights(node, constants):
            key = (node.input[position], axis)
            if key not in decoded:
                stored = _stored(f"{key[0]}_stored{axis}", constants[key[0]], scheme, axis)
                decoded[key] = None if stored is None else stored.result
                if stored is not None:
                    nodes += stored.nodes
                    graph.initializer.extend(stored.initializers)
            node.input[position] = decoded[key] or key[0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    prune_initializers(graph)
    return copy


def float_weights(node: onnx.NodeProto, constants: Mapping[str, Array]) -> Iterator[tuple[int, int]]:
    """Input positions at which the node reads a constant float weight, each with the axis of its output channels."""

    def real(position: int, rank: int) -> bool:
        array = constants.get(node.input[position]) if position < len(node.input) else None
        return array is not None and array.dtype == np.float32 and array.ndim >= rank and array.size > 0

    if node.op_type == "MatMul":
        if real(1, 2):
            yield 1, constants[node.input[1]].ndim - 1
        elif real(0, 2):
            yield 0, constants[node.input[0]].ndim - 2
    elif node.op_type == "Gemm" and real(1, 2):
        yield 1, 0 if number(node, "transB", 0) else 1
    elif node.op_type in ("Conv", "ConvTranspose") and real(1, 3):
        yield 1, 0 if node.op_type == "Conv" else 1
    elif node.op_type in _RECURRENT:
        yield from ((position, 1) for position in (1, 2) if real(position, 3))
    elif node.op_type == "Gather" and real(0, 2) and is_lookup(node, constants[node.input[0]]):
        yield 0, 0


@dataclass(slots=True)
class _Stored:
    """The constants that a weight is stored in and the nodes that decode it; `result` is the float tensor."""

    stem: str
    result: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, suffix: str, values: Array, half_bytes: bool = False) -> str:
        from onnx import numpy_helper

        name = f"{self.stem}_{suffix}"
        packed = int4_tensor(values, name) if half_bytes else numpy_helper.from_array(values, name)
        self.initializers.append(packed)
        return name

    def then(self, kind: str, *others: str, **attributes: int | list[int]) -> None:
        """Apply an operator to what has been decoded so far."""
        self.apply(kind, [self.result, *others], **attributes)

    def apply(self, kind: str, inputs: list[str], **attributes: int | list[int]) -> None:
        from onnx import helper

        self.result = f"{self.stem}_{kind.lower()}{len(self.nodes)}"
        name = f"{self.stem}/{kind}{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [self.result], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)


def _stored(stem: str, weight: Array, scheme: Scheme, axis: int) -> _Stored | None:
    """None where that would save nothing."""
    stored = (
        _linear(stem, weight, scheme, axis) if scheme.weight_values == "linear" else _coded(stem, weight, scheme, axis)
    )
    size = sum(len(tensor.raw_data) for tensor in stored.initializers)
    return stored if size + _NODE_BYTES < weight.nbytes else None


def _linear(stem: str, weight: Array, scheme: Scheme, axis: int) -> _Stored:
    from onnx import TensorProto

    stored = _Stored(stem)
    quantized = quantize_weight(weight, scheme, axis)
    if quantized.group_size is None:
        values = quantized.values
        shape = [-1 if i == quantized.axis else 1 for i in range(weight.ndim)] if quantized.axis is not None else []
    else:
        values = _in_groups(to_rows(quantized.values, axis), quantized.group_size)
        shape = [*quantized.scale.shape, 1]
    stored.result = stored.constant("values", values, half_bytes=scheme.weight_bits == 4)
    stored.then("Cast", to=TensorProto.FLOAT)
    if not scheme.weight_symmetric:
        points = quantized.zero_point.astype(np.float32).reshape(shape)
        stored.then("Sub", stored.constant("zero_point", points))
    stored.then("Mul", stored.constant("scale", quantized.scale.reshape(shape)))
    if quantized.group_size is not None:
        _regroup(stored, values, weight.shape, axis)
    return stored


def _coded(stem: str, weight: Array, scheme: Scheme, axis: int) -> _Stored:
    from onnx import TensorProto

    stored = _Stored(stem)
    coded = code_weight(weight, scheme, axis)
    codes = to_rows(coded.codes, coded.axis)
    groups = _in_groups(codes, coded.group_size or codes.shape[1])
    flat = groups.reshape(-1, groups.shape[-1])
    stored.result = stored.constant("codes", flat, half_bytes=scheme.weight_bits == 4)
    stored.then("Cast", to=TensorProto.INT32)
    table = stored.constant("table", coded.table.reshape(flat.shape[0], -1))
    stored.apply("GatherElements", [table, stored.result], axis=1)
    _regroup(stored, groups, weight.shape, coded.axis)
    return stored


def _in_groups(rows: Array, size: int) -> Array:
    """(rows, columns) as (rows, groups, size), the last group padded with zeros."""
    count = -(-rows.shape[1] // size)
    padded = np.pad(rows, ((0, 0), (0, count * size - rows.shape[1])))
    return np.ascontiguousarray(padded.reshape(rows.shape[0], count, size))


def _regroup(stored: _Stored, groups: Array, shape: tuple[int, ...], axis: int | None) -> None:
    """From groups back to the weight's own shape: join them, cut the padding off, put the channels' axis back."""
    front = shape if axis is None else (shape[axis], *(size for i, size in enumerate(shape) if i != axis))
    channels = 1 if axis is None else front[0]
    columns, padded_columns = int(np.prod(shape)) // channels, groups.size // channels
    if columns != padded_columns:
        stored.then("Reshape", stored.constant("rows", np.array([channels, padded_columns])))
        bounds = (("start", 0), ("end", columns), ("along", 1))
        stored.then("Slice", *(stored.constant(suffix, np.array([value])) for suffix, value in bounds))
    stored.then("Reshape", stored.constant("shape", np.array(front)))
    if axis:
        back = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
        stored.then("Transpose", perm=back)
