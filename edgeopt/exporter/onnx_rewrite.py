"""Equivalent float graphs that use operators with int8 kernels in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.types import Array

if TYPE_CHECKING:
    import onnx


def constants_of(graph: onnx.GraphProto) -> dict[str, Array]:
    """Initializers and Constant nodes, by tensor name."""
    from onnx import numpy_helper

    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    arrays[node.output[0]] = numpy_helper.to_array(attribute.t)
    return arrays


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """Attribute name -> value."""
    import onnx

    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def number(node: onnx.NodeProto, attribute: str, default: float) -> float:
    """A numeric attribute, or its default."""
    value = attributes(node).get(attribute, default)
    return float(value) if isinstance(value, int | float) else default


def captured_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names that the bodies of If, Loop and Scan read; they must stay what they are."""
    import onnx

    for node in nodes:
        for attribute in node.attribute:
            for body in (
                (attribute.g, *attribute.graphs)
                if attribute.type
                in (
                    onnx.AttributeProto.GRAPH,
                    onnx.AttributeProto.GRAPHS,
                )
                else ()
            ):
                for inner in body.node:
                    yield from inner.input
                yield from (output.name for output in body.output)
                yield from captured_names(body.node)


def prune_initializers(graph: onnx.GraphProto) -> None:
    """Drop the constants that nothing reads any more. Those that are declared as inputs stay, as the interface does."""
    read = {name for node in graph.node for name in node.input}
    read.update(captured_names(graph.node), (value.name for value in (*graph.input, *graph.output)))
    kept = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def int4_tensor(values: Array, name: str) -> onnx.TensorProto:
    """A constant of ONNX's type INT4 (UINT4 for unsigned values): two in a byte, the first in the low half."""
    from onnx import TensorProto, helper

    flat = np.ravel(values).view(np.uint8) & 15
    even = np.pad(flat, (0, flat.size % 2))
    kind = TensorProto.UINT4 if values.dtype == np.uint8 else TensorProto.INT4
    packed = (even[0::2] | (even[1::2] << 4)).astype(np.uint8)
    return helper.make_tensor(name, kind, values.shape, packed.tobytes(), raw=True)


def for_int8(proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool]) -> onnx.ModelProto:
    """A copy in which what has no int8 kernel, but an equivalent that has, is replaced by it.

    - HardSwish(x) = x * HardSigmoid(x; 1/6, 1/2).
    - AveragePool with ceil_mode = one with as much padding, which isn't counted, at the end of each axis: the int8
      kernel divides by the whole window where that hangs over the edge.
    - The mean over height and width of a 4-D tensor = GlobalAveragePool, squeezed where the mean drops dimensions.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    constants = constants_of(copy.graph)
    shapes = _shapes(copy)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        if exempt(node):
            nodes.append(node)
        elif node.op_type == "HardSwish":
            nodes += _split_hardswish(node)
        elif node.op_type == "AveragePool" and number(node, "ceil_mode", 0):
            nodes.append(_padded_pool(node, shapes.get(node.input[0], ())))
        elif node.op_type == "ReduceMean" and _is_spatial(node, constants, ranks):
            nodes += _pool(node, copy.graph)
        else:
            nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def gemms_as_products(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which Gemm(x, W, b) is MatMul(x, W) + b, under the Gemm's name, with W transposed where that was asked.

    ONNX Runtime's dynamic quantizer does the same, but transposes a weight that two of them share twice, and forgets
    which ones were to stay float.
    """
    import onnx
    from onnx import helper, numpy_helper

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    constants = constants_of(graph)
    transposed: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "Gemm" else None
        scaled = any(number(node, factor, 1) != 1 for factor in ("alpha", "beta"))
        if weight is None or scaled or number(node, "transA", 0):
            nodes.append(node)
            continue
        name, output = node.input[1], node.output[0]
        if number(node, "transB", 0):
            if name not in transposed:
                transposed[name] = f"{name}_transposed"
                array = np.ascontiguousarray(weight.T)
                graph.initializer.append(numpy_helper.from_array(array, transposed[name]))
            name = transposed[name]
        biased = len(node.input) > 2 and bool(node.input[2])
        product = f"{output}_product" if biased else output
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product], name=node.name))
        if biased:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [output], name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    prune_initializers(graph)
    return copy


def _split_hardswish(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx import helper

    gate = f"{node.output[0]}_gate"
    layer = node.name.rpartition("/")[0]
    prefix = f"{layer}/" if layer else ""
    serial = node.name.rpartition("/")[2].removeprefix("HardSwish")
    return [
        helper.make_node(
            "HardSigmoid", [node.input[0]], [gate], name=f"{prefix}HardSwish_gate{serial}", alpha=1 / 6, beta=0.5
        ),
        helper.make_node("Mul", [node.input[0], gate], [node.output[0]], name=node.name),
    ]


def _is_spatial(node: onnx.NodeProto, constants: Mapping[str, Array], ranks: Mapping[str, int]) -> bool:
    if len(node.input) < 2 or node.input[1] not in constants or ranks.get(node.input[0]) != 4:
        return False
    return sorted(int(axis) % 4 for axis in constants[node.input[1]].reshape(-1)) == [2, 3]


def _pool(node: onnx.NodeProto, graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    from onnx import helper, numpy_helper

    if number(node, "keepdims", 1):
        return [helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], name=node.name)]
    pooled, axes = f"{node.output[0]}_pooled", f"{node.output[0]}_axes"
    graph.initializer.append(numpy_helper.from_array(np.array([2, 3], dtype=np.int64), axes))
    return [
        helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name),
        helper.make_node("Squeeze", [pooled, axes], [node.output[0]], name=f"{node.name}_squeeze"),
    ]


def _padded_pool(node: onnx.NodeProto, shape: tuple[int, ...]) -> onnx.NodeProto:
    """The same pooling without ceil_mode; the node itself where sizes are unknown or its own padding counts."""
    from onnx import helper

    given = attributes(node)
    kernel, spatial = _integers(given, "kernel_shape", ()), shape[2:]
    rank = len(kernel)
    strides, pads = _integers(given, "strides", (1,) * rank), _integers(given, "pads", (0,) * 2 * rank)
    plain = given.get("auto_pad", b"NOTSET") == b"NOTSET" and set(_integers(given, "dilations", (1,))) == {1}
    counted = any(pads) and bool(given.get("count_include_pad", 0))
    if not plain or counted or len(spatial) != rank or not all(spatial):
        return node
    ends = []
    for axis, (size, window, stride) in enumerate(zip(spatial, kernel, strides, strict=True)):
        start, end = pads[axis], pads[rank + axis]
        steps = -(-(size + start + end - window) // stride)
        if steps * stride >= size + start:  # no window begins in the padding at the end
            steps -= 1
        ends.append(max(steps * stride + window - size - start, 0))
    return helper.make_node(
        "AveragePool",
        node.input,
        node.output,
        name=node.name,
        kernel_shape=kernel,
        strides=strides,
        pads=(*pads[:rank], *ends),
    )


def _integers(given: Mapping[str, object], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = given.get(name, default)
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else default


def _shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape by tensor name, 0 for what is unknown or dynamic; tensors of unknown rank are absent."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    infos = (*graph.value_info, *graph.input, *graph.output)
    return {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in infos
        if v.type.tensor_type.HasField("shape")
    }
