"""Large weights kept out of a graph while tools work on it that would copy them several times."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.onnx_rewrite import captured_names

if TYPE_CHECKING:
    import onnx

#: Bytes of weights from which on it is worth it: below, memory is no concern.
LARGE = 1 << 28
#: Weights below this many bytes stay.
_LEAST = 1 << 16
#: Operators that do the same with any weight: a tool that does not see it misses nothing but a transposition.
_INDIFFERENT = frozenset({"MatMul", "Gemm", "Gather", "Transpose"})


def set_aside(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """The graph with the large weights of its products and lookups declared as inputs, and those weights by name.

    They still are in `proto`'s memory: nothing large is copied. Without any, that is `proto` itself.
    """
    import onnx

    graph = proto.graph
    if sum(tensor.ByteSize() for tensor in graph.initializer) < LARGE:
        return proto, {}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
    fixed = {value.name for value in (*graph.input, *graph.output)} | set(captured_names(graph.node))
    weights = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.ByteSize() >= _LEAST
        and tensor.name not in fixed
        and tensor.name in readers
        and readers[tensor.name] <= _INDIFFERENT
    }
    light = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _take(light, field.name, value)
    for field, value in graph.ListFields():
        if field.name != "initializer":
            _take(light.graph, field.name, value)
    light.graph.initializer.extend(
        tensor
        for tensor in graph.initializer
        if tensor.name not in weights and (tensor.name in readers or tensor.name in fixed)
    )
    light.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in weights.items()
    )
    return light, weights


def _take(message: object, field: str, value: object) -> None:
    """Copy one field of a protobuf message, whatever kind it is of."""
    present = getattr(message, field)
    if hasattr(present, "MergeFrom"):
        present.MergeFrom(value)
    else:
        setattr(message, field, value)


def put_back(proto: onnx.ModelProto, weights: dict[str, onnx.TensorProto]) -> None:
    """Make the weights constants again, in place, and transpose those that the graph transposes. Empties `weights`."""
    from onnx import numpy_helper

    graph = proto.graph
    kept = [value for value in graph.input if value.name not in weights]
    del graph.input[:]
    graph.input.extend(kept)
    nodes = []
    for node in graph.node:
        tensor = weights.get(node.input[0]) if node.op_type == "Transpose" else None
        if tensor is None:
            nodes.append(node)
            continue
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        turned = np.ascontiguousarray(numpy_helper.to_array(tensor).transpose(order))
        graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
    read = {name for node in graph.node for name in node.input}
    for name in list(weights):
        tensor = weights.pop(name)
        if name in read:
            graph.initializer.append(tensor)
