"""From a torch module to the graph that XNNPACK likes: capture, example inputs, and exact rewrites."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Dim, Model, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node
    from torch.fx.passes.infra.pass_base import PassResult


def layer_of(node: Node) -> str:
    """Path of the innermost source module that this operator comes from; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if path:
            # torch.export marks the second call of a shared module with "@1".
            return strip_wrapper(str(path).split("@")[0])
    return ""


def operator_name(node: Node) -> str:
    """ "aten.conv2d.default" and the like."""
    return str(node.target).removeprefix("torch.ops.")


def target_is(node: object, *names: str) -> bool:
    """Whether this is a call of one of the operators, overload left out ("aten.conv2d")."""
    from torch.fx import Node

    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return operator_name(node).rpartition(".")[0] in names


def attribute(module: GraphModule, node: Node) -> torch.Tensor:
    """The parameter or buffer that a get_attr node stands for."""
    path, _, name = str(node.target).rpartition(".")
    value: torch.Tensor = getattr(module.get_submodule(path), name)
    return value


def example_inputs(model: Model) -> tuple[torch.Tensor, ...]:
    """The model's example inputs; a dynamic dimension of size 1 is doubled, since torch.export would fix it at 1."""
    import torch

    arrays = []
    for spec in model.inputs:
        array = np.array(model.example_inputs[spec.name])
        for axis, dim in enumerate(spec.shape):
            if _is_free(dim) and array.shape[axis] == 1:
                array = np.repeat(array, 2, axis)
        arrays.append(torch.from_numpy(np.ascontiguousarray(array, dtype=spec.dtype)))
    return tuple(arrays)


def dynamic_shapes(inputs: tuple[TensorSpec, ...]) -> list[dict[int, object]] | None:
    """`dynamic_shapes` of torch.export, one entry per input; dimensions of the same name are the same."""
    from torch.export import Dim as ExportDim

    if not any(_is_free(dim) for spec in inputs for dim in spec.shape):
        return None
    dims: dict[str, object] = {}
    shapes: list[dict[int, object]] = []
    for spec in inputs:
        shape: dict[int, object] = {}
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, Dim) and _is_free(dim):
                shape[axis] = dims.setdefault(dim.name, ExportDim(dim.name, min=dim.min, max=dim.max))
        shapes.append(shape)
    return shapes


def _is_free(dim: int | Dim) -> bool:
    return isinstance(dim, Dim) and dim.max > max(dim.min, 1)


# --- rewrites --------------------------------------------------------------------------------------------------------


def simplify(program: ExportedProgram) -> None:
    """Rewrite what XNNPACK's partitioner refuses or can't fuse into equal forms that it takes, in place."""
    graph = program.graph_module.graph
    for rewrite in (_fold_padding, _clamp_to_hardtanh, _keep_mean_dims):
        rewrite(graph)
    graph.lint()
    program.graph_module.recompile()


def _fold_padding(graph: Graph) -> None:
    """Zero padding, equal on both sides, followed by convolutions only -> the convolutions' own padding."""
    for node in _calls(graph, "aten.pad", "aten.constant_pad_nd"):
        rank = len(node.meta["val"].shape)
        amounts = _symmetric_amounts(node, rank - 2)
        users = list(node.users)
        if amounts is None or not users or not all(_takes_padding(user, node) for user in users):
            continue
        for user in users:
            own = _convolution_padding(user, rank - 2)
            defaults = (None, [1] * len(amounts), [0] * len(amounts))  # bias, stride, padding
            arguments = [node.args[0], *user.args[1:], *defaults[len(user.args) - 2 :]]
            arguments[4] = [a + b for a, b in zip(own, amounts, strict=True)]
            user.args = tuple(arguments)
        graph.erase_node(node)


