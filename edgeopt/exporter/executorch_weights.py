"""Weights of an ExecuTorch program as integers: int8 through PT2E's observers, 4-bit groups and embeddings by hand.

Scales come from `edgeopt.calibration.weights`, as in every other format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.weights import QuantizedWeight, quantize_weight
from edgeopt.exporter.executorch_graph import attribute, layer_of, operator_name, target_is
from edgeopt.exporter.executorch_observer import activation_scale, is_gemm
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

#: An embedding table below this many values is not worth the operators that decode its rows.
_MIN_EMBEDDING_VALUES = 4096
#: Bounds that keep XNNPACK's integer arithmetic in range, see `_finest_scale`.
_FINEST, _REQUANTIZATION, _BIAS = 2.0**-24, 2.0**-32, 2.0**30
#: Scale of the widest output that is provided for: one that reaches 32 000.
_WIDEST_OUTPUT_SCALE = 2.0**8


def observe_weights(prepared: GraphModule, scheme: Scheme) -> None:
    """Give every weight observer of a prepared graph the scale that its weight gets at this scheme."""
    import torch
    from torchao.quantization.pt2e import FixedQParamsObserver
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

    if scheme.weight_bits == 4:  # what is observed here are the layers that have no 4-bit kernel
        scheme = replace(scheme, precision="w8a8", weight_granularity="per-channel")
    for call in prepared.graph.nodes:
        if call.op != "call_module" or call.args[0].op != "get_attr":
            continue
        observer = prepared.get_submodule(str(call.target))
        if not isinstance(observer, UniformQuantizationObserverBase) or isinstance(observer, FixedQParamsObserver):
            continue
        weight = attribute(prepared, call.args[0]).detach()
        quantized = quantize_weight(weight.numpy(), scheme, getattr(observer, "ch_axis", None))
        floor = max((_finest_scale(prepared, gemm) for gemm in call.users if is_gemm(gemm)), default=_FINEST)
        if scheme.scale == "power-of-two":
            floor = float(2.0 ** np.ceil(np.log2(floor)))
        scale = torch.as_tensor(np.maximum(quantized.scale, np.float32(floor)))
        observer.register_buffer("eps", torch.zeros(1))  # the floor has been applied
        # These observers derive scale = max|w| / 127.
        observer.register_buffer("min_val", -127 * scale)
        observer.register_buffer("max_val", 127 * scale)


def _finest_scale(prepared: GraphModule, gemm: Node) -> float:
    """The smallest weight scale with which this layer's arithmetic stays in range.

    XNNPACK takes input scale x weight scale / output scale from 2^-32 on, and the bias is int32 at input scale x
    weight scale.
    """
    from torch.fx import Node

    scale = activation_scale(prepared, gemm)
    if scale is None:  # dynamic: it accumulates in int32, and everything else is float
        return _FINEST
    bias = gemm.args[2] if len(gemm.args) > 2 else None
    largest = float(attribute(prepared, bias).detach().abs().max()) if isinstance(bias, Node) else 0.0
    return max(_FINEST, _REQUANTIZATION * _WIDEST_OUTPUT_SCALE / scale, largest / (scale * _BIAS))


# --- 4-bit weights ---------------------------------------------------------------------------------------------------


def quantize_linears_to_4_bits(converted: GraphModule, scheme: Scheme) -> None:
    """Store the weights of linear layers as signed 4-bit integers, in place.

    Args:
        converted: from `convert_pt2e`. Its linear layers with dynamically quantized inputs and float weights are
            those that the quantizer has chosen.
        scheme: 8da4w, per group or per channel.
    """
    import torch

    ops = torch.ops.quantized_decomposed
    for number, linear in enumerate([n for n in converted.graph.nodes if _waits_for_weight(n)]):
        weight = linear.all_input_nodes[1]
        found = quantize_weight(attribute(converted, weight).detach().numpy(), scheme, 0)
        with converted.graph.inserting_before(linear):
            values, scale = _constants(converted, weight, f"_int4_{number}", found)
            zeros = _constant(converted, weight, f"_int4_{number}_zero_point", np.zeros_like(found.zero_point))
            common = (values, scale, zeros)
            if found.group_size is None:
                operator, rest = ops.dequantize_per_channel.default, (0, -8, 7, torch.int8)
                decoded = converted.graph.call_function(operator, (*common, *rest))
            else:
                by_group = ops.dequantize_per_channel_group.default
                arguments = (*common, -8, 7, torch.int8, found.group_size, torch.float32)
                decoded = converted.graph.call_function(by_group, arguments)
        decoded.meta = dict(weight.meta)
        linear.update_arg(1, decoded)
    converted.graph.eliminate_dead_code()
    converted.recompile()


def fits_4_bits(weight: torch.Tensor, scheme: Scheme) -> bool:
    """Whether XNNPACK has a 4-bit kernel for this layer: its inputs divide into groups, or into pairs."""
    group = scheme.group_size if scheme.weight_granularity == "per-group" else 2
    return weight.dim() == 2 and weight.shape[1] % group == 0


def _waits_for_weight(node: Node) -> bool:
    if not target_is(node, "aten.linear"):
        return False
    source, weight = node.all_input_nodes[:2]
    return weight.op == "get_attr" and target_is(source, "quantized_decomposed.dequantize_per_tensor")


# --- embeddings ------------------------------------------------------------------------------------------------------


def quantize_embeddings(converted: GraphModule, scheme: Scheme, keep_float: Sequence[str]) -> frozenset[str]:
    """Read every constant float table as int8 rows and decode what was read, in place; returns the layers concerned.

    One scale per row (per table where the scheme says per-tensor), zero point 0. Three portable operators do it; the
    kernels made for it (quantized_decomposed.embedding_byte) are not in every build of the runtime.
    """
    import torch

    aten = torch.ops.aten
    scheme = replace(scheme, precision="w8")
    if scheme.weight_granularity == "per-group":
        scheme = replace(scheme, weight_granularity="per-channel")
    graph = converted.graph
    layers = set()
    for number, node in enumerate(list(_embeddings(converted, keep_float))):
        table, ids = node.all_input_nodes
        found = quantize_weight(attribute(converted, table).detach().numpy(), scheme, 0)
        if found.axis is not None:  # a column broadcasts against the rows that were read
            found = replace(found, scale=found.scale.reshape(-1, 1))
        with graph.inserting_before(node):
            values, scale = _constants(converted, table, f"_embedding_{number}", found)
            rows = graph.call_function(aten.embedding.default, (values, ids))
            real = graph.call_function(aten.to.dtype, (rows, torch.float32))
            if found.axis is not None:
                scale = graph.call_function(aten.embedding.default, (scale, ids))
            decoded = graph.call_function(aten.mul.Tensor, (real, scale))
        for made in (rows, real, scale, decoded):
            made.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
        node.replace_all_uses_with(decoded)
        graph.erase_node(node)
        layers.add(layer_of(decoded))
    graph.eliminate_dead_code()
    converted.recompile()
    return frozenset(layers - {""})


def _embeddings(module: GraphModule, keep_float: Sequence[str]) -> Iterator[Node]:
    import torch

    for node in module.graph.nodes:
        if not target_is(node, "aten.embedding") or layer_is_exempt(layer_of(node), keep_float):
            continue
        table = node.all_input_nodes[0]
        if table.op == "get_attr" and operator_name(node) == "aten.embedding.default":
            value = attribute(module, table)
            if value.dtype == torch.float32 and value.dim() == 2 and value.numel() >= _MIN_EMBEDDING_VALUES:
                yield node


def _constants(module: GraphModule, like: Node, name: str, found: QuantizedWeight) -> tuple[Node, Node]:
    return _constant(module, like, name, found.values), _constant(module, like, f"{name}_scale", found.scale)


def _constant(module: GraphModule, like: Node, name: str, value: Array) -> Node:
    import torch

    module.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)))
    node: Node = module.graph.get_attr(name)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack",) if key in like.meta}
    return node
