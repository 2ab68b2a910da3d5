"""Which operators of a quantized ONNX file compute in float, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edgeopt.exporter.onnx_convert import DYNAMIC_TYPES
from edgeopt.exporter.onnx_rewrite import constants_of
from edgeopt.exporter.onnx_storage import float_weights
from edgeopt.formats.onnx import CONVERSIONS, INT8_ARITHMETIC, INT8_PRODUCTS, MOVEMENT, read_ops
from edgeopt.types import OpInfo, Scheme, UnquantizedOp

if TYPE_CHECKING:
    import onnx

_EXEMPTED = "exempted by --keep-float"


def unquantized_ops(
    before: onnx.ModelProto, after: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme
) -> Iterator[UnquantizedOp]:
    """The float arithmetic of the quantized file `after`, made from the float one `before`.

    What moves or clips values is not arithmetic, and what the quantizer added belongs to an integer operator. Where
    only weights are quantized, all arithmetic is float on purpose: reported are the weights that stayed float.
    """
    exempted = {node.name for node in before.graph.node if exempt(node)}
    if scheme.activations == "none":
        yield from _float_weights(after, exempted)
        return
    own = {node.name for node in before.graph.node}
    for op in read_ops(after):
        if op.name not in own or op.type in MOVEMENT | CONVERSIONS or op.type == "GatherBlockQuantized":
            continue
        if op.dtype in ("float32", "float16"):
            yield UnquantizedOp(op.name, op.type, _EXEMPTED if op.name in exempted else _reason(op, scheme))
        elif scheme.activation_bits == 16 and op.type in INT8_ARITHMETIC | INT8_PRODUCTS:
            yield UnquantizedOp(op.name, op.type, "ONNX Runtime's CPU kernels compute 16-bit activations in float")


def _float_weights(after: onnx.ModelProto, exempted: set[str]) -> Iterator[UnquantizedOp]:
    constants = constants_of(after.graph)
    for node in after.graph.node:
        if any(float_weights(node, constants)):
            reason = _EXEMPTED if node.name in exempted else "its weights are so few that the file would not shrink"
            yield UnquantizedOp(node.name, node.op_type, reason)


def _reason(op: OpInfo, scheme: Scheme) -> str:
    if scheme.activations == "dynamic":
        if op.type in ("Conv", "ConvTranspose"):
            return "dynamic int8 covers matrix products: ONNX Runtime's ConvInteger is slower than float"
        if op.type in DYNAMIC_TYPES:
            return "both operands are activations, or its weights are not constant"
        return "dynamic int8 covers matrix products only"
    if op.type in ("Conv", *INT8_PRODUCTS):
        return "its weights or bias are not constant, or it computes positions"
    if op.type == "HardSigmoid" and scheme.scale == "power-of-two":
        return "its slope is no power of two"
    if op.type in INT8_ARITHMETIC:
        return "a float operator is before or after it: int8 would only add conversions"
    return f"ONNX Runtime has no int8 kernel for {op.type}"
