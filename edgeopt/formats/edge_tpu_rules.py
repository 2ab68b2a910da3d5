"""Operators that the Edge TPU compiler doesn't take as they are, but that another one, or none, can stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeopt.formats.edge_tpu_graph import FlatGraph
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Operators with paddings, which are their second input.
PADS = frozenset({"PAD", "PADV2", "MIRROR_PAD"})
_SHAPERS = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS"})


def is_identity(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether the output is provably the first input: same values in the same order, type, shape and scale."""
    source, output = _borders(graph, op)
    if source is None or output is None or graph.shape(source) != graph.shape(output):
        return False
    if not graph.same_values(source, output) or not (graph.is_static(source) and graph.is_static(output)):
        return False
    # With the same type and scale on both sides, QUANTIZE maps every integer to itself.
    return keeps_order(graph, op) or graph.kind(op) == "QUANTIZE"


def keeps_order(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether the output provably has the elements of the first input in the same order, in whatever shape."""
    source, output = _borders(graph, op)
    if source is None or output is None or graph.size(source) != graph.size(output):
        return False
    kind = graph.kind(op)
    if kind in _SHAPERS:
        return True
    if kind == "TRANSPOSE":
        return _moves_ones_only(graph, op)
    if kind == "GATHER":
        return _gathers_all(graph, op)
    if kind == "GATHER_ND":
        return _gathers_all_nd(graph, op)
    if kind == "SLICE":
        return True  # As many elements out as in: it takes all of them.
    if kind == "STRIDED_SLICE":
        steps = _constant(graph, op, 3)
        return steps is not None and bool(np.all(steps == 1))
    if kind == "CONCATENATION":
        return len(graph.inputs(op)) == 1 and not graph.options(op).get("fusedActivationFunction")
    return False


def moves_nothing(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether a transpose or gather does what RESHAPE would do too."""
    if graph.kind(op) not in ("TRANSPOSE", "GATHER", "GATHER_ND") or not keeps_order(graph, op):
        return False
    return graph.same_values(graph.inputs(op)[0], graph.outputs(op)[0])


def pads_with_zero(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether a PADV2 pads with the real number 0, as PAD does."""
    value = _constant(graph, op, 2)
    source = graph.inputs(op)[0]
    if graph.kind(op) != "PADV2" or value is None or value.size != 1:
        return False
    if graph.dtype(source) in ("FLOAT32", "INT32", "INT64"):
        return bool(value.reshape(-1)[0] == 0)
    return len(graph.scales(source)) == 1 and int(value.reshape(-1)[0]) == graph.zero_points(source)[0]


def has_wide_paddings(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether the paddings are int64."""
    inputs = graph.inputs(op)
    return graph.kind(op) in PADS and len(inputs) > 1 and graph.dtype(inputs[1]) == "INT64"


def convolution_groups(graph: FlatGraph, op: schema.OperatorT) -> int:
    """In how many groups a CONV_2D takes its input's channels; 1 for everything else."""
    if graph.kind(op) != "CONV_2D":
        return 1
    data, weight = graph.inputs(op)[:2]
    return graph.shape(data)[-1] // graph.shape(weight)[-1]


def is_per_channel_product(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether a FULLY_CONNECTED has integer weights with several scales."""
    inputs = graph.inputs(op)
    return graph.kind(op) == "FULLY_CONNECTED" and graph.dtype(inputs[0]) == "INT8" and len(graph.scales(inputs[1])) > 1


def takes_channels_first(graph: FlatGraph, op: schema.OperatorT) -> bool:
    """Whether it makes one of the file's inputs channel-last."""
    order = _constant(graph, op, 1) if graph.kind(op) == "TRANSPOSE" else None
    return order is not None and order.tolist() == [0, 2, 3, 1] and graph.inputs(op)[0] in graph.borders()[0]


def _borders(graph: FlatGraph, op: schema.OperatorT) -> tuple[int | None, int | None]:
    """The first input and the only output."""
    inputs, outputs = graph.inputs(op), graph.outputs(op)
    return (inputs[0] if inputs and inputs[0] >= 0 else None), (outputs[0] if len(outputs) == 1 else None)


def _constant(graph: FlatGraph, op: schema.OperatorT, position: int) -> Array | None:
    inputs = graph.inputs(op)
    return graph.constant(inputs[position]) if position < len(inputs) and inputs[position] >= 0 else None


def _moves_ones_only(graph: FlatGraph, op: schema.OperatorT) -> bool:
    order = _constant(graph, op, 1)
    if order is None:
        return False
    moved = [int(axis) for axis in order if graph.shape(graph.inputs(op)[0])[int(axis)] != 1]
    return moved == sorted(moved)


def _gathers_all(graph: FlatGraph, op: schema.OperatorT) -> bool:
    indices, options = _constant(graph, op, 1), graph.options(op)
    if indices is None or options.get("batchDims"):
        return False
    size = graph.shape(graph.inputs(op)[0])[options.get("axis", 0)]
    return bool(np.array_equal(indices.reshape(-1), np.arange(size)))


def _gathers_all_nd(graph: FlatGraph, op: schema.OperatorT) -> bool:
    indices, shape = _constant(graph, op, 1), graph.shape(graph.inputs(op)[0])
    if indices is None or not indices.ndim:
        return False
    depth = indices.shape[-1]
    every = np.indices(shape[:depth]).reshape(depth, -1).T
    return bool(np.array_equal(indices.reshape(-1, depth), every))
