"""Attention and its cache, written out in operators that XNNPACK takes.

ExecuTorch takes `scaled_dot_product_attention` apart as PyTorch does: with guards against rows that see nothing, for
which XNNPACK has no kernels. What it doesn't take runs on portable kernels, one value at a time, and cuts the network
into pieces. A step of a decoder spends two thirds of its time there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeopt.exporter.executorch_graph import operator_name, target_is

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node
    from torch.fx.passes.infra.pass_base import PassResult

    Emit = Callable[..., Node]

#: Operators that show or combine values, and can't make infinity of finite ones unless the numbers overflow.
_PASSING = (
    "aten.add", "aten.sub", "aten.mul", "aten.neg", "aten.rsub", "aten.mean", "aten.pow", "aten.cat",
    "aten.stack", "aten.view", "aten.reshape", "aten.transpose", "aten.permute", "aten.unsqueeze", "aten.squeeze",
    "aten.expand", "aten.slice", "aten.select", "aten.index_select", "aten.clone", "aten.contiguous", "aten.to",
    "aten._to_copy", "aten.flatten", "aten.unflatten", "aten.repeat", "aten.split", "aten.chunk", "aten.dropout",
    "aten.where", "aten.masked_fill", "aten.type_as",
    "quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor",
)  # fmt: skip
#: Operators whose results are taken to be finite, whatever went in.
_FINITE = (
    "aten.linear", "aten.matmul", "aten.bmm", "aten.conv1d", "aten.conv2d", "aten.embedding", "aten.layer_norm",
    "aten.rms_norm", "aten.cos", "aten.sin", "aten.sigmoid", "aten.tanh", "aten.arange",
)  # fmt: skip
_CONSTANTS = ("aten.full", "aten.full_like", "aten.scalar_tensor", "aten.zeros", "aten.ones")
#: What the condition of a `where` may go through between the comparison and its use.
_CONDITION_STEPS = ("aten.view", "aten.reshape", "aten.unsqueeze", "aten.expand", "aten.slice", "aten.select")


def write_out_attention(program: ExportedProgram) -> None:
    """scaled_dot_product_attention -> products, sum and softmax, in place: softmax(s q k^T + m) v, with PyTorch's
    result 0 for a row that sees nothing.

    Masks become finite, -inf the least float32: behind the softmax both are 0. Only a mask that may hide a whole row
    is multiplied in once more. What has a dropout, shared heads or free sizes under a causal mask stays as it is.
    """
    import torch

    graph = program.graph_module.graph
    for node in [n for n in graph.nodes if target_is(n, "aten.scaled_dot_product_attention")]:
        arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        arguments |= node.kwargs
        if node.meta["val"].dtype != torch.float32 or not _is_plain(arguments):
            continue
        before = list(graph.nodes)
        with graph.inserting_before(node):
            result = _written_out(program, _emitter(graph), arguments)
        known = set(before)
        for made in graph.nodes:
            if made not in known:
                made.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        result.name = node.name  # the program's signature knows its outputs by name
    program.graph_module.recompile()


def write_out_insertions(program: ExportedProgram) -> None:
    """where(position, row, cache) -> row * p + cache * (1 - p), p one where the position is: in place, and exactly.

    Only where whole rows are chosen by their number, among values that are finite. Any other `where` may be a guard, as
    where(isnan(x), 0, x) and where(length == 0, 0, attended): what it does not choose times 0 is no number.
    """
    import torch

    aten, graph = torch.ops.aten, program.graph_module.graph
    emit = _emitter(graph)
    chosen: dict[Node, Node] = {}
    for node in [n for n in graph.nodes if operator_name(n) == "aten.where.self" and n.op == "call_function"]:
        condition, one, other = node.all_input_nodes if len(node.all_input_nodes) == 3 else (node, node, node)
        if condition is node or not _is_insertion(program, node, condition, one, other):
            continue
        with graph.inserting_before(node):
            if condition not in chosen:
                chosen[condition] = emit(aten._to_copy.default, condition, dtype=torch.float32)
                chosen[condition].meta = dict(condition.meta)
            is_one = chosen[condition]
            parts = [emit(aten.mul.Tensor, one, is_one)]
            parts.append(emit(aten.rsub.Scalar, is_one, 1.0))
            parts.append(emit(aten.mul.Tensor, other, parts[-1]))
            parts.append(emit(aten.add.Tensor, parts[0], parts[-1]))
        for part in parts:
            part.meta = dict(node.meta)
        node.replace_all_uses_with(parts[-1])
        graph.erase_node(node)
        parts[-1].name = node.name
    program.graph_module.recompile()


def drop_idle_expansions(module: GraphModule) -> PassResult:
    """Take out every expand that changes no size, in place. A pass over the edge dialect.

    Each product of more than two dimensions brings two, and each copies its whole tensor.
    """
    from torch.fx.passes.infra.pass_base import PassResult

    graph = module.graph
    idle = [
        node
        for node in graph.nodes
        if "expand_copy" in str(node.target) and node.all_input_nodes[0].meta["val"].shape == node.meta["val"].shape
    ]
    outputs = {source for node in graph.nodes if node.op == "output" for source in node.all_input_nodes}
    idle = [node for node in idle if node not in outputs]
    for node in idle:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    module.recompile()
    return PassResult(module, bool(idle))


def _emitter(graph: Graph) -> Emit:
    def emit(operator: Callable[..., object], *arguments: object, **options: object) -> Node:
        return graph.call_function(operator, arguments, options)  # type: ignore[arg-type]  # torch's own union

    return emit


def _is_plain(arguments: dict[str, object]) -> bool:
    if arguments.get("dropout_p", 0.0) or arguments.get("enable_gqa", False):
        return False
    sizes = [*_value(arguments["query"]).shape[-2:], *_value(arguments["key"]).shape[-2:]]
    if arguments.get("is_causal", False):
        return arguments.get("attn_mask") is None and all(isinstance(size, int) for size in sizes)
    return arguments.get("scale") is not None or isinstance(sizes[1], int)


def _written_out(program: ExportedProgram, emit: Emit, arguments: dict[str, object]) -> Node:
    import torch

    aten = torch.ops.aten
    query, key = arguments["query"], arguments["key"]
    width = int(_value(query).shape[-1])
    scale = arguments.get("scale")
    scaled = emit(aten.mul.Tensor, query, 1 / math.sqrt(width) if scale is None else scale)
    scores = emit(aten.matmul.default, scaled, emit(aten.transpose.int, key, -2, -1))
    mask, seen = _finite_mask(program, emit, arguments)
    if mask is not None:
        scores = emit(aten.add.Tensor, scores, mask)
    weights = emit(aten.softmax.int, scores, -1)
    if seen is not None:
        weights = emit(aten.mul.Tensor, weights, seen)
    return emit(aten.matmul.default, weights, arguments["value"])


def _finite_mask(program: ExportedProgram, emit: Emit, arguments: dict[str, object]) -> tuple[Node | None, Node | None]:
    """What is added to the scores, and what the weights are multiplied by, where a whole row may be hidden."""
    import torch
    from torch.fx import Node

    aten, least = torch.ops.aten, torch.finfo(torch.float32).min
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal", False):
        rows, columns = (int(_value(arguments[name]).shape[-2]) for name in ("query", "key"))
        device = torch.device("cpu")
        row = emit(aten.unsqueeze.default, emit(aten.arange.default, rows, device=device), -1)
        ahead = emit(aten.gt.Tensor, emit(aten.arange.default, columns, device=device), row)
        return emit(aten.where.Scalar, ahead, least, 0.0), None
    if not isinstance(mask, Node):
        return None, None
    if _value(mask).dtype == torch.bool:
        return emit(aten.where.Scalar, mask, 0.0, least), emit(aten._to_copy.default, mask, dtype=torch.float32)
    if _is_finite(program, mask, trusts_inputs=False):
        return mask, None
    seen = emit(aten._to_copy.default, emit(aten.gt.Scalar, mask, -math.inf), dtype=torch.float32)
    return emit(aten.clamp.default, mask, least), seen


def _is_insertion(program: ExportedProgram, node: Node, condition: Node, one: Node, other: Node) -> bool:
    import torch

    result, chosen = _value(node), _value(condition)
    if not all(isinstance(size, int) for size in (*result.shape, *chosen.shape)):
        return False
    if result.dtype != torch.float32 or not 1 < chosen.numel() < result.numel() or result.dim() < 2:
        return False
    if any(_value(branch).dim() != result.dim() for branch in (one, other)):
        return False
    return _tells_rows(condition) and all(_is_finite(program, b, trusts_inputs=True) for b in (one, other))


def _tells_rows(condition: Node) -> bool:
    """Whether it compares integers with integers for being equal, as arange(rows) == position does."""
    while target_is(condition, *_CONDITION_STEPS):
        condition = condition.all_input_nodes[0]
    if operator_name(condition) not in ("aten.eq.Tensor", "aten.ne.Tensor"):
        return False
    return not any(_value(source).dtype.is_floating_point for source in condition.all_input_nodes)


def _is_finite(program: ExportedProgram, node: Node, *, trusts_inputs: bool) -> bool:
    """Whether a tensor holds no infinity, as far as its making tells.

    Args:
        trusts_inputs: whether the network's inputs are taken to be finite.
    """
    import torch

    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        made = waiting.pop()
        value = made.meta.get("val")
        if made in seen or (isinstance(value, torch.Tensor) and not value.dtype.is_floating_point):
            continue
        if isinstance(value, int | torch.SymInt):  # a size
            continue
        seen.add(made)
        sources = _to_be_finite(program, made, trusts_inputs=trusts_inputs)
        if sources is None:
            return False
        waiting.extend(sources)
    return True


def _to_be_finite(program: ExportedProgram, node: Node, *, trusts_inputs: bool) -> list[Node] | None:
    """What must be finite for that to be finite; None where it may hold infinity whatever went in."""
    import torch

    if node.op == "placeholder":
        constant = _constant(program, node)
        return [] if (trusts_inputs if constant is None else bool(torch.isfinite(constant).all())) else None
    if target_is(node, *_FINITE):
        return [] if trusts_inputs else None
    numbers = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, int | float)]
    if not all(map(math.isfinite, numbers)):
        return None
    if target_is(node, *_CONSTANTS):
        return []
    sources = node.all_input_nodes
    if target_is(node, "aten.pow"):
        return sources if len(sources) == 1 and numbers and numbers[-1] >= 0 else None
    if target_is(node, "aten.rsqrt"):  # of a variance, which is raised so that it can't be 0
        [raised] = sources
        is_raised = target_is(raised, "aten.add") and any(isinstance(n, int | float) and n > 0 for n in raised.args)
        return sources if is_raised else None
    return sources if target_is(node, *_PASSING, "aten.lift_fresh_copy", "aten.detach_", "aten.detach") else None


def _constant(program: ExportedProgram, node: Node) -> Tensor | None:
    """The parameter, buffer or constant that a placeholder stands for; None for an input of the network."""
    signature = program.graph_signature
    for names in (signature.inputs_to_parameters, signature.inputs_to_buffers):
        if node.name in names:
            path = names[node.name]
            value: Tensor = program.state_dict[path] if path in program.state_dict else program.constants[path]
            return value
    lifted = signature.inputs_to_lifted_tensor_constants.get(node.name)
    return None if lifted is None else program.constants[lifted]


def _value(node: object) -> Tensor:
    from torch.fx import Node

    if not isinstance(node, Node):
        raise TypeError(f"{node!r} is no tensor")
    value: Tensor = node.meta["val"]
    return value
