"""Weights that a graph holds twice, stored once: a language model's embedding table is its last layer's weight too.

torch shares the two; a graph has the table as rows for the lookup and, transposed, as columns for the product. Which
of them is stored does not matter for speed: ONNX Runtime's constant folding makes the other when it loads the file.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.onnx_rewrite import attributes, captured_names, number, prune_initializers
from edgeopt.types import Array

if TYPE_CHECKING:
    import onnx

#: Saving less than this is not worth a node.
_MIN_BYTES = 4096


def store_once(proto: onnx.ModelProto) -> None:
    """Make every constant matrix that is another one's transpose out of that other one, in place; and the 4-bit rows of
    a table out of the blocks of the product that reads the same weights."""
    graph = proto.graph
    made = [*_mirrored(graph), *_rows_of_blocks(graph)]
    nodes = [*made, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    gone = {node.output[0] for node in made}
    rest = [tensor for tensor in graph.initializer if tensor.name not in gone]
    del graph.initializer[:]
    graph.initializer.extend(rest)
    prune_initializers(graph)


def with_own_copies(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as it was before `store_once`, where each constant is there in the form in which it is read: whoever
    rewrites it looks for weights among the initializers. Changes it in place, and returns it."""
    from onnx import numpy_helper

    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        source = constants.get(node.input[0]) if node.op_type == "Transpose" else None
        if source is None or attributes(node).get("perm") != [1, 0]:
            nodes.append(node)
            continue
        mirrored = np.ascontiguousarray(numpy_helper.to_array(source).T)
        graph.initializer.append(numpy_helper.from_array(mirrored, node.output[0]))
    del graph.node[:]
    graph.node.extend(nodes)
    prune_initializers(graph)
    return proto


def _mirrored(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that make a constant from its transpose."""
    from onnx import helper

    fixed = {value.name for value in (*graph.input, *graph.output)} | set(captured_names(graph.node))
    stored: dict[bytes, str] = {}
    made = []
    for tensor in _candidates(graph):
        values = np.frombuffer(tensor.raw_data, helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)
        source = stored.get(_digest(values.T))
        if source is None or tensor.name in fixed:
            stored.setdefault(_digest(values), tensor.name)
        else:
            name = f"{tensor.name}_mirrored"
            made.append(helper.make_node("Transpose", [source], [tensor.name], name=name, perm=[1, 0]))
    return made


def _candidates(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Matrices with another of the same size, of types that NumPy has. Those that lookups read come first: the others
    are made from them."""
    from onnx import TensorProto

    packed = (TensorProto.INT4, TensorProto.UINT4, TensorProto.STRING)
    groups: dict[tuple[int, tuple[int, ...]], list[onnx.TensorProto]] = defaultdict(list)
    for tensor in graph.initializer:
        if len(tensor.dims) == 2 and tensor.data_type not in packed and len(tensor.raw_data) >= _MIN_BYTES:
            groups[tensor.data_type, tuple(sorted(tensor.dims))].append(tensor)
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for group in groups.values():
        if len(group) > 1:
            yield from sorted(group, key=lambda tensor: tensor.name not in tables)


def _digest(values: Array) -> bytes:
    return hashlib.sha256(f"{values.shape} ".encode() + np.ascontiguousarray(values).tobytes()).digest()


def _rows_of_blocks(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that make the rows of GatherBlockQuantized, signed 4-bit integers, from the blocks of a MatMulNBits, the
    same integers plus 8. The lookup is changed to read those."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    products = [
        node
        for node in graph.node
        if node.op_type == "MatMulNBits" and len(node.input) == 3 and constants.keys() >= set(node.input[1:])
    ]
    made: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        table = (
            constants.get(node.input[0]) if node.op_type == "GatherBlockQuantized" and len(node.input) == 3 else None
        )
        if table is None or table.data_type != TensorProto.INT4 or table.dims[-1] % 2 or len(table.dims) != 2:
            continue
        if node.input[2] not in constants:
            continue
        raised = (np.frombuffer(table.raw_data, np.uint8) ^ 0x88).tobytes()
        for product in products:
            blocks, scale = constants[product.input[1]], constants[product.input[2]]
            is_same = number(product, "block_size", 0) == number(node, "block_size", 0)
            if is_same and blocks.raw_data == raised and scale.raw_data == constants[node.input[2]].raw_data:
                rows, shape = f"{blocks.name}_rows", f"{blocks.name}_rows_shape"
                if rows not in made:
                    sizes = np.array([table.dims[0], table.dims[1] // 2])
                    graph.initializer.append(numpy_helper.from_array(sizes, shape))
                    made[rows] = helper.make_node("Reshape", [blocks.name, shape], [rows], name=rows)
                node.input[0], node.input[2] = rows, scale.name
                break
    return list(made.values())
