"""Matrix products with block-quantized weights: ONNX Runtime's MatMulNBits, 4 or 8 bits, which keeps them small in
memory too.

Its attribute accuracy_level says what the activations may become: 1 multiplies them in float32, 4 quantizes them to
int8 at run time, one symmetric scale per row and block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.weights import QuantizedWeight, quantize_weight, to_rows
from edgeopt.exporter.onnx_rewrite import constants_of, gemms_as_products, prune_initializers
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx

#: Domain of ONNX Runtime's own operators.
CONTRIB = "com.microsoft"
#: What the kernels can do, widest first.
BLOCK_SIZES = (256, 128, 64, 32, 16)
_FLOAT32, _INT8 = 1, 4


def takes_blocks(scheme: Scheme) -> bool:
    """Whether products become MatMulNBits. With 8-bit weights and float activations that is three times slower than a
    float product; with per-channel int8 weights and run-time ranges MatMulInteger does the same."""
    if scheme.weight_values != "linear" or scheme.activations == "static":
        return False
    if scheme.weight_bits == 4:
        return True
    plain = scheme.weight_symmetric and scheme.weight_estimator == "max" and not scheme.activation_symmetric
    return scheme.activations == "dynamic" and (scheme.weight_granularity == "per-group" or not plain)


def block_size(scheme: Scheme, columns: int) -> int | None:
    """Weights per block for rows of that many, so that every block has one scale; None where no size fits."""
    if scheme.weight_granularity == "per-group" and scheme.group_size < columns:
        return next((size for size in BLOCK_SIZES if scheme.group_size % size == 0), None)
    # One scale for the whole row: what matters is the padding of the last block against the scales of the others.
    scale_bytes = 4 if scheme.weight_symmetric else 5
    return min(BLOCK_SIZES, key=lambda n: -(-columns // n) * (n * scheme.weight_bits // 8 + scale_bytes))


def to_block_products(
    proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme
) -> onnx.ModelProto:
    """A copy in which every product with a constant matrix is a MatMulNBits of the same name."""
    result = gemms_as_products(proto)
    graph = result.graph
    constants = constants_of(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or not weight.size or exempt(node):
            nodes.append(node)
            continue
        size = block_size(scheme, weight.shape[0])
        nodes.append(node if size is None else _product(node, weight, scheme, size, graph))
    del graph.node[:]
    graph.node.extend(nodes)
    prune_initializers(graph)
    declare_contrib(result)
    return result


def declare_contrib(proto: onnx.ModelProto) -> None:
    """Say that ONNX Runtime's own operators are used, where they are."""
    from onnx import helper

    used = any(node.domain == CONTRIB for node in proto.graph.node)
    if used and not any(opset.domain == CONTRIB for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def declare_float(graph: onnx.GraphProto, name: str) -> None:
    """Note the type of what an operator gives that ONNX's shape inference doesn't know."""
    from onnx import TensorProto, helper

    if not any(value.name == name for value in graph.output):
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _product(node: onnx.NodeProto, weight: Array, scheme: Scheme, size: int, graph: onnx.GraphProto) -> onnx.NodeProto:
    from onnx import helper, numpy_helper

    stem = f"{node.input[1]}_blocks{scheme.weight_bits}"
    names = [stem, f"{stem}_scale", *([] if scheme.weight_symmetric else [f"{stem}_zero_point"])]
    if not any(i.name == stem for i in graph.initializer):
        parts = _blocks(quantize_weight(weight, scheme, axis=1), scheme.weight_bits, size)
        graph.initializer.extend(numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=False))
    declare_float(graph, node.output[0])
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], *names],
        [node.output[0]],
        name=node.name,
        domain=CONTRIB,
        K=weight.shape[0],
        N=weight.shape[1],
        bits=scheme.weight_bits,
        block_size=size,
        accuracy_level=_INT8 if scheme.activations == "dynamic" else _FLOAT32,
    )


def _blocks(weight: QuantizedWeight, bits: int, size: int) -> tuple[Array, Array, Array]:
    """Values (N, blocks, bytes), scales (N, blocks) and zero points (N, bytes), all unsigned, low half byte first."""
    half = 2 ** (bits - 1)
    # Per tensor, to_rows without an axis would not put output channels first.
    rows = to_rows(weight.values, 1).astype(np.int16) + half
    count = -(-rows.shape[1] // size)
    scale, zero_point = block_parameters(weight, rows.shape[0], count, size)
    padded = np.full((rows.shape[0], count * size), half, dtype=np.uint8)
    padded[:, : rows.shape[1]] = rows
    points = (zero_point.astype(np.int16) + half).astype(np.uint8)
    if bits == 8:
        return padded.reshape(rows.shape[0], count, size), scale, points
    return pack_halves(padded).reshape(rows.shape[0], count, size // 2), scale, pack_halves(points)


def block_parameters(weight: QuantizedWeight, rows: int, count: int, size: int) -> tuple[Array, Array]:
    """Scale and zero point of every block, (rows, count), whatever the weight's own granularity."""
    if weight.group_size is None:
        spread = [np.broadcast_to(part.reshape(-1, 1), (rows, count)) for part in (weight.scale, weight.zero_point)]
    else:
        group = np.minimum(np.arange(count) * size // weight.group_size, weight.scale.shape[1] - 1)
        spread = [part[:, group] for part in (weight.scale, weight.zero_point)]
    return np.ascontiguousarray(spread[0], dtype=np.float32), np.ascontiguousarray(spread[1])


def pack_halves(values: Array) -> Array:
    """Two 4-bit values of a row in each byte, the first in the low half; odd rows end in a zero."""
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).astype(np.uint8) & 15
    packed: Array = even[:, 0::2] | (even[:, 1::2] << 4)
    return packed
