"""Editing a module: parameters get new values, layers biases, and exported graphs lose operators."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.graph import Operator, arguments, aten, capture, name_of
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

#: Operators with a place for a bias, their third argument.
_BIASED = aten("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear")


class Surgery:
    """A copy of a module whose parameters are edited in place, so that all its layers keep their names."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = copy.deepcopy(module)

    def get(self, name: str) -> Array:
        """A parameter or buffer by its path, as float64."""
        values: Array = self._tensor(name).detach().cpu().double().numpy()
        return values

    def set(self, name: str, values: Array) -> None:
        """Write it, rounded to its own type."""
        import torch

        tensor = self._tensor(name)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def add_bias(self, operator: Operator, values: Array) -> str:
        """Give a layer the bias that it has a place for; `biasable` says which do. Returns the bias's name."""
        import torch

        return add_bias(self.module, operator.weight, torch.from_numpy(values))

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        tensor: torch.Tensor = getattr(self.module.get_submodule(path), attribute)
        return tensor


def biasable(model: Model, operators: Mapping[str, Operator]) -> frozenset[str]:
    """Names of the weights whose operator has no bias but whose module, or exported graph, takes one.

    A module with a forward of its own may never look at its bias, so each gets a zero one and the network is captured
    again.
    """
    if model.module is None:
        raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
    surgery = Surgery(model.module)
    certain, candidates = set(), {}
    for name, operator in operators.items():
        if operator.bias is not None or operator.has_foreign_bias or not has_place_for_bias(surgery.module, name):
            continue
        owner = surgery.module.get_submodule(name.rpartition(".")[0])
        if graph_use(surgery.module, name) is not None or type(owner).__module__.startswith("torch.nn.modules."):
            certain.add(name)
        candidates[name] = surgery.add_bias(operator, np.zeros(operator.out_channels))
    if len(certain) == len(candidates):
        return frozenset(certain)
    edited = replace(model, module=surgery.module)
    found = {operator.weight: operator.bias for operator in capture(edited).operators.values()}
    return frozenset(name for name, bias in candidates.items() if found.get(name) == bias)


def has_place_for_bias(module: torch.nn.Module, weight: str) -> bool:
    """Whether the layer could have a bias and has none; one with a forward of its own need not look at it."""
    import torch
    from torch.nn.modules.conv import _ConvNd

    if (use := graph_use(module, weight)) is not None:
        return name_of(use.node) in _BIASED and arguments(use.node)["bias"] is None
    path, _, attribute = weight.rpartition(".")
    owner = module.get_submodule(path)
    return isinstance(owner, _ConvNd | torch.nn.Linear) and attribute == "weight" and owner.bias is None


def add_bias(module: torch.nn.Module, weight: str, values: torch.Tensor) -> str:
    """Put a bias where there is a place for one, in the weight's type; returns its name."""
    import torch

    path, _, attribute = weight.rpartition(".")
    owner = module.get_submodule(path)
    like: torch.nn.Parameter = getattr(owner, attribute)
    use = graph_use(module, weight)
    name = "bias"
    while use is not None and hasattr(owner, name):
        name += "_"
    owner.register_parameter(name, torch.nn.Parameter(values.to(like.dtype), requires_grad=like.requires_grad))
    if use is not None:
        _read_bias(use, f"{use.name.rpartition('.')[0]}.{name}".lstrip("."))
    return f"{path}.{name}".lstrip(".")


def _read_bias(use: GraphUse, name: str) -> None:
    node = use.node
    with node.graph.inserting_before(node):
        bias = node.graph.get_attr(name)
    if len(node.args) > 2:
        node.update_arg(2, bias)
    else:
        node.update_kwarg("bias", bias)
    use.owner.recompile()


@dataclass(frozen=True, slots=True)
class GraphUse:
    """The one operator of an exported graph that reads a tensor. `name` is the tensor's in the graph's module."""

    owner: GraphModule
    node: Node
    name: str


def graph_use(module: torch.nn.Module, name: str) -> GraphUse | None:
    """None where no exported graph inside the module owns the tensor, or not one operator alone reads it."""
    import torch

    for path, part in module.named_modules():
        if not isinstance(part, torch.fx.GraphModule) or not name.startswith(f"{path}." if path else ""):
            continue
        inner = name[len(path) :].lstrip(".")
        users = [
            user for node in part.graph.nodes if node.op == "get_attr" and node.target == inner for user in node.users
        ]
        return GraphUse(part, users[0], inner) if len(users) == 1 else None
    return None


def bypass(use: GraphUse) -> None:
    """Let the operator's readers read its first operand, and drop all that it alone had read."""
    graph, read = use.node.graph, use.node.all_input_nodes
    use.node.replace_all_uses_with(use.node.all_input_nodes[0])
    graph.erase_node(use.node)
    for node in read[1:]:
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    use.owner.recompile()
