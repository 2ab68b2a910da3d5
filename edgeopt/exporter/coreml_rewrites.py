"""What coremltools 9 reads wrongly, or not at all, in a program of torch.export, in forms that it reads rightly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeopt.exporter.executorch_graph import operator_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

#: Operators whose value is one number, whatever they are given; None where the number is their last argument.
_FILLS = {
    "aten.zeros_like.default": 0.0, "aten.ones_like.default": 1.0, "aten.full_like.default": None,
    "aten.new_zeros.default": 0.0, "aten.new_ones.default": 1.0, "aten.new_full.default": None,
}  # fmt: skip
_LOGIC = {
    "aten.__and__.Tensor": "logical_and", "aten.__or__.Tensor": "logical_or", "aten.__xor__.Tensor": "logical_xor",
    "aten.bitwise_and.Tensor": "logical_and", "aten.bitwise_or.Tensor": "logical_or",
    "aten.bitwise_xor.Tensor": "logical_xor",
}  # fmt: skip


def rewrite_for_coremltools(program: ExportedProgram) -> None:
    """Rewrite a program in place, without changing what it computes.

    - `zeros_like(mask, dtype=float)` and its kin become `full` with shape and type written out: coremltools gives them
      the type of the mask, bool, which turns an additive attention mask upside down;
    - `gelu(x, approximate="tanh")` is written out: coremltools overlooks the keyword and writes the exact form;
    - `&`, `|` and `^` of conditions become logical operators: coremltools has none of the names that torch.export uses;
    - `alias`, which does nothing, goes;
    - operators whose name is also somebody's text argument (`floor` beside `div(..., rounding_mode="floor")`) are
      renamed: coremltools takes the text for the operator's result.
    """
    for node in list(program.graph.nodes):
        name = operator_name(node) if node.op == "call_function" else ""
        if name in _FILLS:
            _spell_out(program, node, _FILLS[name])
        elif name in _LOGIC and str(node.meta["val"].dtype) == "torch.bool":
            _make_logical(node, _LOGIC[name])
        elif name == "aten.alias.default":
            _replace(program, node, node.all_input_nodes[0])
        elif name == "aten.gelu.default" and node.kwargs.get("approximate") == "tanh":
            _write_out_gelu(program, node)
    _rename_namesakes(program)
    program.graph_module.recompile()


def _rename_namesakes(program: ExportedProgram) -> None:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    texts = {part for node in calls for part in (*node.args, *node.kwargs.values()) if isinstance(part, str)}
    for node in calls:
        if node.name in texts:
            old = node.name
            node.name = f"{old}_result"
            program.graph_signature.replace_all_uses(old, node.name)


def _spell_out(program: ExportedProgram, node: Node, number: float | None) -> None:
    import torch

    value = node.meta["val"]
    if not all(isinstance(size, int) for size in value.shape):
        return
    fill = number if number is not None else node.args[-1]
    with program.graph.inserting_before(node):
        made = program.graph.call_function(
            torch.ops.aten.full.default, (list(value.shape), fill), {"dtype": value.dtype}
        )
    made.meta = dict(node.meta)
    _replace(program, node, made)


def _replace(program: ExportedProgram, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    program.graph_signature.replace_all_uses(old.name, new.name)
    program.graph.erase_node(old)


def _write_out_gelu(program: ExportedProgram, node: Node) -> None:
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)."""
    import torch

    aten, x = torch.ops.aten, node.args[0]

    def call(operator: Callable[..., object], *arguments: object) -> Node:
        made: Node = program.graph.call_function(operator, arguments)
        made.meta = dict(node.meta)
        return made

    with program.graph.inserting_before(node):
        cube = call(aten.pow.Tensor_Scalar, x, 3)
        inner = call(aten.add.Tensor, x, call(aten.mul.Tensor, cube, 0.044715))
        tanh = call(aten.tanh.default, call(aten.mul.Tensor, inner, math.sqrt(2 / math.pi)))
        result = call(aten.mul.Tensor, call(aten.mul.Tensor, x, 0.5), call(aten.add.Tensor, tanh, 1.0))
    _replace(program, node, result)


def _make_logical(node: Node, name: str) -> None:
    import torch

    node.target = getattr(torch.ops.aten, name).default
