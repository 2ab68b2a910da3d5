"""Embedding tables as int8: what makes a quantized language model small, since no matrix product reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.onnx_rewrite import constants_of, number
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx

#: Below this many values the three operators that decode a row cost more than the bytes are worth.
MIN_VALUES = 4096


def quantize_embeddings(
    proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme
) -> onnx.ModelProto:
    """A copy in which every lookup in a constant float table reads int8 rows and decodes what it has read.

    One scale per row (per-channel) or per table, zero point 0.
    """
    import onnx
    from onnx import numpy_helper

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
            continue
        steps, scale = _quantized_rows(table, scheme)
        stem = node.input[0]
        for suffix, values in (("s8", steps), ("row_scale", scale)):
            added[f"{stem}_{suffix}"] = numpy_helper.from_array(values, f"{stem}_{suffix}")
        nodes += _decoded_lookup(node, stem, per_row=scale.ndim > 0)
    read = {name for node in nodes for name in node.input}
    kept = [i for i in graph.initializer if i.name in read or f"{i.name}_s8" not in added]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend([*kept, *added.values()])
    return copy


def _is_embedding(node: onnx.NodeProto, table: Array) -> bool:
    return table.dtype == np.float32 and table.ndim == 2 and table.size >= MIN_VALUES and number(node, "axis", 0) == 0


def _quantized_rows(table: Array, scheme: Scheme) -> tuple[Array, Array]:
    peaks = np.abs(table).max(axis=1, keepdims=True)
    if scheme.weight_granularity == "per-tensor":
        peaks = np.asarray(peaks.max(initial=0))
    # A row of zeros (padding) needs some scale.
    scale = np.where(peaks > 0, peaks / 127, 1).astype(np.float32)
    return np.clip(np.rint(table / scale), -127, 127).astype(np.int8), scale


def _decoded_lookup(node: onnx.NodeProto, stem: str, per_row: bool) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper

    output, ids = node.output[0], node.input[1]
    row, real, scale = f"{output}_s8", f"{output}_steps", f"{output}_scale"
    lookup = helper.make_node("Gather", [f"{stem}_s8", ids], [row], name=node.name, axis=0)
    cast = helper.make_node("Cast", [row], [real], name=f"{node.name}_decode", to=TensorProto.FLOAT)
    pick = helper.make_node("Gather", [f"{stem}_row_scale", ids], [scale], name=f"{node.name}_scale", axis=0)
    factor = scale if per_row else f"{stem}_row_scale"
    product = helper.make_node("Mul", [real, factor], [output], name=f"{node.name}_rescale")
    return [lookup, cast, *([pick] if per_row else []), product]
