"""int8 at the file's edges: the first quantize and the last dequantize operators move into the caller's hands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.executorch_graph import operator_name
from edgeopt.types import Model, QuantParams

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def quantize_io(
    graph: GraphModule, model: Model, inputs: tuple[torch.Tensor, ...]
) -> tuple[dict[str, QuantParams], tuple[torch.Tensor, ...]]:
    """Make every float input and output of a converted graph int8, in place.

    Returns:
        the parameters by input or output name, and example inputs of the new types.

    Raises:
        ConversionError: when the graph computes with one of them in float.
    """
    import torch

    parameters: dict[str, QuantParams] = {}
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    examples = list(inputs)
    for position, (spec, node) in enumerate(zip(model.inputs, placeholders, strict=True)):
        if spec.dtype != "float32":
            continue
        params = _input_parameters(node, spec.name)
        for user in list(node.users):
            user.replace_all_uses_with(node)
            graph.graph.erase_node(user)
        node.meta["val"] = node.meta["val"].to(torch.int8) if "val" in node.meta else None
        parameters[spec.name] = params
        scaled = torch.round(examples[position] / params.scale[0]) + params.zero_point[0]
        examples[position] = scaled.clamp(-128, 127).to(torch.int8)
    output = next(node for node in graph.graph.nodes if node.op == "output")
    for spec, node in zip(model.outputs, _flat_outputs(output), strict=True):
        if spec.dtype != "float32":
            continue
        parameters[spec.name] = _output_parameters(node, spec.name)
    for node in list(output.all_input_nodes):
        if operator_name(node) == _DEQUANTIZE:
            output.replace_input_with(node, node.all_input_nodes[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return parameters, tuple(examples)


def _flat_outputs(output: Node) -> list[Node]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output.args) if hasattr(leaf, "meta")]


def _input_parameters(node: Node, name: str) -> QuantParams:
    found = {user.args[1:3] for user in node.users if operator_name(user) == _QUANTIZE}
    if len(found) != 1 or any(operator_name(user) != _QUANTIZE for user in node.users):
        raise _stays_float("input", name)
    return _parameters(*found.pop())


def _output_parameters(node: Node, name: str) -> QuantParams:
    if operator_name(node) != _DEQUANTIZE:
        raise _stays_float("output", name)
    return _parameters(*node.args[1:3])


def _parameters(scale: object, zero_point: object) -> QuantParams:
    return QuantParams(scale=(float(str(scale)),), zero_point=(int(str(zero_point)),))


def _stays_float(kind: str, name: str) -> ConversionError:
    return ConversionError(
        "the layer next to it computes in float, so it can't be int8",
        where=f"{kind} {name!r}",
        fix='use io = "float", or quantize that layer too',
    )