def _symmetric_amounts(node: Node, spatial: int) -> list[int] | None:
    """Padding per spatial dimension, or None when it is not a constant 0 that is equal on both sides."""
    amounts = node.args[1]
    if operator_name(node).startswith("aten.pad."):
        mode, value = (*node.args[2:], *("constant", None)[max(len(node.args) - 2, 0) :])[:2]
    else:
        mode, value = "constant", node.args[2] if len(node.args) > 2 else None
    if mode != "constant" or value not in (None, 0, 0.0) or not isinstance(amounts, (list, tuple)):
        return None
    sides = [a for a in amounts if isinstance(a, int) and a >= 0]
    if len(sides) != len(amounts) or len(sides) > 2 * spatial or sides[0::2] != sides[1::2]:
        return None
    # F.pad counts dimensions from the last one.
    return [0] * (spatial - len(sides) // 2) + sides[0::2][::-1]


def _takes_padding(node: Node, padded: Node) -> bool:
    is_convolution = operator_name(node) in ("aten.conv1d.default", "aten.conv2d.default")
    return is_convolution and node.args[0] is padded and padded not in node.args[1:] and not node.kwargs


def _convolution_padding(node: Node, spatial: int) -> list[int]:
    padding = node.args[4] if len(node.args) > 4 else 0
    if isinstance(padding, int):
        return [padding] * spatial
    values = [p for p in padding if isinstance(p, int)] if isinstance(padding, (list, tuple)) else []
    return values * spatial if len(values) == 1 else values


def _clamp_to_hardtanh(graph: Graph) -> None:
    """clamp and relu6 with two fixed bounds -> hardtanh, the one form that the delegate fuses into a producer."""
    import torch

    for node in _calls(graph, "aten.clamp", "aten.relu6"):
        low, high = (0.0, 6.0) if target_is(node, "aten.relu6") else _clamp_bounds(node)
        if node.meta["val"].dtype != torch.float32:
            continue
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high:
            node.target = torch.ops.aten.hardtanh.default
            node.args, node.kwargs = (node.args[0], float(low), float(high)), {}
        elif low == 0 and high is None:
            node.target = torch.ops.aten.relu.default
            node.args, node.kwargs = (node.args[0],), {}


def _clamp_bounds(node: Node) -> tuple[object, object]:
    arguments = dict(zip(("self", "min", "max"), node.args, strict=False)) | dict(node.kwargs)
    return arguments.get("min"), arguments.get("max")


def _keep_mean_dims(graph: Graph) -> None:
    """Mean over height and width that drops them -> one that keeps them, then a view: XNNPACK takes no other."""
    import torch

    for node in _calls(graph, "aten.mean"):
        if operator_name(node) != "aten.mean.dim" or len(node.args) != 2 or node.kwargs:
            continue
        source = node.all_input_nodes[0]
        value, dims = source.meta["val"], node.args[1]
        if value.dim() != 4 or not isinstance(dims, (list, tuple)):
            continue
        if sorted(d % 4 for d in dims if isinstance(d, int)) != [2, 3]:
            continue
        with graph.inserting_before(node):
            kept = graph.call_function(torch.ops.aten.mean.dim, (source, [2, 3], True))
            flat = graph.call_function(torch.ops.aten.flatten.using_ints, (kept, 1))
        kept.meta = dict(node.meta) | {"val": node.meta["val"][:, :, None, None]}
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
        flat.name = node.name


def write_out_gelus(program: ExportedProgram) -> None:
    """gelu(x, approximate="tanh") -> x * sigmoid(x * (a + b x^2)), in place: the same value, since
    (1 + tanh(u)) / 2 = sigmoid(2 u) (the tanh form: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016).

    XNNPACK's gelu is the exact one, and ExecuTorch's partitioner gives it this one too. It is written out only when all
    is quantized: in int8 its parts would cost accuracy.
    """
    import torch

    aten, graph = torch.ops.aten, program.graph
    for node in _calls(graph, "aten.gelu"):
        is_tanh = "tanh" in (*node.args[1:], node.kwargs.get("approximate"))
        if not is_tanh or node.meta["val"].dtype != torch.float32:
            continue
        x, outer = node.args[0], 2 * math.sqrt(2 / math.pi)
        made: list[Node] = []
        with graph.inserting_before(node):
            made.append(graph.call_function(aten.mul.Tensor, (x, x)))
            made.append(graph.call_function(aten.mul.Tensor, (made[-1], 0.044715 * outer)))
            made.append(graph.call_function(aten.add.Tensor, (made[-1], outer)))
            made.append(graph.call_function(aten.mul.Tensor, (made[-1], x)))
            made.append(graph.call_function(aten.sigmoid.default, (made[-1],)))
            made.append(graph.call_function(aten.mul.Tensor, (made[-1], x)))
        for part in made:
            part.meta = dict(node.meta)
        node.replace_all_uses_with(made[-1])
        graph.erase_node(node)
        made[-1].name = node.name  # the program's signature knows its outputs by name
    program.graph_module.recompile()


def own_every_dequantize(module: GraphModule) -> PassResult:
    """Give every user of a dequantized tensor a dequantize of its own, in place. A pass over the edge dialect.

    PT2E does so among the quantized users; more come from operators that are taken apart after it. Where a delegate
    takes some users of a shared one and not others (of softplus's parts, say), its layout pass puts a copy behind the
    shared one and fails on the tensor that leaves the delegate.
    """
    from torch.fx.passes.infra.pass_base import PassResult

    graph = module.graph
    shared = [n for n in graph.nodes if "dequantize_per_tensor" in str(n.target) and len(n.users) > 1]
    for node in shared:
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                copy = graph.node_copy(node)
            user.replace_input_with(node, copy)
    module.recompile()
    return PassResult(module, bool(shared))


def _calls(graph: Graph, *names: str) -> Iterator[Node]:
    yield from [node for node in graph.nodes if target_is(node, *names)]
