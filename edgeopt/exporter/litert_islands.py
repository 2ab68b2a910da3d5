"""Float operators left in a quantized .tflite file, turned into integer ones.

They are those that LiteRT has integer kernels for, and ai-edge-quantizer no recipe.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.exporter.litert_integer import integer_npu
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Versions of the int8 and the int16 kernel (tensorflow/lite/tools/versioning/op_version.cc), None where there is none.
_FREE: Mapping[str, tuple[int, int | None]] = {
    "EXP": (2, 2), "LEAKY_RELU": (1, 2), "LOG": (2, 2), "RELU6": (2, 3),
}  # fmt: skip
#: Those whose inputs must have the output's scale.
_SAME_SCALE: Mapping[str, tuple[int, int | None]] = {
    "EXPAND_DIMS": (1, 1), "MINIMUM": (2, 4), "REDUCE_MAX": (2, 3), "REVERSE_V2": (2, None), "SPLIT_V": (2, None),
    "SQUEEZE": (1, 2), "TILE": (3, None),
}  # fmt: skip
_KERNELS = {**_FREE, **_SAME_SCALE}
_TYPES = {8: "INT8", 16: "INT16"}


def fill_islands(
    model: schema.ModelT, ranges: Mapping[str, Range], kept: Collection[str], wide: Collection[str], scheme: Scheme
) -> None:
    """Quantize such operators in the main graph, in place.

    Args:
        ranges: of the float file's activations.
        kept: output tensors of operators that stay float.
        wide: first outputs of operators that get 16 bits.
    """
    npu = integer_npu(scheme)
    if npu is None:
        return
    editor = Editor(model)
    filler = _Filler(editor, ranges, scheme)
    for op in list(editor.graph.operators):
        kind = editor.kind(op)
        if kind not in npu.fills or editor.dtype(editor.outputs(op)[0]) != "FLOAT32":
            continue
        name = editor.tensor_name(editor.outputs(op)[0])
        bits = 16 if name in wide else scheme.activation_bits
        if name not in kept and _version(kind, bits) is not None and filler.can(op):
            filler.fill(op, bits)
    _join_conversions(editor)
    editor.drop_unused_operators()


def _version(kind: str, bits: int) -> int | None:
    int8, int16 = _KERNELS[kind]
    return int16 if bits == 16 else int8


@dataclass(frozen=True, slots=True)
class _Integers:
    """How an activation is quantized; one scale for the tensor."""

    bits: int
    scale: float
    zero_point: int

    @classmethod
    def of(cls, values: Range, bits: int, symmetric: bool) -> _Integers:
        low, high, tiny = min(values.min, 0.0), max(values.max, 0.0), float(np.finfo(np.float32).tiny)
        largest = 2 ** (bits - 1) - 1
        if symmetric or bits == 16:
            return cls(bits, max(-low, high, tiny) / largest, 0)
        scale = max(high - low, tiny) / (2 * largest + 1)
        return cls(bits, scale, round(-largest - 1 - low / scale))

    def quantize(self, values: Array) -> Array:
        limit = 2 ** (self.bits - 1)
        integers = np.clip(np.round(values / self.scale) + self.zero_point, -limit, limit - 1)
        result: Array = integers.astype(np.int8 if self.bits == 8 else np.int16)
        return result


class _Filler:
    def __init__(self, editor: Editor, ranges: Mapping[str, Range], scheme: Scheme) -> None:
        self._editor, self._ranges, self._scheme = editor, ranges, scheme

    def can(self, op: schema.OperatorT) -> bool:
        """Whether every float input is an integer one converted, or a constant, and every output's range is known."""
        editor, producers = self._editor, self._editor.producers()
        inputs = [i for i in editor.inputs(op) if i >= 0 and editor.dtype(i) == "FLOAT32" and not editor.is_constant(i)]
        converted = all(i in producers and editor.kind(producers[i]) == "DEQUANTIZE" for i in inputs)
        return converted and all(editor.tensor_name(i) in self._ranges for i in editor.outputs(op))

    def fill(self, op: schema.OperatorT, bits: int) -> None:
        editor, kind = self._editor, self._editor.kind(op)
        outputs = {i: self._integers(i, bits) for i in editor.outputs(op)}
        shared = next(iter(outputs.values())) if kind in _SAME_SCALE else None
        before, inputs = [], []
        for index in editor.inputs(op):
            if index < 0 or editor.dtype(index) != "FLOAT32":
                inputs.append(index)
                continue
            wanted = shared or self._integers(index, bits)
            constant = editor.constant(index)
            if constant is not None:
                name = f"{editor.tensor_name(editor.outputs(op)[0])}/integer"
                inputs.append(editor.add_constant(wanted.quantize(constant), name, [wanted.scale], wanted.zero_point))
            else:
                integer = self._activation(index, wanted)
                before.append(self._convert("QUANTIZE", index, integer))
                inputs.append(integer)
        after, made = [], []
        for index, wanted in outputs.items():
            integer = self._activation(index, shared or wanted)
            after.append(self._convert("DEQUANTIZE", integer, index))
            made.append(integer)
        filled = editor.make(kind, inputs, made, op.builtinOptions)
        _set_version(editor, filled, _version(kind, bits) or 1)
        editor.replace(op, [*before, filled, *after])

    def _integers(self, index: int, bits: int) -> _Integers:
        """As the file already has the tensor in as many bits, or by its range."""
        editor = self._editor
        producer = editor.producers().get(index)
        near = [o for r in editor.readers()[index] if editor.kind(r) == "QUANTIZE" for o in editor.outputs(r)]
        if producer is not None and editor.kind(producer) == "DEQUANTIZE":
            near.insert(0, editor.inputs(producer)[0])
        for other in near:
            if editor.dtype(other) == _TYPES[bits] and len(editor.scales(other)) == 1:
                return _Integers(bits, editor.scales(other)[0], editor.zero_points(other)[0])
        constant = editor.constant(index)
        name = editor.tensor_name(index).removesuffix("_dequant")
        values = self._ranges.get(name) or self._ranges.get(editor.tensor_name(index))
        if constant is not None:
            values = Range(float(constant.min()), float(constant.max()))
        if values is None:
            values = self._span(near[0])
        return _Integers.of(values, bits, self._scheme.activation_symmetric)

    def _span(self, index: int) -> Range:
        """What an activation's integers can express."""
        bits = 8 if self._editor.dtype(index) == "INT8" else 16
        scale, zero_point = self._editor.scales(index)[0], self._editor.zero_points(index)[0]
        limit = 2 ** (bits - 1)
        return Range((-limit - zero_point) * scale, (limit - 1 - zero_point) * scale)

    def _activation(self, like: int, integers: _Integers) -> int:
        from ai_edge_litert import schema_py_generated as schema

        index = self._editor.add_float(like, self._editor.tensor_name(like).partition(":")[0])
        tensor = self._editor.graph.tensors[index]
        tensor.type = getattr(schema.TensorType, _TYPES[integers.bits])
        params = schema.QuantizationParametersT()
        params.scale = np.array([integers.scale], np.float32)
        params.zeroPoint = np.array([integers.zero_point], np.int64)
        tensor.quantization = params
        return index

    def _convert(self, kind: str, source: int, result: int) -> schema.OperatorT:
        from ai_edge_litert import schema_py_generated as schema

        options = schema.QuantizeOptionsT() if kind == "QUANTIZE" else schema.DequantizeOptionsT()
        made = self._editor.make(kind, (source,), result, options)
        if self._editor.dtype(source if kind == "DEQUANTIZE" else result) == "INT16":
            _set_version(self._editor, made, 3 if kind == "DEQUANTIZE" else 2)
        return made


def _set_version(editor: Editor, op: schema.OperatorT, version: int) -> None:
    """Give one operator a code of at least this version; others of its kind keep theirs."""
    from ai_edge_litert import schema_py_generated as schema

    codes = editor.model.operatorCodes
    old = codes[op.opcodeIndex]
    for position, code in enumerate(codes):
        if code.builtinCode == old.builtinCode and code.version >= version:
            op.opcodeIndex = position
            return
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = old.builtinCode, old.deprecatedBuiltinCode, version
    codes.append(code)
    op.opcodeIndex = len(codes) - 1


def _join_conversions(editor: Editor) -> None:
    """Integers that become float and then integers again stay integers; where nothing changes, nothing is converted."""
    for op in list(editor.graph.operators):
        producer = editor.producers().get(editor.inputs(op)[0]) if editor.kind(op) == "QUANTIZE" else None
        if producer is None or editor.kind(producer) != "DEQUANTIZE":
            continue
        (source, *_), (result, *_) = editor.inputs(producer), editor.outputs(op)
        op.inputs = np.array([source], np.int32)
        if editor.same_values(source, result):
            editor.bypass(op)
