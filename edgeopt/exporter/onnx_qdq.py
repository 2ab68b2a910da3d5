"""Static ONNX: the float graph with QuantizeLinear/DequantizeLinear pairs around what computes in integers.

Activations are uint8 with a zero point, weights int8, biases int32 with scale = activation scale * weight scale: the
form that ONNX Runtime's kernels are fast with on x86 and bit-exact with on Arm. With 16-bit activations (uint16, opset
21) the file looks the same; NPU providers have kernels for it, ONNX Runtime's CPU computes it in float. Formulas are
those of the ONNX operators QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.calibration.weights import QuantizedWeight, quantize_weight
from edgeopt.exporter.onnx_bias import with_room_for_bias
from edgeopt.exporter.onnx_plan import UNIT_RANGE, Plan, Role
from edgeopt.exporter.onnx_rewrite import captured_names, constants_of, number
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor's quantized form: name of the integer tensor, and real = scale * (integer - zero_point)."""

    name: str
    scale: np.float32
    zero_point: int


def quantize_graph(proto: onnx.ModelProto, plan: Plan, ranges: Mapping[str, Range], scheme: Scheme) -> onnx.ModelProto:
    """The QDQ model that `plan` describes.

    Args:
        proto: the graph that was planned.
        ranges: a range for each of `plan.observed`, and for others whose range was learned.
        scheme: how weights and activations become integers.
    """
    import onnx

    writer = _Writer(proto, plan, ranges, scheme)
    writer.run()
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    read = {name for node in writer.nodes for name in node.input} | {o.name for o in result.graph.output}
    read.update(captured_names(writer.nodes))
    del result.graph.node[:]
    result.graph.node.extend(n for n in writer.nodes if n.op_type != "Constant" or n.output[0] in read)
    for value in (*result.graph.input, *result.graph.output):
        if value.name in plan.interface:
            value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(integer_type(scheme)))
    kept = [i for i in (*proto.graph.initializer, *writer.initializers) if i.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


def integer_type(scheme: Scheme) -> type[np.uint8] | type[np.uint16]:
    """What activations are stored as."""
    return np.uint16 if scheme.activation_bits == 16 else np.uint8


def activation_parameters(bounds: Range, scheme: Scheme) -> tuple[np.float32, int]:
    """Scale and zero point of an activation; zero is always representable, as padding needs it."""
    low, high = min(bounds.min, 0.0), max(bounds.max, 0.0)
    top = 2**scheme.activation_bits - 1
    middle = top // 2 + 1
    if scheme.activation_symmetric:
        return _usable(max(-low, high) / (middle - 1), scheme), middle
    scale = _usable((high - low) / top, scheme)
    return scale, int(np.clip(np.rint(-low / float(scale)), 0, top))


def unit_scale(scheme: Scheme) -> np.float32:
    """For values in [0, 1] with zero point 0. The nearest power of two clips 1 itself, by less than one step."""
    steps = 2**scheme.activation_bits
    return np.float32(1 / (steps if scheme.scale == "power-of-two" else steps - 1))


def _usable(scale: float, scheme: Scheme) -> np.float32:
    # A tensor that is always zero still needs a scale, and a subnormal one is as good as none.
    if scale < float(np.finfo(np.float32).tiny):
        return np.float32(1)
    return np.float32(2.0 ** np.ceil(np.log2(scale)) if scheme.scale == "power-of-two" else scale)


class _Writer:
    def __init__(self, proto: onnx.ModelProto, plan: Plan, ranges: Mapping[str, Range], scheme: Scheme) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._source = list(proto.graph.node)
        self._inputs = [i.name for i in proto.graph.input]
        self._outputs = {o.name for o in proto.graph.output}
        self._constants = constants_of(proto.graph)
        self._plan = plan
        self._ranges = ranges
        self._scheme = scheme
        self._integer = integer_type(scheme)
        self._forms: dict[str, Quantized] = {}
        self._decoded: dict[str, str] = {}
        self._made: set[str] = set()
        self._products: set[str] = set()

    def run(self) -> None:
        for name in self._inputs:
            if name in self._plan.interface:
                scale, zero_point = self._parameters(name)
                self._forms[name] = Quantized(name, scale, zero_point)
        for node in self._source:
            role = self._plan.roles.get(node.name)
            if role is None:
                self._write_float(node)
            elif role is Role.PAD:
                self._write_pad(node)
            elif role is Role.RESCALE:
                self._write_rescale(node)
            elif role is Role.FOLDED:
                self._clip_integers(node)
            else:
                self._write_kernel(node, role)
        for name in sorted(self._outputs):
            if name in self._plan.interface and name not in self._forms:
                self._quantize(name, *self._parameters(name))
            elif name in self._plan.stored and name not in self._plan.interface:
                self._decoded_activation(name)

    def _write_float(self, node: onnx.NodeProto) -> None:
        copy = self._copy(node)
        for i, name in enumerate(node.input):
            copy.input[i] = self._real(name)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and copy.input[0] in self._decoded.values():
            copy.input[0] = self._decoded_by_channel(node)
        if node.op_type == "Add" and self._products.intersection(node.input):
            self._keep_bias_apart(copy)
        copy.output[:] = [self._float_name(name) for name in node.output]
        self.nodes.append(copy)

    def _keep_bias_apart(self, node: onnx.NodeProto) -> None:
        """Give a bias a leading dimension: ONNX Runtime merges MatMul and a 1-D bias into a Gemm that runs in float."""
        for i, name in enumerate(node.input):
            bias = self._constants.get(name)
            if bias is not None and bias.ndim == 1:
                node.input[i] = self._constant(f"{name}_row", bias[np.newaxis])

    def _write_kernel(self, node: onnx.NodeProto, role: Role) -> None:
        copy = self._copy(node)
        if role in (Role.CONV, Role.GEMM):
            self._set_product_inputs(copy, node, axis=0 if role is Role.CONV or number(node, "transB", 0) else 1)
        elif role is Role.MATMUL:
            for i, name in enumerate(node.input):
                copy.input[i] = self._matmul_operand(name, i)
            self._products.update(node.output)
        elif node.op_type == "HardSigmoid":
            copy = self._hard_sigmoid(node)
        else:
            copy.input[0] = self._operand(node.input[0])
            if node.op_type in ("Add", "Mul", "Concat"):
                copy.input[:] = [self._operand(name) for name in node.input]
        results = [self._plan.folded.get(name, name) for name in node.output]
        copy.output[:] = [self._float_name(name) for name in results]
        self.nodes.append(copy)
        for name in results:
            if name not in self._plan.stored:
                continue
            if role is Role.MOVE:
                form = self._forms[node.input[0]]
                self._quantize(name, form.scale, form.zero_point)
            elif node.op_type == "HardSigmoid" or (node.op_type in UNIT_RANGE and name not in self._ranges):
                self._quantize(name, unit_scale(self._scheme), 0)
            else:
                self._quantize(name, *self._parameters(name))

    def _clip_integers(self, node: onnx.NodeProto) -> None:
        """Do what saturation does not of a folded Relu or Clip: a learned range, or one whose scale was rounded up to a
        power of two, may reach beyond its bounds."""
        from onnx import helper

        name = node.output[0]
        form = self._forms[name]
        highest = int(np.iinfo(self._integer).max)
        bounds = [
            int(np.clip(np.rint(bound / float(form.scale)) + form.zero_point, 0, highest))
            for bound in self._plan.clip_bounds(node)
        ]
        if bounds == [0, highest]:
            return
        clipped = Quantized(f"{name}_clipped", form.scale, form.zero_point)
        if name in self._outputs and name in self._plan.interface:
            # What leaves the graph is called as it was.
            maker = next(made for made in reversed(self.nodes) if form.name in made.output)
            form, clipped = replace(form, name=f"{name}_unclipped"), replace(clipped, name=name)
            maker.output[0] = form.name
        limits = [self._constant(f"step_{bound}", np.array(bound, dtype=self._integer)) for bound in bounds]
        self.nodes.append(helper.make_node("Clip", [form.name, *limits], [clipped.name], name=node.name))
        self._forms[name] = clipped

    def _write_pad(self, node: onnx.NodeProto) -> None:
        """Pad the integers themselves: around a float Pad there is no kernel, and zero is the zero point."""
        form = self._forms[node.input[0]]
        name = self._integer_name(node.output[0])
        copy = self._copy(node)
        value = self._constant(f"{form.name}_pad", np.array(form.zero_point, dtype=self._integer))
        copy.input[:] = [form.name, node.input[1], value, *node.input[3:]]
        copy.output[:] = [name]
        self.nodes.append(copy)
        self._forms[node.output[0]] = Quantized(name, form.scale, form.zero_point)

    def _write_rescale(self, node: onnx.NodeProto) -> None:
        form, factor = self._forms[node.input[0]], self._plan.factor(node)
        scale = np.float32(float(form.scale) * (factor if factor is not None else 1.0))
        self._forms[node.output[0]] = Quantized(form.name, scale, form.zero_point)

    def _hard_sigmoid(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """clip(alpha x + beta, 0, 1) as an int8 Add: alpha goes into the input's scale, the output range clips."""
        from onnx import helper

        form = self._forms[node.input[0]]
        alpha, beta = number(node, "alpha", 0.2), number(node, "beta", 0.5)
        scaled = f"{node.output[0]}_scaled"
        self._decode(Quantized(form.name, np.float32(float(form.scale) * alpha), form.zero_point), scaled)
        offset = self._quantized_constant(f"{node.output[0]}_beta", np.array(beta, dtype=np.float32))
        return helper.make_node("Add", [scaled, offset], list(node.output), name=node.name)

    def _set_product_inputs(self, copy: onnx.NodeProto, node: onnx.NodeProto, axis: int) -> None:
        copy.input[0] = self._operand(node.input[0])
        input_scale = self._forms[node.input[0]].scale
        bias = self._constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        # The kernel for grouped convolutions is 50 times slower where channels differ in their zero points.
        grouped = number(node, "group", 1) > 1
        scheme = replace(self._scheme, weight_symmetric=True) if grouped else self._scheme
        weight = quantize_weight(self._constants[node.input[1]], scheme, axis)
        if bias is not None:
            weight = with_room_for_bias(weight, self._constants[node.input[1]], bias, float(input_scale), self._scheme)
        stem = node.name
        copy.input[1] = self._decoded_weight(f"{stem}_weight", weight)
        if bias is not None:
            bias_scale = (np.float32(input_scale) * weight.scale).astype(np.float32)
            steps = np.rint(bias.astype(np.float64) / bias_scale.astype(np.float64)).astype(np.int32)
            copy.input[2] = self._decoded_constant(f"{stem}_bias", steps, bias_scale, 0)

    def _matmul_operand(self, name: str, position: int) -> str:
        if name not in self._constants:
            return self._operand(name)
        if position == 0:
            return self._quantized_constant(name, self._constants[name])
        weight = self._constants[name]
        # The kernels take one scale per column only for plain matrices.
        axis = 1 if weight.ndim == 2 else None
        return self._decoded_weight(f"{name}_s8", quantize_weight(weight, self._scheme, axis))

    def _decoded_weight(self, stem: str, weight: QuantizedWeight) -> str:
        return self._decoded_constant(stem, weight.values, weight.scale, weight.axis or 0, weight.zero_point)

    def _decoded_constant(
        self, stem: str, steps: Array, scale: Array, axis: int, zero_point: Array | None = None
    ) -> str:
        """An integer constant behind its DequantizeLinear; returns the real tensor's name."""
        from onnx import helper

        real = f"{stem}_decoded"
        if real not in self._made:
            self._made.add(real)
            zeros = np.zeros(scale.shape, dtype=steps.dtype)
            inputs = [
                self._constant(f"{stem}_quantized", steps),
                self._constant(f"{stem}_scale", scale),
                self._constant(f"{stem}_zero_point", zeros if zero_point is None else zero_point),
            ]
            decode = helper.make_node("DequantizeLinear", inputs, [real], name=f"{stem}/decode")
            if scale.ndim:
                decode.attribute.append(helper.make_attribute("axis", axis))
            self.nodes.append(decode)
        return real

    def _quantized_constant(self, name: str, values: Array) -> str:
        """A constant operand of an elementwise kernel, with its own range."""
        bounds = Range(float(values.min(initial=0)), float(values.max(initial=0)))
        scale, zero_point = activation_parameters(bounds, self._scheme)
        bits = self._scheme.activation_bits
        stem, real = f"{name}_u{bits}", f"{name}_u{bits}_decoded"
        if real not in self._made:
            self._made.add(real)
            steps = np.clip(np.rint(values / scale) + zero_point, 0, 2**bits - 1).astype(self._integer)
            self._decode(Quantized(self._constant(f"{stem}_quantized", steps), scale, zero_point), real)
        return real

    def _operand(self, name: str) -> str:
        """The dequantized tensor that an int8 kernel reads; quantizes it first where it is still only real."""
        if name in self._constants:
            return self._quantized_constant(name, self._constants[name])
        if name not in self._forms:
            self._quantize(name, *self._parameters(name))
        return self._decoded_activation(name)

    def _real(self, name: str) -> str:
        """The tensor that a float node reads: unquantized where that exists."""
        in_file_as_integer = name in self._plan.stored or (name in self._plan.interface and name in self._inputs)
        return self._decoded_activation(name) if in_file_as_integer else self._float_name(name)

    def _decoded_activation(self, name: str) -> str:
        if name not in self._decoded:
            keeps_name = name in self._outputs and name in self._plan.stored and name not in self._plan.interface
            self._decoded[name] = name if keeps_name else f"{name}_dq"
            self._decode(self._forms[name], self._decoded[name])
        return self._decoded[name]

    def _decoded_by_channel(self, node: onnx.NodeProto) -> str:
        """The input of a float product, decoded with its one scale repeated for every channel.

        Behind a DequantizeLinear with a scalar scale, ONNX Runtime (WeightBiasQuantization) takes the product for one
        that someone forgot to quantize, and quantizes its weights itself, with one scale for all of them.
        """
        name, weight = node.input[0], self._constants.get(node.input[1])
        if weight is None:
            return self._decoded_activation(name)
        if node.op_type == "Conv":
            channels = weight.shape[1] * int(number(node, "group", 1))
        else:
            channels = weight.shape[1 if node.op_type == "Gemm" and number(node, "transB", 0) else 0]
        real = f"{name}_dq_{channels}"
        if real not in self._made:
            self._made.add(real)
            self._decode_by_channel(self._forms[name], real, channels)
        return real

    def _decode_by_channel(self, form: Quantized, real: str, channels: int) -> None:
        from onnx import helper

        scale, zero_point = self._parameter_constants(form)
        inputs = [
            form.name,
            self._constant(f"{scale}_x{channels}", np.full(channels, form.scale, dtype=np.float32)),
            self._constant(f"{zero_point}_x{channels}", np.full(channels, form.zero_point, dtype=self._integer)),
        ]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [real], name=f"{real}/dequantize", axis=1))

    def _float_name(self, name: str) -> str:
        """Name of the float tensor that a node writes, which must leave a graph output's name to what is given out."""
        taken = name in self._outputs and (name in self._plan.stored or name in self._plan.interface)
        return f"{name}_real" if taken else name

    def _integer_name(self, name: str) -> str:
        return name if name in self._outputs and name in self._plan.interface else f"{name}_q"

    def _quantize(self, name: str, scale: np.float32, zero_point: int) -> None:
        from onnx import helper

        form = Quantized(self._integer_name(name), scale, zero_point)
        inputs = [self._float_name(name), *self._parameter_constants(form)]
        self.nodes.append(helper.make_node("QuantizeLinear", inputs, [form.name], name=f"{name}/quantize"))
        self._forms[name] = form

    def _decode(self, form: Quantized, real: str) -> None:
        from onnx import helper

        inputs = [form.name, *self._parameter_constants(form)]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [real], name=f"{real}/dequantize"))

    def _parameter_constants(self, form: Quantized) -> list[str]:
        scale = self._constant(f"scale_{float(form.scale).hex()}", np.asarray(form.scale))
        return [scale, self._constant(f"zero_point_{form.zero_point}", np.array(form.zero_point, dtype=self._integer))]

    def _parameters(self, name: str) -> tuple[np.float32, int]:
        return activation_parameters(self._ranges[name], self._scheme)

    def _constant(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        if name not in self._made:
            self._made.add(name)
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))
        return name

    def _copy(self, node: onnx.NodeProto) -> onnx.NodeProto:
        import onnx

        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        return copy
