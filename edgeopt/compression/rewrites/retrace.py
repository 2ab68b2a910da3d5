"""Exporting a network to its ATen graph, and tracing that again with other forms of some of its operators.

The result is an exported graph whose operators still know their source layers. Weights keep their names; what a new
form computes from weights alone is computed once and becomes a weight beside them.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeopt.compression.graph import arguments, name_of
from edgeopt.compression.layers import arguments_of
from edgeopt.compression.rewrites.base import Form
from edgeopt.errors import ConversionError
from edgeopt.sources.adapter import takes_any_number
from edgeopt.types import Dim, Model, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

#: Marks operators that a new form brought in, in their `custom` metadata.
_NEW = "edgeopt_rewritten"
#: Metadata that a new operator inherits and that calls it what it is no more: quantizers look for operators by it.
_OLD_ORIGIN = ("torch_fn", "source_fn_stack", "from_node", "custom")


def exported(model: Model) -> GraphModule:
    """The network as an exported graph, with the model's dynamic dimensions.

    Raises ConversionError where torch.export can't follow it.
    """
    import torch

    if model.module is None:
        raise ValueError("a rewrite takes a model with a torch module; see sources.as_torch")
    if isinstance(model.module, torch.fx.GraphModule):
        return model.module
    return _export(model.module, model)


def with_forms(model: Model, graph: GraphModule, forms: Mapping[Node, Form]) -> Model:
    """The model with new forms of these operators of its exported graph; the history stays.

    Raises ConversionError where a form can't be traced.
    """
    rewritten = _export(_retraced(graph, forms), model)
    _compute_constants(rewritten)
    _drop_unread(rewritten)
    return replace(model, module=rewritten, native=None)


def _export(module: torch.nn.Module, model: Model) -> GraphModule:
    import torch

    from edgeopt.sources.layered import LayeredGraph

    given = arguments_of(model.inputs, model.example_inputs)
    dims = _dynamic_shapes(model.inputs)
    if dims is not None:
        given = tuple(_stretched(value, axes) for value, axes in zip(given, dims, strict=True))
    shapes = (dims,) if dims is not None and takes_any_number(module) else dims
    try:
        # Torch warns of what RNN layers do to their own attributes, which is undone, and of its own APIs.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
            traced = program.module(check_guards=False)
    except Exception as error:  # tracing runs the user's own forward, which may raise anything
        lines = str(error).strip().splitlines()
        raise ConversionError(
            f"torch.export can't follow the model: {lines[0] if lines else type(error).__name__}", where=model.name
        ) from error
    assert isinstance(traced, torch.fx.GraphModule)
    # What torch.export returns refuses to be put into eval mode, in which it is.
    layered = LayeredGraph(traced, traced.graph)
    layered.training = False
    return layered


def _dynamic_shapes(inputs: Sequence[TensorSpec]) -> tuple[dict[int, torch.export.Dim], ...] | None:
    import torch

    dims: dict[str, torch.export.Dim] = {}
    shapes = tuple(
        {
            axis: dims.setdefault(dim.name, torch.export.Dim(dim.name, min=dim.min, max=dim.max))
            for axis, dim in enumerate(spec.shape)
            if isinstance(dim, Dim)
        }
        for spec in inputs
    )
    return shapes if dims else None


def _stretched(value: torch.Tensor, axes: Mapping[int, object]) -> torch.Tensor:
    """At least two along dynamic axes: torch.export takes a size of 1 for fixed."""
    for axis in axes:
        if value.shape[axis] == 1:
            value = value.repeat_interleave(2, axis)
    return value


def _retraced(graph: GraphModule, forms: Mapping[Node, Form]) -> torch.nn.Module:
    """A module with the graph's own weights that runs it, new forms in place of some operators."""
    import torch
    from torch.fx import traceback
    from torch.utils._pytree import tree_map_only

    class Interpreter(torch.fx.Interpreter):
        def run_node(self, node: Node) -> object:
            form = forms.get(node)
            if form is None:
                return super().run_node(node)
            with traceback.set_current_meta(node), traceback.annotate({_NEW: True}):
                return form(*(self._value(argument) for argument in arguments(node).values()))

        def _value(self, argument: object) -> object:
            return tree_map_only(torch.fx.Node, self.env.__getitem__, argument)

    class Retraced(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> object:
            with traceback.preserve_node_meta():
                return Interpreter(self, garbage_collect_values=False, graph=graph.graph).run(*inputs)

    retraced = Retraced()
    # The same children, parameters and buffers under the same names; the graph reads them by these.
    retraced._modules, retraced._parameters, retraced._buffers = graph._modules, graph._parameters, graph._buffers
    for name, value in vars(graph).items():
        if isinstance(value, torch.Tensor):
            setattr(retraced, name, value)
    return retraced.eval()


def _compute_constants(module: GraphModule) -> None:
    """Compute what new forms make of weights and constants alone."""
    import torch
    from torch.utils._pytree import tree_map_only

    graph = module.graph
    values: dict[Node, object] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = _attribute(module, str(node.target))
        elif node.op == "call_function" and _is_new(node) and all(read in values for read in node.all_input_nodes):
            with torch.no_grad():
                args, kwargs = tree_map_only(torch.fx.Node, values.__getitem__, (node.args, node.kwargs))
                values[node] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        if node.op == "get_attr" or node not in values or all(user in values for user in node.users):
            continue
        value = values[node]
        if isinstance(value, torch.Tensor):
            with graph.inserting_before(node):
                constant = graph.get_attr(_keep(module, _source(node), value))
            constant.meta = {key: entry for key, entry in node.meta.items() if key not in _OLD_ORIGIN}
            node.replace_all_uses_with(constant)
    for node in graph.nodes:
        if _is_new(node):
            for key in _OLD_ORIGIN:
                node.meta.pop(key, None)
    graph.eliminate_dead_code()
    module.recompile()


def _is_new(node: Node) -> bool:
    return bool((node.meta.get("custom") or {}).get(_NEW)) and (bool(name_of(node)) or node.target is operator.getitem)


def _source(node: Node) -> str:
    """The first weight that a constant is computed from; "constant" where it comes from none."""
    for read in node.all_input_nodes:
        return str(read.target) if read.op == "get_attr" else _source(read)
    return "constant"


def _keep(module: GraphModule, name: str, value: torch.Tensor) -> str:
    """Store a constant under the first free name that begins so; a parameter, as weights are."""
    import torch

    path, _, attribute = name.rpartition(".")
    owner, number = module.get_submodule(path), 1
    while hasattr(owner, f"{attribute}_{number}"):
        number += 1
    unique, constant = f"{attribute}_{number}", value.detach().clone().contiguous()
    if constant.is_floating_point():
        owner.register_parameter(unique, torch.nn.Parameter(constant))
    else:
        owner.register_buffer(unique, constant)
    return f"{path}.{unique}".lstrip(".")


def _attribute(module: GraphModule, name: str) -> object:
    path, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(path), attribute)


def _drop_unread(module: GraphModule) -> None:
    """Remove weights that no operator reads any more: they would count as the model's."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for path, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for attribute in list(tensors):
                if f"{path}.{attribute}".lstrip(".") not in read:
                    del tensors[attribute]
    module.delete_all_unused_submodules()
