"""Equivalent float graphs that Qualcomm's HTP takes whole: composite operators as one node, biases inside products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.exporter.onnx_graph import at_opset
from edgeopt.exporter.onnx_rewrite import captured_names, constants_of, number, prune_initializers
from edgeopt.telemetry import opt_out
from edgeopt.types import Array

if TYPE_CHECKING:
    import onnx
    from onnxruntime.quantization.fusions.fusion import Fusion

#: The first whose QuantizeLinear knows 16 bits, and which has Gelu; QNN's provider is built for it.
HTP_OPSET = 21
#: What an attention mask's "minus infinity" becomes. exp(-64) is zero in 16 bits and in float16, and a range that holds
#: it leaves steps for the scores.
MASK = -64.0
_MASK_LIKE = -1e4
#: What a mask passes through on its way to the Softmax.
_MASK_PATH = frozenset(
    {
        "Add", "Sub", "Mul", "Where", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Slice", "Concat",
        "Gather", "Cast", "Min", "Max", "Tile",
    }
)  # fmt: skip


def for_htp(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A copy in the form that HTP takes whole; `name` is the model's, for errors.

    - The parts of Gelu (by erf), LayerNormalization and the L2 norm become these operators: HTP has no Erf, and eight
      bits between the parts of a norm would ruin it.
    - A product with constant weights and its bias become one Gemm, whose bias has 32 bits, between two reshapes.
    - The square by Pow becomes a product, whose range HTP keeps.
    - A GatherND that reads everything in order, as transformers' masks do, becomes a Reshape.
    - A BatchNormalization that no convolution has absorbed becomes a depthwise one, which has a scale per channel.
    - Mask constants that only a Softmax gets to see end at `MASK`; what guards that Softmax against rows without any
      key goes, as none of its inputs is infinite any more.

    Raises ConversionError where the opset can't be raised.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy = _fused(at_opset(copy, HTP_OPSET, name))
    graph = copy.graph
    _limit_masks(graph)
    _drop_softmax_guards(graph)
    _square_by_product(graph)
    _whole_gathers_as_reshapes(copy)
    _norms_as_convolutions(copy)
    _bias_into_products(copy)
    prune_initializers(graph)
    return copy


def check_static(proto: onnx.ModelProto) -> None:
    """Raise ConversionError where an input's size is open."""
    constants = {i.name for i in proto.graph.initializer}
    for value in proto.graph.input:
        shape = value.type.tensor_type.shape.dim
        if value.name not in constants and not all(d.HasField("dim_value") and d.dim_value > 0 for d in shape):
            sizes = ", ".join(d.dim_param or str(d.dim_value) for d in shape)
            raise ConversionError(
                f"has the open shape ({sizes}), and HTP takes fixed sizes only",
                where=f"input {value.name!r}",
                fix="declare a fixed size for every dimension",
            )


def _fused(proto: onnx.ModelProto) -> onnx.ModelProto:
    """By ONNX Runtime's own fusions; the new nodes are named after the layer that they stand for."""
    opt_out()
    from onnxruntime.quantization.execution_providers.qnn.fusion_lpnorm import FusionLpNormalization
    from onnxruntime.quantization.fusions import FusionGelu, FusionLayerNormalization
    from onnxruntime.quantization.onnx_model import ONNXModel

    before = list(proto.graph.node)
    layers = {output: node.name.rpartition("/")[0] for node in before for output in node.output}
    taken = {node.name for node in before}
    model = ONNXModel(proto)
    for kind in (FusionGelu, FusionLpNormalization, FusionLayerNormalization):
        fusion: Fusion = kind(model)
        fusion.apply()
    model.topological_sort()
    result: onnx.ModelProto = model.model
    for node in result.graph.node:
        if node.op_type == "Gelu":
            node.domain = ""  # the same function since opset 20
        if node.name not in taken:
            layer = layers.get(node.output[0], "")
            node.name = _unique(f"{layer}/{node.op_type}" if layer else node.op_type, taken)
            taken.add(node.name)
    if not any(node.domain == "com.microsoft" for node in result.graph.node):
        standard = [opset for opset in result.opset_import if opset.domain != "com.microsoft"]
        del result.opset_import[:]
        result.opset_import.extend(standard)
    return result


def _unique(name: str, taken: set[str]) -> str:
    candidates = (f"{name}_{i}" if i else name for i in range(len(taken) + 1))
    return next(candidate for candidate in candidates if candidate not in taken)


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def _limit_masks(graph: onnx.GraphProto) -> None:
    from onnx import numpy_helper

    readers = _readers(graph)
    outputs = {o.name for o in graph.output} | set(captured_names(graph.node))

    def masks(name: str, seen: frozenset[str]) -> bool:
        """Whether everything that is made of a tensor ends in a Softmax."""
        if name in outputs or name in seen or name not in readers:
            return False
        return all(
            node.op_type == "Softmax"
            or (node.op_type in _MASK_PATH and all(masks(output, seen | {name}) for output in node.output))
            for node in readers[name]
        )

    limited: dict[str, Array] = {}
    for name, values in constants_of(graph).items():
        if values.dtype == np.float32 and values.size and values.min() <= _MASK_LIKE and masks(name, frozenset()):
            limited[name] = np.maximum(values, np.float32(MASK))
    for tensor in graph.initializer:
        if tensor.name in limited:
            tensor.CopyFrom(numpy_helper.from_array(limited[tensor.name], tensor.name))
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in limited:
            for attribute in node.attribute:
                if attribute.name == "value":
                    attribute.t.CopyFrom(numpy_helper.from_array(limited[node.output[0]]))


