"""Embedding tables as integers: what makes a quantized language model small, since no matrix product reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.weights import QuantizedWeight, quantize_weight
from edgeopt.exporter.onnx_graph import MIN_IR
from edgeopt.exporter.onnx_products import (
    BLOCK_SIZES,
    CONTRIB,
    block_parameters,
    block_size,
    declare_contrib,
    declare_float,
)
from edgeopt.exporter.onnx_rewrite import constants_of, int4_tensor, number, prune_initializers
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx

#: Below this many values the operators that decode a row cost more than the bytes are worth.
MIN_VALUES = 4096


def quantize_embeddings(
    proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme
) -> onnx.ModelProto:
    """A copy in which every lookup in a constant float table reads integer rows and decodes what it has read.

    One output channel of the scheme is one row. Standard operators do it where a row has one scale and 8 bits, ONNX
    Runtime's GatherBlockQuantized does the rest; a group size that it has no kernel for stays float.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    constants = constants_of(graph)
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_embedding(node, table) or exempt(node):
            nodes.append(node)
        elif scheme.weight_bits == 8 and scheme.weight_symmetric and scheme.weight_granularity != "per-group":
            nodes += _decoded_lookup(node, quantize_weight(table, scheme, axis=0), added)
        elif (size := _row_block(scheme, table.shape[1])) is not None:
            nodes.append(_block_lookup(node, quantize_weight(table, scheme, axis=0), scheme, size, added))
            declare_float(graph, node.output[0])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added.values())
    prune_initializers(graph)
    declare_contrib(copy)
    if scheme.weight_bits == 4:
        copy.ir_version = max(copy.ir_version, MIN_IR)
    return copy


def is_lookup(node: onnx.NodeProto, table: Array) -> bool:
    """Whether the node picks rows from a float matrix."""
    return node.op_type == "Gather" and table.dtype == np.float32 and table.ndim == 2 and number(node, "axis", 0) == 0


def _is_embedding(node: onnx.NodeProto, table: Array) -> bool:
    return is_lookup(node, table) and table.size >= MIN_VALUES


def _row_block(scheme: Scheme, columns: int) -> int | None:
    """Unlike products, lookups take any power of two, so that one block can be a whole row."""
    if scheme.weight_granularity == "per-group" and scheme.group_size < columns:
        return block_size(scheme, columns)
    return max(BLOCK_SIZES[-1], 1 << (columns - 1).bit_length())


def _decoded_lookup(
    node: onnx.NodeProto, weight: QuantizedWeight, added: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper, numpy_helper

    stem, output, ids = node.input[0], node.output[0], node.input[1]
    per_row = weight.axis is not None
    scales = weight.scale.reshape(-1, 1) if per_row else weight.scale
    for suffix, values in (("s8", weight.values), ("row_scale", scales)):
        added[f"{stem}_{suffix}"] = numpy_helper.from_array(values, f"{stem}_{suffix}")
    row, real, scale = f"{output}_s8", f"{output}_steps", f"{output}_scale"
    lookup = helper.make_node("Gather", [f"{stem}_s8", ids], [row], name=node.name, axis=0)
    cast = helper.make_node("Cast", [row], [real], name=f"{node.name}_decode", to=TensorProto.FLOAT)
    pick = helper.make_node("Gather", [f"{stem}_row_scale", ids], [scale], name=f"{node.name}_scale", axis=0)
    factor = scale if per_row else f"{stem}_row_scale"
    product = helper.make_node("Mul", [real, factor], [output], name=f"{node.name}_rescale")
    return [lookup, cast, *([pick] if per_row else []), product]


def _block_lookup(
    node: onnx.NodeProto, weight: QuantizedWeight, scheme: Scheme, size: int, added: dict[str, onnx.TensorProto]
) -> onnx.NodeProto:
    from onnx import helper, numpy_helper

    rows, columns = weight.values.shape
    scale, zero_point = block_parameters(weight, rows, -(-columns // size), size)
    stem = f"{node.input[0]}_blocks{scheme.weight_bits}"
    names = [stem, f"{stem}_scale", *([] if scheme.weight_symmetric else [f"{stem}_zero_point"])]
    if scheme.weight_bits == 4:
        # As a type of its own it may have rows of odd length.
        integers = [int4_tensor(values, "") for values in (weight.values, zero_point)]
    else:
        raised = [(values.astype(np.int16) + 128).astype(np.uint8) for values in (weight.values, zero_point)]
        integers = [numpy_helper.from_array(values) for values in raised]
    parts = (integers[0], numpy_helper.from_array(scale), integers[1])
    for name, tensor in zip(names, parts, strict=False):
        tensor.name = name
        added[name] = tensor
    return helper.make_node(
        "GatherBlockQuantized",
        [stem, node.input[1], *names[1:]],
        [node.output[0]],
        name=node.name,
        domain=CONTRIB,
        bits=scheme.weight_bits,
        block_size=size,
        gather_axis=0,
        quantize_axis=1,
    )
