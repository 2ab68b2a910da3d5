"""An ONNX file, simplified and taken apart into nodes and weights that know nothing of protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.sources.onnx_file import opset
from edgeopt.sources.onnx_values import Attribute, Node
from edgeopt.types import Array, Dim, TensorSpec

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in execution order; `ranks` holds the number of dimensions of every value for which it is known."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    weights: dict[str, Array]
    ranks: dict[str, int]


def load_graph(path: Path, inputs: tuple[TensorSpec, ...]) -> Graph:
    """Read a checked file at the declared input sizes, constants folded, functions inlined.

    Raises ConversionError when onnxsim can't simplify it.
    """
    import onnx
    import onnxsim

    model = onnx.load(path)
    _fix_sizes(model, inputs)
    try:
        model, _ = onnxsim.simplify(model, inline_functions=True, certify=False)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:
        # onnxsim's native core raises several kinds without a common base.
        raise ConversionError(
            f"onnxsim can't simplify it: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=str(path),
            fix="choose an ONNX target, which takes the graph as it is",
        ) from error
    return _take_apart(model)


def _fix_sizes(model: onnx.ModelProto, inputs: tuple[TensorSpec, ...]) -> None:
    """Write the declared static sizes into the graph's inputs, so that whatever follows from them is folded."""
    specs = {spec.name: spec for spec in inputs}
    for value in model.graph.input:
        if value.name not in specs:
            continue
        for dim, size in zip(value.type.tensor_type.shape.dim, specs[value.name].shape, strict=True):
            if isinstance(size, Dim):
                dim.dim_param = size.name
            else:
                dim.dim_value = size
    # Sizes noted for the original inputs may contradict the declared ones.
    del model.graph.value_info[:]


def _take_apart(model: onnx.ModelProto) -> Graph:
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    version = opset(model)
    nodes = tuple(
        Node(
            op=node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}",
            name=node.name or (node.output[0] if node.output else f"node_{index}"),
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes={attribute.name: _attribute(attribute) for attribute in node.attribute},
            opset=version,
        )
        for index, node in enumerate(graph.node)
    )
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    return Graph(
        inputs=tuple(value.name for value in graph.input if value.name not in weights),
        outputs=tuple(value.name for value in graph.output),
        nodes=nodes,
        weights=weights,
        ranks=ranks,
    )


def _attribute(attribute: onnx.AttributeProto) -> Attribute:
    from onnx import AttributeProto, numpy_helper

    match attribute.type:
        case AttributeProto.INT:
            return int(attribute.i)
        case AttributeProto.FLOAT:
            return float(attribute.f)
        case AttributeProto.STRING:
            return bytes(attribute.s).decode(errors="replace")
        case AttributeProto.INTS:
            return tuple(int(item) for item in attribute.ints)
        case AttributeProto.FLOATS:
            return tuple(float(item) for item in attribute.floats)
        case AttributeProto.TENSOR:
            array: Array = numpy_helper.to_array(attribute.t)
            return array
        case _:
            # Subgraphs belong to If, Loop and Scan, which are refused by their name.
            return str(AttributeProto.AttributeType.Name(attribute.type))
