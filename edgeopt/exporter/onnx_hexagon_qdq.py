"""Writes a planned graph as QDQ ONNX in the types that QNN's HTP kernels have.

Activations are uint8 or uint16 with a zero point, weights int8 with zero point 0, biases int32 with scale = activation
scale * weight scale; the factors of a norm are uint8. Between operators of different width stands a DequantizeLinear
and a QuantizeLinear, which HTP does as one conversion. Formulas are those of ONNX's QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.calibration.weights import quantize_weight
from edgeopt.exporter.onnx_bias import with_room_for_bias
from edgeopt.exporter.onnx_hexagon_plan import NORMS, PRODUCTS, SETTINGS_FROM, HtpPlan
from edgeopt.exporter.onnx_qdq import activation_parameters
from edgeopt.exporter.onnx_rewrite import captured_names
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx

Width = Literal["uint8", "uint16", "int16"]


@dataclass(frozen=True, slots=True)
class Form:
    """An activation's integers: real = scale * (integer - zero_point)."""

    name: str
    scale: np.float32
    zero_point: int
    dtype: Width


def write_htp(
    proto: onnx.ModelProto, plan: HtpPlan, ranges: Mapping[str, Range], scheme: Scheme, second_operand: Width
) -> onnx.ModelProto:
    """The QDQ model that `plan` describes.

    Args:
        proto: the graph that was planned.
        ranges: by tensor, at least for `plan.observed`.
        scheme: how weights become integers.
        second_operand: what the second of two 16-bit activations that are multiplied as matrices becomes.
    """
    import onnx

    writer = _Writer(proto, plan, ranges, scheme, second_operand)
    writer.run()
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    constants = [n for n in proto.graph.node if n.op_type == "Constant"]
    read = {name for node in writer.nodes for name in node.input} | {o.name for o in result.graph.output}
    read.update(captured_names(writer.nodes))
    del result.graph.node[:]
    result.graph.node.extend([*(n for n in constants if n.output[0] in read), *writer.nodes])
    for value in (*result.graph.input, *result.graph.output):
        if value.name in plan.interface:
            value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    kept = [i for i in (*proto.graph.initializer, *writer.initializers) if i.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


class _Writer:
    def __init__(
        self, proto: onnx.ModelProto, plan: HtpPlan, ranges: Mapping[str, Range], scheme: Scheme, second_operand: Width
    ) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._inputs = [i.name for i in proto.graph.input]
        self._outputs = [o.name for o in proto.graph.output]
        self._plan = plan
        self._ranges = ranges
        self._scheme = scheme
        self._second_operand = second_operand
        self._first: dict[str, Form] = {}
        self._decoded: dict[tuple[str, Width], str] = {}
        self._written_real: set[str] = set(self._inputs)
        self._made: set[str] = set()

    def run(self) -> None:
        for name in self._inputs:
            if name in self._plan.interface:
                self._first[name] = self._form(name, "uint8", name)
        for node in self._plan.nodes:
            if self._plan.is_absorbed(node):
                continue
            if self._plan.computes_integers(node):
                self._write_integer(node)
            else:
                self._write_float(node)
        for name in self._outputs:
            if name in self._plan.interface:
                self._ensure_first(name)
            elif name in self._first and self._float_name(name) != name:
                self._decode(self._first[name], name)

    def _write_float(self, node: onnx.NodeProto) -> None:
        copy = self._copy(node)
        copy.input[:] = [self._real(name) for name in node.input]
        copy.output[:] = [self._float_name(name) for name in node.output]
        self._written_real.update(node.output)
        self.nodes.append(copy)

    def _write_integer(self, node: onnx.NodeProto) -> None:
        copy = self._copy(node)
        constant_weight = len(node.input) > 1 and node.input[1] in self._plan.constants
        if node.op_type in PRODUCTS and constant_weight:
            self._set_product_inputs(copy, node)
        elif node.op_type in NORMS:
            self._set_norm_inputs(copy, node)
        else:
            self._set_data_inputs(copy, node)
        results = [self._plan.folded.get(name, name) for name in node.output]
        real = [self._plan.is_real(name) for name in node.output]
        copy.output[:] = [f"{name}_real" if kind else name for name, kind in zip(results, real, strict=True)]
        self.nodes.append(copy)
        for name, kind in zip(results, real, strict=True):
            if kind and name:
                form = self._form(name, _unsigned(self._plan.bits(name)), self._integer_name(name))
                self._quantize(f"{name}_real", form)
                self._first[name] = form

    def _set_data_inputs(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        data = set(self._plan.data(node))
        wanted = _unsigned(self._plan.bits_of_node(node))
        for i, name in enumerate(node.input[: SETTINGS_FROM.get(node.op_type, len(node.input))]):
            if name not in data:
                continue
            width = wanted
            if i == 1 and wanted == "uint16":
                # HTP has neither a product of two uint16 tensors nor a PRelu with slopes of that type.
                width = {"MatMul": self._second_operand, "PRelu": "uint8"}.get(node.op_type, wanted)
            copy.input[i] = self._operand(name, width)

    def _set_product_inputs(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        width = _unsigned(self._plan.bits_of_node(node))
        copy.input[0] = self._operand(node.input[0], width)
        axis = self._plan.weight_axis(node)
        weight = quantize_weight(self._plan.constants[node.input[1]], self._scheme, axis)
        if len(node.input) > 2 and node.input[2]:
            bias = self._plan.constants[node.input[2]]
            input_scale = float(self._parameters(node.input[0], width)[0])
            weight = with_room_for_bias(weight, self._plan.constants[node.input[1]], bias, input_scale, self._scheme)
            copy.input[2] = self._bias(node, bias, input_scale, weight.scale)
        copy.input[1] = self._constant_decoded(f"{node.name}_weight", weight.values, weight.scale, weight.axis)

    def _set_norm_inputs(self, copy: onnx.NodeProto, node: onnx.NodeProto) -> None:
        width = _unsigned(self._plan.bits_of_node(node))
        copy.input[0] = self._operand(node.input[0], width)
        factors = self._plan.constants[node.input[1]]
        scale, zero_point = activation_parameters(_bounds(factors), _narrow(self._scheme))
        steps = np.clip(np.rint(factors / scale) + zero_point, 0, 255).astype(np.uint8)
        copy.input[1] = self._constant_decoded(f"{node.name}_scale", steps, np.asarray(scale), None, zero_point)
        if len(node.input) > 2 and node.input[2]:
            input_scale = float(self._parameters(node.input[0], width)[0])
            copy.input[2] = self._bias(node, self._plan.constants[node.input[2]], input_scale, np.asarray(scale))

    def _bias(self, node: onnx.NodeProto, bias: Array, input_scale: float, weight_scale: Array) -> str:
        scale = (np.float32(input_scale) * weight_scale).astype(np.float32)
        limit = float(np.iinfo(np.int32).max)
        steps = np.clip(np.rint(bias.astype(np.float64) / scale.astype(np.float64)), -limit, limit).astype(np.int32)
        return self._constant_decoded(f"{node.name}_bias", steps, scale, 0 if scale.ndim else None)

    def _operand(self, name: str, width: Width) -> str:
        """The dequantized tensor that an operator of this width reads."""
        if name in self._plan.constants:
            return self._quantized_constant(name, width)
        if (name, width) not in self._decoded:
            self._ensure_first(name)
            form = self._first[name]
            if form.dtype != width:
                form = self._form(name, width, f"{name}_{width}")
                self._quantize(self._operand(name, self._first[name].dtype), form)
            self._decoded[name, width] = f"{form.name}_dq"
            self._decode(form, f"{form.name}_dq")
        return self._decoded[name, width]

    def _ensure_first(self, name: str) -> None:
        if name not in self._first:
            form = self._form(name, _unsigned(self._plan.bits(name)), self._integer_name(name))
            self._quantize(self._float_name(name), form)
            self._first[name] = form

    def _real(self, name: str) -> str:
        """The tensor that a float operator reads."""
        if name in self._first and (name not in self._written_real or name in self._plan.interface):
            return self._operand(name, self._first[name].dtype)
        return self._float_name(name)

    def _float_name(self, name: str) -> str:
        """Name of the float tensor that a node writes, which must leave an integer output's name to the integers."""
        if name in self._first and name not in self._written_real:
            return f"{name}_real"
        return f"{name}_real" if name in self._plan.interface and name not in self._inputs else name

    def _integer_name(self, name: str) -> str:
        return name if name in self._plan.interface else f"{name}_q"

    def _form(self, name: str, width: Width, integer: str) -> Form:
        return Form(integer, *self._parameters(name, width), width)

    def _parameters(self, name: str, width: Width) -> tuple[np.float32, int]:
        bits = 8 if width == "uint8" else 16
        origin = self._plan.origin(name)
        match self._plan.unit(origin):
            case "sigmoid":  # what HTP's 16-bit kernels demand, and its 8-bit ones compute with
                return np.float32(2.0**-bits), 0
            case "tanh":
                return np.float32(2.0 ** (1 - bits)), 2 ** (bits - 1)
        constant = self._plan.constants.get(origin)
        bounds = self._ranges[origin] if constant is None else _bounds(constant)
        if width == "int16":
            signed = replace(self._scheme, precision="w8a16", activation_symmetric=True)
            return activation_parameters(bounds, signed)[0], 0
        scheme = replace(self._scheme, precision="w8a16") if bits == 16 else _narrow(self._scheme)
        return activation_parameters(bounds, scheme)

    def _quantized_constant(self, name: str, width: Width) -> str:
        values = self._plan.constants[name]
        scale, zero_point = self._parameters(name, width)
        info = np.iinfo(width)
        steps = np.clip(np.rint(values / scale) + zero_point, info.min, info.max).astype(width)
        return self._constant_decoded(f"{name}_{width}", steps, np.asarray(scale), None, zero_point)

    def _constant_decoded(self, stem: str, steps: Array, scale: Array, axis: int | None, zero_point: int = 0) -> str:
        """An integer constant behind its DequantizeLinear; returns the real tensor's name."""
        from onnx import helper

        real = f"{stem}_decoded"
        if real not in self._made:
            self._made.add(real)
            inputs = [
                self._constant(f"{stem}_quantized", steps),
                self._constant(f"{stem}_step", scale),
                self._constant(f"{stem}_zero_point", np.full(scale.shape, zero_point, dtype=steps.dtype)),
            ]
            decode = helper.make_node("DequantizeLinear", inputs, [real], name=f"{stem}/decode")
            if axis is not None:
                decode.attribute.append(helper.make_attribute("axis", axis))
            self.nodes.append(decode)
        return real

    def _quantize(self, real: str, form: Form) -> None:
        from onnx import helper

        inputs = [real, *self._parameter_constants(form)]
        self.nodes.append(helper.make_node("QuantizeLinear", inputs, [form.name], name=f"{form.name}/quantize"))

    def _decode(self, form: Form, real: str) -> None:
        from onnx import helper

        inputs = [form.name, *self._parameter_constants(form)]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [real], name=f"{real}/dequantize"))

    def _parameter_constants(self, form: Form) -> list[str]:
        zero_point = np.array(form.zero_point, dtype=form.dtype)
        scale = self._constant(f"scale_{float(form.scale).hex()}", np.asarray(form.scale))
        return [scale, self._constant(f"zero_point_{form.dtype}_{form.zero_point}", zero_point)]

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


def _unsigned(bits: int) -> Width:
    return "uint16" if bits == 16 else "uint8"


def _narrow(scheme: Scheme) -> Scheme:
    return replace(scheme, precision="w8a8")


def _bounds(values: Array) -> Range:
    return Range(float(values.min(initial=0)), float(values.max(initial=0)))
