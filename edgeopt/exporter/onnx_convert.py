"""The ONNX conversions that need no calibration: float16, and int8 with ranges found at run time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.onnx_graph import clean
from edgeopt.exporter.onnx_rewrite import attributes, captured_names, gemms_as_products
from edgeopt.telemetry import opt_out
from edgeopt.types import Scheme

if TYPE_CHECKING:
    import onnx

#: Where a dynamic scale per call pays. Not convolutions: ConvInteger is slower than a float convolution.
DYNAMIC_TYPES = ("MatMul", "Gemm")


def to_float16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and arithmetic in float16; inputs, outputs and operators without a float16 form stay float32."""
    opt_out()
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, *_without_float16(proto)]
    try:
        result: onnx.ModelProto = convert_float_to_float16(
            _copy(proto), keep_io_types=True, op_block_list=blocked, node_block_list=_swapped_before_products(proto)
        )
    # A graph rewriter that asserts and raises whatever it meets.
    except Exception as error:
        raise ConversionError(f"the conversion to float16 failed: {error}") from error
    _drop_twins(result.graph)
    _sort(result.graph)  # the converter appends its casts at the end
    clean(result)
    return result


def _drop_twins(graph: onnx.GraphProto) -> None:
    """ONNX Runtime's converter casts a tensor twice, under one name, that two operators read which stay float32."""
    made: set[str] = set()
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "Cast" or node.output[0] not in made:
            kept.append(node)
        made.update(node.output)
    del graph.node[:]
    graph.node.extend(kept)


def _without_float16(proto: onnx.ModelProto) -> list[str]:
    """Types of the graph's operators that ONNX defines for float32, but not for float16 (Celu)."""
    import onnx

    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    types = {node.op_type for node in proto.graph.node if node.domain in ("", "ai.onnx")}
    lacking = []
    for type_ in sorted(types):
        # The inputs decide: optional outputs, such as LayerNormalization's mean, have types of their own.
        read = [parameter.types for parameter in onnx.defs.get_schema(type_, opset).inputs]
        if any("tensor(float)" in kinds and "tensor(float16)" not in kinds for kinds in read):
            lacking.append(type_)
    return lacking


def _swapped_before_products(proto: onnx.ModelProto) -> list[str]:
    """Names of Transposes that move the first axis of what a MatMul reads (sequence-first attention).

    In float16 they make ONNX Runtime's MatmulTransposeFusion crash the process; they cost the same in float32.
    """
    multiplied = {name for node in proto.graph.node if node.op_type == "MatMul" for name in node.input}
    return [
        node.name
        for node in proto.graph.node
        if node.op_type == "Transpose" and node.output[0] in multiplied and _moves_first_axis(node)
    ]


def _moves_first_axis(node: onnx.NodeProto) -> bool:
    order = attributes(node).get("perm")
    return not isinstance(order, list) or order[0] != 0  # without an order all axes are reversed


def to_dynamic_int8(
    proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme
) -> onnx.ModelProto:
    """Constant weights of matrix products as int8; what they are multiplied with is quantized at run time."""
    import onnx

    opt_out()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = gemms_as_products(proto)
    # Says that shapes were inferred and the graph simplified, without which ONNX Runtime logs advice to do so.
    prepared.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    excluded = [node.name for node in proto.graph.node if exempt(node)]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "dynamic.onnx"
        try:
            quantize_dynamic(
                prepared,
                path,
                op_types_to_quantize=list(DYNAMIC_TYPES),
                per_channel=scheme.weight_granularity == "per-channel",
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                extra_options={"MatMulConstBOnly": True},
            )
            result = onnx.load(str(path))
        # A graph rewriter that asserts and raises whatever it meets.
        except Exception as error:
            raise ConversionError(f"dynamic quantization failed: {error}") from error
    _drop_twins(result.graph)
    _sort(result.graph)  # the quantizer's own order forgets what the bodies of loops read
    clean(result)
    return result


def _sort(graph: onnx.GraphProto) -> None:
    """Put every node behind those that make what it or its body reads; otherwise the order stays."""
    waiting = list(graph.node)
    unmade = {name for node in waiting for name in node.output}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        blocked: list[onnx.NodeProto] = []
        for node in waiting:
            if unmade.isdisjoint((*node.input, *captured_names([node]))):
                ordered.append(node)
                unmade.difference_update(node.output)
            else:
                blocked.append(node)
        if len(blocked) == len(waiting):  # a cycle, which onnx.checker will name
            ordered += blocked
            break
        waiting = blocked
    del graph.node[:]
    graph.node.extend(ordered)


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy
