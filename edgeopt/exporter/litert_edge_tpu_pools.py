"""Max-pooling of a float .tflite file without the padding of minus infinity that PyTorch's pooling is lowered to.

PADV2 with that value stays float when the file is quantized, for no int8 scale holds it, and no Edge TPU has PADV2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.exporter.litert_plan import MASK

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Operators whose result is never negative, and those that make no negative number from others.
_POSITIVE = frozenset({"RELU", "RELU6", "LOGISTIC", "SOFTMAX", "ABS", "EXP", "SQUARE"})
_KEEPS_SIGN = frozenset({"MAX_POOL_2D", "AVERAGE_POOL_2D", "CONCATENATION", "RESHAPE", "TRANSPOSE", "PAD", "MEAN"})


def absorb_pool_paddings(editor: Editor) -> int:
    """Write padded max-poolings without PADV2, in place; how many.

    In order of preference: as TensorFlow's SAME padding, which leaves out what isn't there, where the numbers agree;
    with zeros, where the input is never negative; as pooling at every position, of which the strided positions are
    then picked by a pooling of 1x1. All are exact.
    """
    found = 0
    for op in list(editor.graph.operators):
        pool = _padded_pool(editor, op)
        if pool is None:
            continue
        if pool.is_same:
            _pad_as_same(op, pool.source)
        elif pool.has_own_padding and _never_negative(editor, pool.source):
            _pad_with_zero(editor, pool)
        elif pool.is_centred:
            _pool_everywhere(editor, op, pool.source)
        else:
            continue
        found += 1
    editor.drop_unused_operators()
    return found


@dataclass(frozen=True, slots=True)
class _Axis:
    size: int
    before: int
    after: int
    kernel: int
    stride: int

    @property
    def is_same(self) -> bool:
        """Whether SAME pads as much, on the same sides."""
        total = max((-(-self.size // self.stride) - 1) * self.stride + self.kernel - self.size, 0)
        return (self.before, self.after) == (total // 2, total - total // 2)

    @property
    def is_centred(self) -> bool:
        """Whether there is one window around every position."""
        return self.kernel == 2 * self.before + 1 == 2 * self.after + 1


@dataclass(frozen=True, slots=True)
class _Pool:
    """A max-pooling whose input is padded with minus infinity; `source` is the unpadded tensor."""

    padding: schema.OperatorT
    source: int
    axes: tuple[_Axis, _Axis]
    has_own_padding: bool

    @property
    def is_same(self) -> bool:
        return all(axis.is_same for axis in self.axes)

    @property
    def is_centred(self) -> bool:
        return all(axis.is_centred for axis in self.axes)


def _padded_pool(editor: Editor, op: schema.OperatorT) -> _Pool | None:
    from ai_edge_litert import schema_py_generated as schema

    options = editor.options(op)
    if editor.kind(op) != "MAX_POOL_2D" or options["padding"] != schema.Padding.VALID:
        return None
    padded = editor.inputs(op)[0]
    padding = editor.producers().get(padded)
    if padding is None or editor.kind(padding) != "PADV2":
        return None
    source, sides, value = (editor.inputs(padding)[0], *(editor.constant(i) for i in editor.inputs(padding)[1:]))
    if sides is None or value is None or value.reshape(-1)[0] > -MASK or sides[0].any() or sides[3].any():
        return None
    shape = editor.shape(source)
    axes = (
        _Axis(shape[1], *_ints(sides[1]), options["filterHeight"], options["strideH"]),
        _Axis(shape[2], *_ints(sides[2]), options["filterWidth"], options["strideW"]),
    )
    readers = editor.readers()[padded]
    only_pools = all(editor.kind(reader) == "MAX_POOL_2D" for reader in readers)
    return _Pool(padding, source, axes, only_pools and padded not in editor.borders()[1])


def _ints(values: Sequence[int]) -> tuple[int, int]:
    before, after = values
    return int(before), int(after)


def _never_negative(editor: Editor, tensor: int) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    op = editor.producers().get(tensor)
    if op is None:
        return False
    activation = schema.ActivationFunctionType
    if editor.options(op).get("fusedActivationFunction") in (activation.RELU, activation.RELU6):
        return True
    kind = editor.kind(op)
    sources = editor.inputs(op) if kind == "CONCATENATION" else editor.inputs(op)[:1]
    return kind in _POSITIVE or (kind in _KEEPS_SIGN and all(_never_negative(editor, i) for i in sources))


def _pad_as_same(op: schema.OperatorT, source: int) -> None:
    from ai_edge_litert import schema_py_generated as schema

    op.inputs = np.array([source], np.int32)
    op.builtinOptions = copy.copy(op.builtinOptions)
    op.builtinOptions.padding = schema.Padding.SAME


def _pad_with_zero(editor: Editor, pool: _Pool) -> None:
    """PAD in place of PADV2: in a window with numbers of 0 and more, another 0 changes no maximum."""
    from ai_edge_litert import schema_py_generated as schema

    inputs, (output,) = editor.inputs(pool.padding), editor.outputs(pool.padding)
    editor.turn_into(pool.padding, editor.make("PAD", inputs[:2], output, schema.PadOptionsT()))


def _pool_everywhere(editor: Editor, op: schema.OperatorT, source: int) -> None:
    from ai_edge_litert import schema_py_generated as schema

    every = copy.copy(op.builtinOptions)
    every.padding, every.strideH, every.strideW = schema.Padding.SAME, 1, 1
    picked = copy.copy(op.builtinOptions)
    picked.filterHeight = picked.filterWidth = 1
    picked.fusedActivationFunction = schema.ActivationFunctionType.NONE
    (output,) = editor.outputs(op)
    inner = editor.add_view(source, editor.shape(source), f"{editor.layer(op)}:pooled")
    editor.replace(
        op,
        [editor.make("MAX_POOL_2D", (source,), inner, every), editor.make("MAX_POOL_2D", (inner,), output, picked)],
    )
