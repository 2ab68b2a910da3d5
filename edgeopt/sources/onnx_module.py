"""A torch module that runs the nodes of an ONNX graph."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgeopt.sources.onnx_graph import Graph
from edgeopt.sources.onnx_layers import layer_for
from edgeopt.sources.onnx_ops_host import HOST_OPERATORS
from edgeopt.sources.onnx_ops_math import MATH_OPERATORS
from edgeopt.sources.onnx_ops_nn import NN_OPERATORS
from edgeopt.sources.onnx_ops_shape import SHAPE_OPERATORS
from edgeopt.sources.onnx_values import Node, Value, is_host, tensor
from edgeopt.types import Array

OPERATORS = MATH_OPERATORS | SHAPE_OPERATORS | NN_OPERATORS

#: Integer constants up to this many elements are sizes, axes or indices, and stay on the host.
HOST_ELEMENTS = 64

#: Operators whose result's size is the value of an input -> the first such input.
_SIZED_BY = {"ConstantOfShape": 0, "Range": 0, "Expand": 1, "Slice": 1}


@dataclass(frozen=True, slots=True)
class Step:
    """One node, the layer that holds its weights if it is one, and the values that nobody needs after it."""

    node: Node
    layer: str | None
    finished: tuple[str, ...]


class OnnxModule(nn.Module):
    """Takes the graph's inputs in order, returns its outputs in order.

    Convolutions, linear and normalization layers are submodules named after their nodes; other weights are buffers.
    Raises ConversionError, naming operator and node, for an operator that is not known.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.input_names = graph.inputs
        self.output_names = graph.outputs
        weights = graph.weights
        layers: list[tuple[Node, str | None]] = []
        for node in _fuse_bias(graph):
            layer = layer_for(node, weights, graph.ranks.get(node.inputs[0]) if node.inputs else None)
            layers.append((node, None if layer is None else self._register(node.name, layer)))
            if layer is None and node.op not in OPERATORS:
                raise node.error(_why_unknown(node))
        used = {name for node, layer in layers if layer is None for name in node.inputs} | set(graph.outputs)
        parameters = {name for node, _ in layers if node.op in ("Resize", "Upsample") for name in node.inputs[1:]}
        self.constants: dict[str, Array] = {}
        self.buffer_names: dict[str, str] = {}
        for name, array in weights.items():
            if name not in used:
                continue
            if _belongs_on_host(array) or name in parameters:
                self.constants[name] = array
            else:
                self.buffer_names[name] = self._register(name, torch.from_numpy(array.copy()))
        self.steps = _with_lifetimes(layers, graph.outputs)
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: dict[str, Value | None] = dict(zip(self.input_names, tensors, strict=True))
        values.update(self.constants)
        values.update({name: self.get_buffer(path) for name, path in self.buffer_names.items()})
        values[""] = None
        for step in self.steps:
            # A layer holds its weights itself.
            names = step.node.inputs if step.layer is None else step.node.inputs[:1]
            try:
                results = self._run(step, [values[name] for name in names])
            except Exception as error:
                # For whoever reports it: torch's own message doesn't know the graph.
                error.add_note(f"operator {step.node.op}, node {step.node.name!r}")
                raise
            values.update(zip(step.node.outputs, results, strict=False))
            for name in step.finished:
                del values[name]
        outputs = Node("Output", "graph output", self.output_names, (), {}, 0)
        return tuple(tensor(values[name], outputs) for name in self.output_names)

    def _run(self, step: Step, args: list[Value | None]) -> tuple[Value, ...]:
        node = step.node
        if step.layer is not None:
            result: torch.Tensor = self.get_submodule(step.layer)(tensor(args[0], node))
            return (result,)
        hosted = [arg for arg in args if isinstance(arg, np.ndarray)]
        if args and node.op in HOST_OPERATORS and all(is_host(arg) for arg in args) and _can_host(node, hosted):
            return (HOST_OPERATORS[node.op](node, hosted),)
        outcome = OPERATORS[node.op](node, args)
        return outcome if isinstance(outcome, tuple) else (outcome,)

    def _register(self, name: str, part: nn.Module | torch.Tensor) -> str:
        """Under the ONNX name as far as Python allows; returns the attribute's name."""
        base = re.sub(r"\W+", "_", name).strip("_") or "node"
        attribute = f"n{base}" if base[0].isdigit() else base
        while hasattr(self, attribute):
            attribute += "_"
        if isinstance(part, nn.Module):
            self.add_module(attribute, part)
        else:
            self.register_buffer(attribute, part)
        return attribute


def _belongs_on_host(array: Array) -> bool:
    return array.size == 1 or (array.dtype.kind in "ib" and array.size <= HOST_ELEMENTS)


def _can_host(node: Node, args: list[Array]) -> bool:
    """Whether NumPy can do it: it has no arrays of symbolic size."""
    return node.op not in _SIZED_BY or all(arg.dtype != object for arg in args[_SIZED_BY[node.op] :])


def _why_unknown(node: Node) -> str:
    if "Quantize" in node.op or node.op.startswith("QLinear") or node.op.endswith("Integer"):
        return "the graph is quantized already; edgeopt starts from the float model"
    return "can't be rebuilt in torch"


def _with_lifetimes(layers: list[tuple[Node, str | None]], outputs: tuple[str, ...]) -> tuple[Step, ...]:
    made = {name for node, _ in layers for name in node.outputs}
    alive = set(outputs)
    steps: list[Step] = []
    for node, layer in reversed(layers):
        last = tuple(name for name in dict.fromkeys((*node.inputs, *node.outputs)) if name in made - alive and name)
        alive.update(node.inputs)
        steps.append(Step(node, layer, last))
    return tuple(reversed(steps))


def _fuse_bias(graph: Graph) -> list[Node]:
    """A MatMul with a constant matrix and the Add of a constant row behind it as one node, which torch calls Linear."""
    weights = graph.weights
    consumers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            consumers.setdefault(name, []).append(node)
    fused: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        add = _bias_add(node, weights, consumers, graph.outputs)
        if add is not None:
            bias = next(name for name in add.inputs if name != node.outputs[0])
            fused[node.outputs[0]] = Node("MatMul", node.name, (*node.inputs, bias), add.outputs, {}, node.opset)
            gone.add(add.outputs[0])
    return [fused.get(node.outputs[0], node) for node in graph.nodes if node.outputs[0] not in gone]


def _bias_add(
    node: Node, weights: dict[str, Array], consumers: dict[str, list[Node]], outputs: tuple[str, ...]
) -> Node | None:
    if node.op != "MatMul" or node.inputs[1] not in weights or weights[node.inputs[1]].ndim != 2:
        return None
    users = consumers.get(node.outputs[0], [])
    if len(users) != 1 or users[0].op != "Add" or node.outputs[0] in outputs:
        return None
    biases = [weights[name] for name in users[0].inputs if name in weights]
    is_row = len(biases) == 1 and biases[0].shape == weights[node.inputs[1]].shape[1:]
    return users[0] if is_row else None
