"""Look-up tables on the CPU beside an Ethos-U that has no gather: int8 rows, and nothing in float.

The backend's quantizer makes an index_select of an embedding, between `dequantize(table)` and `quantize`: portable
kernels would convert the whole table to float at each inference. Reading rows of the int8 table costs one operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.exporter.executorch_graph import operator_name, target_is

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"


def look_up_integers(converted: GraphModule) -> None:
    """Read rows of the int8 table instead of a float one, in a graph from `convert_pt2e`, in place."""
    graph = converted.graph
    for node in [n for n in graph.nodes if target_is(n, "aten.embedding", "aten.index_select")]:
        table = node.args[0]
        if not _is(table, _DEQUANTIZE) or table.args[0].op != "get_attr":
            continue
        if not node.users or not all(_is(user, _QUANTIZE) and _feeds_only_dequantize(user) for user in node.users):
            continue
        value = node.meta.get("val")
        with graph.inserting_before(node):
            rows = graph.call_function(node.target, (table.args[0], *node.args[1:]), dict(node.kwargs))
            rows.meta = dict(node.meta) | ({"val": value.to(table.args[5])} if value is not None else {})
            for quantize in list(node.users):
                for dequantize in list(quantize.users):
                    dequantize.args = (rows, *table.args[1:])
    graph.eliminate_dead_code()
    converted.recompile()


def _is(node: Node, operator: str) -> bool:
    return node.op == "call_function" and operator_name(node) == operator


def _feeds_only_dequantize(node: Node) -> bool:
    return all(_is(user, _DEQUANTIZE) for user in node.users)
