"""Shapes of an ONNX graph's tensors, through ONNX Runtime's own operators, which ONNX's inference stops at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]

#: Operators whose results are as large as their first input, or where two are added, as the larger one.
#: (github.com/microsoft/onnxruntime, docs/ContribOperators.md)
_SAME = frozenset(
    {
        "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
        "SimplifiedLayerNormalization", "LayerNormalization", "QuantizeLinear", "DequantizeLinear", "QLinearAdd",
        "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "RotaryEmbedding",
    }
)  # fmt: skip
#: Matrix products, with the position of the right operand.
_PRODUCTS = {"MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "FusedMatMul": 1, "QGemm": 3}
_SECOND_OPERAND = {"QLinearAdd": 3, "QLinearMul": 3}
_DOMAIN = "com.microsoft"


def infer(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with all shapes in `value_info` that can be told. Adds those of ONNX Runtime's operators to `model`."""
    import onnx

    while True:
        try:
            graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        except (onnx.shape_inference.InferenceError, ValueError):
            return model.graph  # over 2 GiB, or ill-typed: what the file itself declares has to do
        found = list(_contributed(graph))
        if not found:
            return graph
        model.graph.value_info.extend(found)


def _contributed(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    """What can be told now of outputs whose shape is not known yet."""
    import onnx

    shapes: dict[str, Shape] = {i.name: tuple(i.dims) for i in graph.initializer}
    types = {i.name: i.data_type for i in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(d.dim_value or 1 for d in info.type.tensor_type.shape.dim)
            types[info.name] = info.type.tensor_type.elem_type
    for node in graph.node:
        if node.domain != _DOMAIN or node.output[0] in shapes:
            continue
        shape = _result(node, shapes)
        if shape is not None:
            kind = types.get(node.input[0]) if node.op_type in _SAME else None
            for name in _same_sized(node.output):
                yield onnx.helper.make_tensor_value_info(name, kind or onnx.TensorProto.FLOAT, shape)


def _same_sized(outputs: Sequence[str]) -> list[str]:
    """The result, and the sum that a normalization hands on as its fourth output."""
    return [name for position, name in enumerate(outputs) if name and position in (0, 3)]


def _result(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> Shape | None:
    left = shapes.get(node.input[0])
    if node.op_type == "GatherBlockQuantized":
        rows = shapes.get(node.input[1])
        scales = shapes.get(node.input[2])
        if rows is None or scales is None:
            return None
        block = next((a.i for a in node.attribute if a.name == "block_size"), 128)
        return (*rows, scales[-1] * block)
    if left is None:
        return None
    if node.op_type == "MatMulNBits":
        return (*left[:-1], next(a.i for a in node.attribute if a.name == "N"))
    if node.op_type in _PRODUCTS:
        right = shapes.get(node.input[_PRODUCTS[node.op_type]])
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        return None if right is None else (*left[:-1], right[-2] if transposed else right[-1])
    if node.op_type in _SECOND_OPERAND:
        right = shapes.get(node.input[_SECOND_OPERAND[node.op_type]])
        return None if right is None else max(left, right, key=lambda shape: (len(shape), shape))
    return left if node.op_type in _SAME else None