def _drop_softmax_guards(graph: onnx.GraphProto) -> None:
    """Where(IsNaN(s), 0, s) is s when s is a Softmax of finite values."""
    makers = {output: node for node in graph.node for output in node.output}
    constants = constants_of(graph)
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Where":
            continue
        test, source = makers.get(node.input[0]), makers.get(node.input[2])
        guarded = test is not None and test.op_type == "IsNaN" and test.input[0] == node.input[2]
        zero = node.input[1] in constants and not constants[node.input[1]].any()
        if guarded and zero and source is not None and source.op_type == "Softmax":
            renamed[node.output[0]] = node.input[2]
    if not renamed or renamed.keys() & {o.name for o in graph.output}:
        return
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [n for n in graph.node if n.op_type not in ("Where", "IsNaN") or read.intersection(n.output)]
    read = {name for node in kept for name in node.input} | {o.name for o in graph.output}
    kept = [n for n in kept if n.op_type != "IsNaN" or read.intersection(n.output)]
    del graph.node[:]
    graph.node.extend(kept)


def _square_by_product(graph: onnx.GraphProto) -> None:
    constants = constants_of(graph)
    for node in graph.node:
        exponent = constants.get(node.input[1]) if node.op_type == "Pow" else None
        if exponent is not None and exponent.size == 1 and exponent.reshape(-1)[0] == 2:
            node.op_type = "Mul"
            node.input[:] = [node.input[0], node.input[0]]


def _whole_gathers_as_reshapes(proto: onnx.ModelProto) -> None:
    from onnx import helper, numpy_helper

    graph = proto.graph
    constants, shapes = constants_of(graph), _static_shapes(proto)
    for node in graph.node:
        if node.op_type != "GatherND" or node.input[1] not in constants or number(node, "batch_dims", 0):
            continue
        shape, indices = shapes.get(node.input[0], ()), constants[node.input[1]]
        if not shape or indices.shape[-1] != len(shape) or indices.min(initial=0) < 0:
            continue
        positions = np.ravel_multi_index(tuple(indices.reshape(-1, len(shape)).T), shape, mode="clip")
        if np.array_equal(positions, np.arange(math.prod(shape))):
            name = f"{node.output[0]}_shape"
            graph.initializer.append(numpy_helper.from_array(np.array(indices.shape[:-1], dtype=np.int64), name))
            node.CopyFrom(helper.make_node("Reshape", [node.input[0], name], [node.output[0]], name=node.name))


def _norms_as_convolutions(proto: onnx.ModelProto) -> None:
    """BatchNormalization(x) = x * scale / sqrt(variance + epsilon) + (bias - mean * that factor), per channel."""
    from onnx import helper, numpy_helper

    graph = proto.graph
    constants, shapes = constants_of(graph), _static_shapes(proto)
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not all(name in constants for name in node.input[1:]):
            continue
        rank = len(shapes.get(node.input[0], ()))
        if rank < 3 or number(node, "training_mode", 0):
            continue
        scale, bias, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:])
        factor = scale / np.sqrt(variance + number(node, "epsilon", 1e-5))
        stem = f"{node.output[0]}_per_channel"
        parts = {f"{stem}_weight": factor.reshape(-1, *(1,) * (rank - 1)), f"{stem}_bias": bias - mean * factor}
        graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), name) for name, a in parts.items())
        node.CopyFrom(
            helper.make_node("Conv", [node.input[0], *parts], [node.output[0]], name=node.name, group=factor.size)
        )


def _bias_into_products(proto: onnx.ModelProto) -> None:
    """MatMul(x, W) + b = Reshape(Gemm(Reshape(x), W, b)), under the product's name, where x has a known shape."""
    graph = proto.graph
    constants, readers, shapes = constants_of(graph), _readers(graph), _static_shapes(proto)
    outputs = {o.name for o in graph.output} | set(captured_names(graph.node))
    merged: dict[str, list[onnx.NodeProto]] = {}
    added: set[str] = set()
    for node in graph.node:
        product = node.output[0]
        if node.op_type != "MatMul" or product in outputs or len(readers.get(product, ())) != 1:
            continue
        add = readers[product][0]
        bias = next((n for n in add.input if n in constants), None) if add.op_type == "Add" else None
        shape, weight = shapes.get(node.input[0]), constants.get(node.input[1])
        if bias is None or shape is None or weight is None or weight.ndim != 2:
            continue
        if constants[bias].shape != (weight.shape[1],) or len(shape) < 2:
            continue
        merged[node.name] = _biased(graph, node, add, bias, shape, weight)
        added.add(add.name)
    nodes = [part for node in graph.node if node.name not in added for part in merged.get(node.name, [node])]
    del graph.node[:]
    graph.node.extend(nodes)


def _biased(
    graph: onnx.GraphProto,
    product: onnx.NodeProto,
    add: onnx.NodeProto,
    bias: str,
    shape: tuple[int, ...],
    weight: Array,
) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper

    output = add.output[0]
    if len(shape) == 2:
        return [helper.make_node("Gemm", [*product.input, bias], [output], name=product.name)]
    rows, flat = f"{output}_rows", f"{output}_flat"
    sizes = {
        f"{output}_flat_shape": (math.prod(shape[:-1]), shape[-1]),
        f"{output}_shape": (*shape[:-1], weight.shape[1]),
    }
    for name, size in sizes.items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(size)], size))
    flatten, restore = sizes
    return [
        helper.make_node("Reshape", [product.input[0], flatten], [flat], name=f"{product.name}_flatten"),
        helper.make_node("Gemm", [flat, product.input[1], bias], [rows], name=product.name),
        helper.make_node("Reshape", [rows, restore], [output], name=f"{product.name}_restore"),
    ]


def _static_shapes(proto: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the tensors whose sizes are all known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.HasField("shape")
    }
    return {name: shape for name, shape in shapes.items() if all(shape)}
