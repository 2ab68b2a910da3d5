"""Kernels that the Edge TPU compiler doesn't know, as several that it does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.formats import edge_tpu_rules as rules

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_INT8 = (-128, 127)


def write_products_as_convolutions(editor: Editor) -> int:
    """FULLY_CONNECTED with a weight scale per channel as CONV_2D of 1x1, between two reshapes.

    TensorFlow Lite has had such products since 2024 only (https://github.com/tensorflow/tflite-micro/pull/2602); the
    compiler's takes one scale for the whole weight. Both kernels add the same products in int32 and rescale each
    channel with the same multiplier, but LiteRT's convolution rounds that twice: where the real number is within a
    few thousandths of a tie, the result is a step off.
    """
    found = 0
    for op in list(editor.graph.operators):
        if rules.is_per_channel_product(editor, op) and editor.is_constant(editor.inputs(op)[1]):
            editor.replace(op, _as_convolution(editor, op))
            found += 1
    return found


def _as_convolution(editor: Editor, op: schema.OperatorT) -> list[schema.OperatorT]:
    from ai_edge_litert import schema_py_generated as schema

    (source, weight, *rest), (output,) = editor.inputs(op), editor.outputs(op)
    layer, (channels, width) = editor.layer(op), editor.shape(weight)
    rows = editor.size(source) // width
    options = schema.Conv2DOptionsT()
    options.padding, options.strideW, options.strideH = schema.Padding.VALID, 1, 1
    options.fusedActivationFunction = editor.options(op).get("fusedActivationFunction", 0)
    flat = editor.add_view(source, (1, 1, rows, width), f"{layer}:in")
    result = editor.add_view(output, (1, 1, rows, channels), f"{layer}:out")
    kernel = editor.add_view(weight, (channels, 1, 1, width), f"{layer}:out/1")
    bias = rest[0] if rest and rest[0] >= 0 else _no_bias(editor, source, weight, f"{layer}:out/2")
    return [
        _reshape(editor, source, flat),
        editor.make("CONV_2D", (flat, kernel, bias), result, options),
        _reshape(editor, result, output),
    ]


def _no_bias(editor: Editor, source: int, weight: int, name: str) -> int:
    """Zeros: LiteRT's int8 convolution insists on a bias."""
    (scale,) = editor.scales(source)
    scales = [scale * own for own in editor.scales(weight)]
    return editor.add_constant(np.zeros(len(scales), np.int32), name, scales)


def _reshape(editor: Editor, source: int, output: int) -> schema.OperatorT:
    from ai_edge_litert import schema_py_generated as schema

    shape = editor.add_constant(np.array(editor.shape(output), np.int32), f"{editor.tensor_name(output)}/shape")
    return editor.make("RESHAPE", (source, shape), output, schema.ReshapeOptionsT())


def split_groups(editor: Editor) -> int:
    """A grouped int8 CONV_2D as SPLIT, one convolution per group, and CONCATENATION."""
    found = 0
    for op in list(editor.graph.operators):
        if rules.convolution_groups(editor, op) > 1 and editor.dtype(editor.inputs(op)[0]) == "INT8":
            editor.replace(op, _as_groups(editor, op))
            found += 1
    return found


def _as_groups(editor: Editor, op: schema.OperatorT) -> list[schema.OperatorT]:
    from ai_edge_litert import schema_py_generated as schema

    groups = rules.convolution_groups(editor, op)
    (source, *constants), (output,) = editor.inputs(op), editor.outputs(op)
    name = editor.tensor_name(output)
    parts = [_channels_of(editor, source, groups, f"{name}:in{group}") for group in range(groups)]
    results = [_channels_of(editor, output, groups, f"{name}:out{group}") for group in range(groups)]
    split, join = schema.SplitOptionsT(), schema.ConcatenationOptionsT()
    split.numSplits, join.axis = groups, 3
    axis = editor.add_constant(np.array(3, np.int32), f"{name}:in0/0")
    convolutions = []
    for group, (part, result) in enumerate(zip(parts, results, strict=True)):
        own = [_rows_of(editor, i, group, groups, f"{name}:out{group}") for i in constants if i >= 0]
        convolutions.append(editor.make("CONV_2D", (part, *own), result, copy.copy(op.builtinOptions)))
    return [
        editor.make("SPLIT", (axis, source), parts, split),
        *convolutions,
        editor.make("CONCATENATION", results, output, join),
    ]


def _channels_of(editor: Editor, tensor: int, groups: int, name: str) -> int:
    *rest, channels = editor.shape(tensor)
    return editor.add_view(tensor, (*rest, channels // groups), name)


def _rows_of(editor: Editor, constant: int, group: int, groups: int, name: str) -> int:
    """One group's share of a weight or bias, and of its scales."""
    values = editor.constant(constant)
    if values is None:
        raise ValueError(f"{editor.tensor_name(constant)} is not constant")
    scales = editor.scales(constant)
    if len(scales) > 1:
        scales = tuple(np.split(np.array(scales), groups)[group].tolist())
    return editor.add_constant(np.split(values, groups)[group], f"{name}/{values.ndim}", scales)


def split_fused_activations(editor: Editor) -> int:
    """TRANSPOSE_CONV without a fused activation, which the compiler's version doesn't have.

    Where the output's integers end at the activation's bounds, saturation does its work; elsewhere an operator of its
    own does, on the same scale.
    """
    found = 0
    for op in list(editor.graph.operators):
        activation = editor.options(op).get("fusedActivationFunction", 0)
        if editor.kind(op) == "TRANSPOSE_CONV" and activation:
            op.builtinOptions = copy.copy(op.builtinOptions)
            op.builtinOptions.fusedActivationFunction = 0
            if not _saturates(editor, editor.outputs(op)[0], activation):
                _add_activation(editor, op, activation)
            found += 1
    return found


def _bounds(activation: int) -> tuple[str, float, float]:
    """The operator of a fused activation, and the real numbers that it clips to."""
    from ai_edge_litert import schema_py_generated as schema

    kind = schema.ActivationFunctionType
    return {
        kind.RELU: ("RELU", 0.0, np.inf),
        kind.RELU6: ("RELU6", 0.0, 6.0),
        kind.RELU_N1_TO_1: ("RELU_N1_TO_1", -1.0, 1.0),
    }.get(activation, ("", -np.inf, np.inf))


def _saturates(editor: Editor, tensor: int, activation: int) -> bool:
    """Whether int8 at the tensor's scale holds no number beyond the activation's bounds."""
    if editor.dtype(tensor) != "INT8":
        return False
    (scale,), (zero,) = editor.scales(tensor), editor.zero_points(tensor)
    _, low, high = _bounds(activation)
    # As the kernels quantize the bounds: to the nearest integer.
    return bool(np.rint(low / scale) + zero <= _INT8[0] and np.rint(high / scale) + zero >= _INT8[1])


def _add_activation(editor: Editor, op: schema.OperatorT, activation: int) -> None:
    (output,) = editor.outputs(op)
    inner = editor.add_view(output, editor.shape(output), f"{editor.layer(op)}:linear")
    op.outputs = np.array([inner], np.int32)
    editor.replace(op, [op, editor.make(_bounds(activation)[0], (inner,), output)])
