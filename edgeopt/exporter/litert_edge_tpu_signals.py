"""Convolutions of 1-D networks, which LiteRT writes as CONV_2D on images of one row, as the Edge TPU takes them.

The compiler leaves the transpose of a channel-first input on the CPU, and everything after it: the whole network. It
takes a dilated convolution only where both axes have the same dilation.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema


def even_dilations(editor: Editor) -> int:
    """Give an axis along which a kernel has one element, where dilation means nothing, the other axis's dilation."""
    found = 0
    for op in editor.graph.operators:
        if editor.kind(op) not in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            continue
        _, height, width, _ = editor.shape(editor.inputs(op)[1])
        along, across = editor.options(op)["dilationWFactor"], editor.options(op)["dilationHFactor"]
        if along != across and 1 in (height, width):
            op.builtinOptions = copy.copy(op.builtinOptions)
            dilation = along if height == 1 else across
            op.builtinOptions.dilationWFactor = op.builtinOptions.dilationHFactor = dilation
            found += 1
    return found


def pad_before_moves(editor: Editor) -> int:
    """PAD of a transposed input as the transpose of a padded one, so that the transpose is next to its convolution."""
    found, readers = 0, editor.readers()
    for move in list(editor.graph.operators):
        (row, *_), order = editor.outputs(move) or (-1,), _order(editor, move)
        if order is None or len(readers[row]) != 1 or not _comes_from_an_input(editor, move):
            continue
        (pad,) = readers[row]
        sides = editor.constant(editor.inputs(pad)[1]) if editor.kind(pad) == "PAD" else None
        if sides is not None and row not in editor.borders()[1]:
            _swap(editor, move, pad, sides[np.argsort(order)])
            found += 1
    return found


def _order(editor: Editor, op: schema.OperatorT) -> Array | None:
    return editor.constant(editor.inputs(op)[1]) if editor.kind(op) == "TRANSPOSE" else None


def _swap(editor: Editor, move: schema.OperatorT, pad: schema.OperatorT, sides: Array) -> None:
    source, name = editor.inputs(move)[0], editor.tensor_name(editor.outputs(pad)[0])
    shape = [size + int(before) + int(after) for size, (before, after) in zip(editor.shape(source), sides, strict=True)]
    padded = editor.add_view(source, shape, f"{editor.layer(pad)}:padded")
    paddings = editor.add_constant(sides.astype(np.int32), f"{name}/paddings")
    first = editor.make("PAD", (source, paddings), padded, copy.copy(pad.builtinOptions))
    then = editor.make("TRANSPOSE", (padded, editor.inputs(move)[1]), editor.outputs(pad)[0], move.builtinOptions)
    editor.replace(pad, [first, then])
    editor.replace(move, [])


def convolve_channels_as_rows(editor: Editor) -> int:
    """CONV_2D on one row of a transposed input as CONV_2D on an image whose rows are the channels.

    Its kernel is as high as the image, so that it adds the same products.
    """
    from ai_edge_litert import schema_py_generated as schema

    found, readers = 0, editor.readers()
    for move in list(editor.graph.operators):
        order = _order(editor, move)
        if order is None or order.tolist() != [0, 2, 3, 1] or not _comes_from_an_input(editor, move):
            continue
        (row,) = editor.outputs(move)
        if editor.shape(row)[1] != 1 or row in editor.borders()[1]:
            continue
        if all(_slides_along_the_row(editor, op, row) for op in readers[row]):
            image = editor.add_view(row, _image_shape(editor, row), f"{editor.layer(move)}:rows")
            shape = editor.add_constant(np.array(editor.shape(image), np.int32), f"{editor.layer(move)}:rows/1")
            reshape = editor.make("RESHAPE", (editor.inputs(move)[0], shape), image, schema.ReshapeOptionsT())
            for op in readers[row]:
                editor.replace(op, _on_rows(editor, op, image))
            editor.replace(move, [reshape])
            found += 1
    return found


def _comes_from_an_input(editor: Editor, op: schema.OperatorT) -> bool:
    """Whether only reshapes and paddings are between the graph's input and the operator."""
    tensor, producers = editor.inputs(op)[0], editor.producers()
    while tensor in producers and editor.kind(producers[tensor]) in ("RESHAPE", "PAD"):
        tensor = editor.inputs(producers[tensor])[0]
    return tensor in editor.borders()[0]


def _image_shape(editor: Editor, row: int) -> tuple[int, ...]:
    batch, _, length, channels = editor.shape(row)
    return batch, channels, length, 1


def _slides_along_the_row(editor: Editor, op: schema.OperatorT, row: int) -> bool:
    if editor.kind(op) != "CONV_2D" or editor.inputs(op)[0] != row or not editor.is_constant(editor.inputs(op)[1]):
        return False
    _, height, _, channels = editor.shape(editor.inputs(op)[1])
    options = editor.options(op)
    # The Edge TPU dilates both axes alike.
    return height == 1 and channels == editor.shape(row)[3] and options["dilationWFactor"] == 1


def _on_rows(editor: Editor, op: schema.OperatorT, image: int) -> list[schema.OperatorT]:
    from ai_edge_litert import schema_py_generated as schema

    _, weight, *rest = editor.inputs(op)
    (output,), name = editor.outputs(op), editor.tensor_name(editor.outputs(op)[0])
    values = editor.constant(weight)
    if values is None:
        raise ValueError(f"{editor.tensor_name(weight)} is not constant")
    kernel = editor.add_constant(values.transpose(0, 3, 2, 1), f"{name}/rows", editor.scales(weight))
    options = copy.copy(op.builtinOptions)
    sides = (0, 0)
    if options.padding == schema.Padding.SAME:
        # Only along the row: SAME would pad the channels too.
        total = max((editor.shape(output)[2] - 1) * options.strideW + values.shape[2] - editor.shape(image)[2], 0)
        sides = (total // 2, total - total // 2)
    options.padding, options.strideH = schema.Padding.VALID, 1
    if sides == (0, 0):
        return [editor.make("CONV_2D", (image, kernel, *rest), output, options)]
    batch, rows, length, depth = editor.shape(image)
    padded = editor.add_view(image, (batch, rows, length + sum(sides), depth), f"{editor.layer(op)}:padded")
    paddings = editor.add_constant(np.array([(0, 0), (0, 0), sides, (0, 0)], np.int32), f"{name}/paddings")
    return [
        editor.make("PAD", (image, paddings), padded, schema.PadOptionsT()),
        editor.make("CONV_2D", (padded, kernel, *rest), output, options),
    ]
