"""Means that read what comes before a transpose, and whose result keeps its rank: no transpose, fewer reshapes.

1-D networks end in one: LiteRT convolves channel-last, PyTorch averages channel-first. The Edge TPU compiler leaves a
transpose that moves channels on the CPU, with everything after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema


def average_before_moves(editor: Editor) -> int:
    """MEAN of a transposed tensor as MEAN of the tensor, over the axes where its numbers lie there."""
    found = 0
    for op in list(editor.graph.operators):
        moved = _moved_axes(editor, op)
        if moved is not None:
            _write_mean(editor, op, *moved)
            found += 1
    return found


def keep_mean_rank(editor: Editor) -> int:
    """MEAN with all dimensions where the only thing that follows is a RESHAPE that brings them back."""
    found, readers = 0, editor.readers()
    for op in list(editor.graph.operators):
        axes, (output,) = _axes(editor, op), editor.outputs(op)[:1] or (-1,)
        if axes is None or editor.options(op).get("keepDims") or output in editor.borders()[1]:
            continue
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(editor.shape(editor.inputs(op)[0])))
        if len(readers[output]) == 1 and _reshapes_to(editor, readers[output][0], kept):
            _write_mean(editor, op, editor.inputs(op)[0], axes)
            found += 1
    return found


def _axes(editor: Editor, op: schema.OperatorT) -> tuple[int, ...] | None:
    """Over which a MEAN goes, none of them negative; None for other operators."""
    if editor.kind(op) != "MEAN":
        return None
    source, axes = editor.inputs(op)
    values = editor.constant(axes)
    rank = len(editor.shape(source))
    return None if values is None else tuple(int(axis) % rank for axis in values.reshape(-1))


def _reshapes_to(editor: Editor, op: schema.OperatorT, shape: tuple[int, ...]) -> bool:
    return editor.kind(op) == "RESHAPE" and editor.shape(editor.outputs(op)[0]) == shape


def _moved_axes(editor: Editor, op: schema.OperatorT) -> tuple[int, tuple[int, ...]] | None:
    """The tensor in front of the transposes and reshapes that a MEAN reads, and the MEAN's axes in it.

    None where there is no transpose, a reshape does more than to add and drop dimensions of 1, or the result would have
    its elements in another order.
    """
    axes = _axes(editor, op)
    if axes is None:
        return None
    tensor = editor.inputs(op)[0]
    places = [axis for axis, size in enumerate(editor.shape(tensor)) if size > 1]
    averaged = [axis in axes for axis in places]
    transposed = False
    while (step := _step_back(editor, tensor, places)) is not None:
        transposed |= step[1] != sorted(step[1])
        tensor, places = step
    kept = [place for place, is_averaged in zip(places, averaged, strict=True) if not is_averaged]
    if not transposed or kept != sorted(kept):
        return None
    return tensor, tuple(sorted(place for place, is_averaged in zip(places, averaged, strict=True) if is_averaged))


def _step_back(editor: Editor, tensor: int, places: list[int]) -> tuple[int, list[int]] | None:
    """What a transpose or reshape reads to make the tensor, and where these axes of it are there."""
    op = editor.producers().get(tensor)
    if op is None or editor.kind(op) not in ("TRANSPOSE", "RESHAPE"):
        return None
    source = editor.inputs(op)[0]
    if editor.kind(op) == "TRANSPOSE":
        order: Array | None = editor.constant(editor.inputs(op)[1])
        return None if order is None else (source, [int(order[place]) for place in places])
    before = [axis for axis, size in enumerate(editor.shape(source)) if size > 1]
    after = [axis for axis, size in enumerate(editor.shape(tensor)) if size > 1]
    if [editor.shape(source)[axis] for axis in before] != [editor.shape(tensor)[axis] for axis in after]:
        return None
    return source, [before[after.index(place)] for place in places]


def _write_mean(editor: Editor, op: schema.OperatorT, source: int, axes: tuple[int, ...]) -> None:
    from ai_edge_litert import schema_py_generated as schema

    (output,) = editor.outputs(op)
    name = editor.tensor_name(output)
    kept = [1 if axis in axes else size for axis, size in enumerate(editor.shape(source))]
    inner = editor.add_view(output, kept, f"{editor.layer(op)}:mean")
    options = schema.ReducerOptionsT()
    options.keepDims = True
    where = editor.add_constant(np.array(axes, np.int32), f"{name}/axes")
    shape = editor.add_constant(np.array(editor.shape(output), np.int32), f"{name}/shape")
    editor.replace(
        op,
        [
            editor.make("MEAN", (source, where), inner, options),
            editor.make("RESHAPE", (inner, shape), output, schema.ReshapeOptionsT()),
        ],
    )
