"""Inner tensors of an .onnx file as extra outputs, without disturbing ONNX Runtime's int8 kernels.

An int8 kernel is the pattern DequantizeLinear -> operator -> QuantizeLinear, also with a Reshape or Transpose before
the QuantizeLinear. An output on a float tensor inside would break it up, so the integers behind the QuantizeLinear are
given out instead, in the layout that they have there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.formats.onnx import CONVERSIONS, INTEGER_TYPES, load, source_layer, tensor_types
from edgeopt.formats.probe import Probed, ProbePoint, probe_name
from edgeopt.formats.probe_points import Operator, Role, find_points
from edgeopt.types import Array, DType, QuantParams, Signature, SignatureTensor

if TYPE_CHECKING:
    import onnx

_KERNELS = frozenset(
    {
        "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "ConvInteger", "MatMulInteger",
        "QLinearConv", "QLinearMatMul", "QGemm", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
        "FusedConv", "FusedMatMul", "FusedGemm", "Attention", "QAttention",
    }
)  # fmt: skip
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
#: Kernels that give integers without a scale; a Cast and a Mul follow.
_BARE = frozenset({"ConvInteger", "MatMulInteger"})
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_PASSIVE = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Identity", "Dropout", "Reshape",
        "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice", "Split", "Gather", "GatherND",
        "GatherElements", "Pad", "Tile", "DepthToSpace", "SpaceToDepth",
    }
)  # fmt: skip
#: What moves a tensor's values without dropping any.
_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
#: Operators that name the scale and zero point of their integer output among their own inputs: position of the scale.
_OWN_SCALE: Mapping[str, int] = {
    "QLinearConv": 6, "QLinearMatMul": 6, "QGemm": 7, "QLinearAdd": 6, "QLinearMul": 6, "QLinearConcat": 0,
    "QLinearSigmoid": 3, "QLinearLeakyRelu": 3, "QLinearSoftmax": 3, "QLinearAveragePool": 3,
    "QLinearGlobalAveragePool": 3,
}  # fmt: skip
_FLOATS: Mapping[str, DType] = {"float32": "float32", "float16": "float16"}
_INTEGERS: Mapping[str, DType] = {"int8": "int8", "uint8": "uint8", "int16": "int16"}


def add_probes(source: Path, signature: Signature, destination: Path) -> Probed:
    """See `edgeopt.formats.probe.add_probes`.

    In a quantized file, operators other than kernels are points only where they are quantized themselves: ONNX Runtime
    fuses the float ones with one another.
    """
    proto = load(source)
    graph = _Graph(proto)
    points = graph.points()
    outputs = [replace(point.tensor, name=probe_name(i)) for i, point in enumerate(points)]
    present = {o.name for o in proto.graph.output}
    _give_out(proto, [tensor.native_name for tensor in outputs if tensor.native_name not in present])
    try:
        destination.write_bytes(proto.SerializeToString(deterministic=True))
    except ValueError as error:  # protobuf's limit
        raise UsageError("is too large to be instrumented: one ONNX file holds 2 GiB", where=str(source)) from error
    return Probed(
        path=destination,
        signature=Signature(signature.inputs, (*signature.outputs, *outputs)),
        points=tuple(replace(point, tensor=tensor) for point, tensor in zip(points, outputs, strict=True)),
    )


def _give_out(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    import onnx

    # The name alone is enough: ONNX Runtime infers the type, which the file need not state for inner tensors.
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))


class _Graph:
    """One file's graph as `find_points` takes it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._graph = proto.graph
        self._types = tensor_types(proto)
        self._shapes = _shapes(proto)
        self._ranks = {i.name: len(i.dims) for i in proto.graph.initializer}
        self._wide = {i.name: sum(d > 1 for d in i.dims) for i in proto.graph.initializer}
        self._constant = {i.name for i in proto.graph.initializer}
        for node in proto.graph.node:  # what is computed from constants only is one as well: decoded weights
            if node.output and all(name in self._constant for name in node.input if name) and not _has_body(node):
                self._constant.update(node.output)
                known = [name for name in node.input if name in self._ranks]
                for name in node.output if known and node.op_type in ("DequantizeLinear", "Cast", "Identity") else ():
                    self._ranks[name], self._wide[name] = self._ranks[known[0]], self._wide[known[0]]
        self._outputs = frozenset(o.name for o in proto.graph.output)
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in proto.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)
        self._is_quantized = any(node.op_type in INTEGER_TYPES.keys() | CONVERSIONS for node in proto.graph.node)

    def points(self) -> list[ProbePoint]:
        operators = [self._operator(node) for node in self._graph.node]
        found = find_points(operators, self._outputs)
        tensors = [self._described(point.tensor) for point in found]
        kept = {
            i
            for i, (point, tensor) in enumerate(zip(found, tensors, strict=True))
            if tensor is not None
            and (point.operator.role is Role.KERNEL or not self._is_quantized or tensor.quantization is not None)
        }
        numbers = {old: new for new, old in enumerate(sorted(kept))}
        nearest: dict[int, frozenset[int]] = {}  # the kept points that stand for a point
        points = []
        for i, (point, tensor) in enumerate(zip(found, tensors, strict=True)):
            inputs = frozenset().union(*(nearest.get(j, frozenset()) for j in point.inputs))
            nearest[i] = frozenset({numbers[i]}) if i in kept else inputs
            if tensor is not None and i in kept:
                points.append(ProbePoint(point.operator.layer, point.operator.type, tensor, tuple(sorted(inputs))))
        return points

    def _operator(self, node: onnx.NodeProto) -> Operator:
        inputs = tuple(name for name in node.input if name and name not in self._constant)
        role = self._role(node, inputs)
        bare = node.op_type in _BARE or (role is Role.KERNEL and self._types.get(node.output[0]) in _INTEGERS)
        bare = bare and node.op_type not in _OWN_SCALE
        return Operator(source_layer(node), node.op_type, role, inputs, tuple(filter(None, node.output)), bare)

    def _role(self, node: onnx.NodeProto, inputs: Sequence[str]) -> Role:
        constants = [name for name in node.input if name in self._constant]
        if not inputs:
            return Role.IGNORED
        if node.op_type in _KERNELS:
            return Role.KERNEL
        if node.op_type in _LOOKUPS and node.input[0] in constants and self._ranks.get(node.input[0], 0) >= 2:
            return Role.KERNEL if self._is_table(node.input[0]) else Role.PASSIVE
        if node.op_type in _ACTIVATIONS:
            return Role.ACTIVATION if len(inputs) == 1 else Role.COMPUTES
        if node.op_type == "Add" and len(inputs) == 1 and all(self._wide.get(name, 9) <= 1 for name in constants):
            return Role.BIAS
        if node.op_type in _PASSIVE:
            return Role.PASSIVE
        types = [self._types.get(name) for name in node.output if name]
        return Role.COMPUTES if any(kind in _FLOATS or node.op_type in _OWN_SCALE for kind in types) else Role.IGNORED

    def _is_table(self, name: str) -> bool:
        return self._types.get(name) in (*_FLOATS, "int8", "uint8", "int4", "uint4")

    def _described(self, tensor: str) -> SignatureTensor | None:
        """The tensor, or what stands for it in the file, as an output; None when it can't be given out as a real."""
        encoder = self._encoder(tensor)
        if encoder is not None:
            return self._quantized(encoder.output[0], self._quantization(encoder.input[1:3]))
        writer = next((node for node in self._graph.node if tensor in node.output), None)
        if writer is not None and writer.op_type in _OWN_SCALE:
            position = _OWN_SCALE[writer.op_type]
            return self._quantized(tensor, self._quantization(writer.input[position : position + 2]))
        dtype = _FLOATS.get(self._types.get(tensor, "float32"))
        return None if dtype is None else self._signature_tensor(tensor, dtype, None)

    def _encoder(self, tensor: str) -> onnx.NodeProto | None:
        """The QuantizeLinear behind a tensor, which ONNX Runtime may pull in front of moves and into the kernel."""
        readers = self._readers[tensor] if tensor not in self._outputs else []
        encoder = next((node for node in readers if node.op_type == "QuantizeLinear"), None)
        if encoder is None and len(readers) == 1 and readers[0].op_type in _MOVES:
            return self._encoder(readers[0].output[0])
        return encoder

    def _quantized(self, tensor: str, params: tuple[QuantParams, str] | None) -> SignatureTensor | None:
        if params is not None and params[1] in _INTEGERS:
            return self._signature_tensor(tensor, _INTEGERS[params[1]], params[0])
        # 16-bit and exotic types leave through the file's own decoder.
        decoder = next((node for node in self._readers[tensor] if node.op_type == "DequantizeLinear"), None)
        return None if decoder is None else self._signature_tensor(decoder.output[0], "float32", None)

    def _signature_tensor(self, name: str, dtype: DType, quantization: QuantParams | None) -> SignatureTensor:
        shape = self._shapes.get(name, ())
        return SignatureTensor(name, name, shape, dtype, "float32", quantization=quantization)

    def _quantization(self, names: Sequence[str]) -> tuple[QuantParams, str] | None:
        """Scale, zero point and integer type, where they are constant and per tensor."""
        arrays = [self._array(name) for name in names]
        if not arrays or arrays[0] is None or arrays[0].size != 1:
            return None
        zero_point = arrays[1] if len(arrays) > 1 else None
        dtype = "uint8" if zero_point is None else zero_point.dtype.name
        zero = 0 if zero_point is None else int(zero_point.reshape(-1)[0])
        return QuantParams((float(arrays[0].reshape(-1)[0]),), (zero,)), dtype

    def _array(self, name: str) -> Array | None:
        from onnx import numpy_helper

        constant = next((i for i in self._graph.initializer if i.name == name), None)
        if constant is None:
            nodes = (n for n in self._graph.node if n.op_type == "Constant" and n.output[0] == name)
            constant = next((a.t for n in nodes for a in n.attribute if a.name == "value"), None)
        return None if constant is None else numpy_helper.to_array(constant)


def _has_body(node: onnx.NodeProto) -> bool:
    """If, Loop and Scan: their bodies read tensors that the node does not list."""
    import onnx

    return any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)


def _shapes(proto: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Inferred shapes by tensor name; absent where inference can't tell."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except (onnx.shape_inference.InferenceError, ValueError):
        return {}
    return {
        v.name: tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or f"dim{i}"
            for i, d in enumerate(v.type.tensor_type.shape.dim)
        )
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.HasField("shape")
    }
