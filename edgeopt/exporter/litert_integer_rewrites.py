"""Float operators that NPUs with integer arithmetic lack, written as others that they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.exporter.litert_edge_tpu_rewrites import write_moves_as_reshapes
from edgeopt.exporter.litert_integer import IntegerNpu, overwrite
from edgeopt.types import Scheme

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Where a 16-bit sigmoid is 0 or 1 to the last bit.
_SIGMOID_REACH = 12.0
#: Natural logarithm of how far roots that count are apart, where the range of a root reaches down to 0.
_POWER_SPAN = 8.0
#: GELU's tanh form: Hendrycks and Gimpel 2016.
_CUBIC, _SLOPE = 0.044715, 2 * math.sqrt(2 / math.pi)
#: Elements of the constant that stands for a broadcast.
_LARGEST_BROADCAST = 1 << 16


@dataclass(slots=True)
class Lowered:
    """What `lower` added: ranges of its activations, and first outputs of its operators that get 16 bits."""

    ranges: dict[str, Range] = field(default_factory=dict)
    wide: set[str] = field(default_factory=set)


def lower(
    model: schema.ModelT,
    ranges: Mapping[str, Range],
    kept: Collection[str],
    wide: Collection[str],
    scheme: Scheme,
    npu: IntegerNpu,
) -> Lowered:
    """Write operators that integer NPUs lack as others, in the main graph, in place.

    Args:
        ranges: of the activations.
        kept: output tensors of operators that stay float.
        wide: first outputs of operators with 16-bit activations.
        npu: what it lacks decides.
    """
    editor = Editor(model)
    if "GATHER_ND" in npu.lacks:
        write_moves_as_reshapes(editor)
    writer = _Writer(editor, ranges)
    for op in list(editor.graph.operators):
        outputs = [editor.tensor_name(i) for i in editor.outputs(op)]
        if not outputs or outputs[0] in kept or outputs[0] not in ranges:
            continue
        is_wide = scheme.activation_bits == 16 or outputs[0] in wide
        for rewrite in _REWRITES.get(editor.kind(op), ()) if editor.kind(op) in npu.lacks else ():
            if rewrite(writer, op, is_wide):
                break
    editor.drop_unused_operators()
    return writer.made


class _Writer:
    """Writes one operator of a float graph as several."""

    def __init__(self, editor: Editor, ranges: Mapping[str, Range]) -> None:
        self._editor, self._ranges, self.made = editor, ranges, Lowered()

    def gelu(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """x * sigmoid(x (s + 0.044715 s x^2)), s = 2 sqrt(2 / pi): its tanh form, off by 5e-4 at most.

        With 16 bits up to the result: in 8, rounding the square alone costs more than GELU's own table would.
        """
        del is_wide
        editor, ((x,), (output,)) = self._editor, (self._editor.inputs(op), self._editor.outputs(op))
        values = self._ranges[editor.tensor_name(x)]
        square = max(values.min**2, values.max**2)
        factor = Range(_SLOPE, _SLOPE * (1 + _CUBIC * square))
        squared = self._new(x, output, Range(0.0, square))
        scaled = self._new(x, output, Range(0.0, factor.max - _SLOPE))
        slope = self._new(x, output, Range(0.0, factor.max))
        argument = self._new(x, output, Range(-_SIGMOID_REACH, _SIGMOID_REACH))
        gate = self._new(x, output, Range(0.0, 1.0))
        made = [
            self._multiply(x, x, squared),
            self._multiply(squared, self._constant(_SLOPE * _CUBIC, scaled), scaled),
            self._add(scaled, self._constant(_SLOPE, slope), slope),
            self._multiply(x, slope, argument),
            editor.make("LOGISTIC", (argument,), gate),
            self._multiply(x, gate, output),
        ]
        return self._put(op, made)

    def squared_difference(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """LiteRT has no SQUARED_DIFFERENCE with 16 bits."""
        from ai_edge_litert import schema_py_generated as schema

        if not is_wide:
            return False

        editor, (output,) = self._editor, self._editor.outputs(op)
        reach = math.sqrt(self._ranges[editor.tensor_name(output)].max)
        difference = self._new(output, output, Range(-reach, reach))
        made = [
            editor.make("SUB", editor.inputs(op), difference, schema.SubOptionsT()),
            self._multiply(difference, difference, output),
        ]
        return self._put(op, made)

    def root(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """exp(log(x) / 2), or its reciprocal, for positive x: tables on the NPU. It has no other square root,
        and TOSA's converter no 16-bit RSQRT."""
        from ai_edge_litert import schema_py_generated as schema

        exponent = 0.5 if self._editor.kind(op) == "SQRT" else -0.5
        if exponent < 0 and not is_wide:
            return False

        editor, ((x,), (output,)) = self._editor, (self._editor.inputs(op), self._editor.outputs(op))
        results = self._ranges[editor.tensor_name(output)]
        largest = math.log(max(results.max, 1e-30))
        smallest = largest - _POWER_SPAN
        if results.min > 0:
            smallest = min(math.log(results.min), largest)
        scaled = Range(min(smallest, 0.0), max(largest, 0.0))
        logarithms = Range(*sorted((scaled.min / exponent, scaled.max / exponent)))
        logarithm, product = self._new(x, output, logarithms), self._new(x, output, scaled)
        made = [
            editor.make("LOG", (x,), logarithm),
            self._multiply(logarithm, self._constant(exponent, product), product),
            editor.make("EXP", (product,), output, schema.ExpOptionsT()),
        ]
        return self._put(op, made)

    def elu(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """SELECT(x > 0, x, f(exp(x))), f(1) = 0, as relu(x) + f(exp(min(x, 0))): no comparison, which only the
        Ethos-U85 has, and exponentials that end at 1."""
        from ai_edge_litert import schema_py_generated as schema

        del is_wide
        editor, producers = self._editor, self._editor.producers()
        condition, x, other = editor.inputs(op)
        exponential = self._expm1(other)
        compares = producers.get(condition)
        if exponential is None or compares is None or editor.kind(compares) not in ("GREATER", "GREATER_EQUAL"):
            return False
        limit = editor.constant(editor.inputs(compares)[1])
        if editor.inputs(compares)[0] != x or editor.inputs(exponential)[0] != x or limit is None or np.any(limit):
            return False
        values = self._ranges[editor.tensor_name(x)]
        (output,) = editor.outputs(op)
        below = self._new(x, output, Range(min(values.min, 0.0), 0.0))
        above = self._new(x, output, Range(0.0, max(values.max, 0.0)))
        minimum = editor.make("MINIMUM", (x, self._constant(0.0, below)), below, schema.MaximumMinimumOptionsT())
        editor.replace(exponential, [minimum, exponential])
        exponential.inputs = np.array([below], np.int32)
        self.made.wide |= {editor.tensor_name(i) for i in (below, *editor.outputs(exponential))}
        self._bound(exponential)
        return self._put(op, [editor.make("RELU", (x,), above), self._add(above, other, output)])

    def absolute(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """relu(x) + relu(-x): TOSA has ABS for 32 bits only."""
        editor, ((x,), (output,)) = self._editor, (self._editor.inputs(op), self._editor.outputs(op))
        values = self._ranges[editor.tensor_name(x)]
        negative = self._new(x, output, Range(min(-values.max, 0.0), max(-values.min, 0.0)))
        above = self._new(x, output, Range(0.0, max(values.max, 0.0)))
        below = self._new(x, output, Range(0.0, max(-values.min, 0.0)))
        made = [
            self._multiply(x, self._constant(-1.0, negative), negative),
            editor.make("RELU", (x,), above),
            editor.make("RELU", (negative,), below),
            self._add(above, below, output),
        ]
        return self._put(op, made, is_wide)

    def leaky(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """relu(x) - slope relu(-x)."""
        from ai_edge_litert import schema_py_generated as schema

        editor, ((x,), (output,)) = self._editor, (self._editor.inputs(op), self._editor.outputs(op))
        values, slope = self._ranges[editor.tensor_name(x)], float(op.builtinOptions.alpha)
        if slope <= 0:
            return False
        scaled = self._new(x, output, Range(*sorted((-slope * values.max, -slope * values.min))))
        above = self._new(x, output, Range(0.0, max(values.max, 0.0)))
        below = self._new(x, output, Range(0.0, max(-slope * values.min, 0.0)))
        made = [
            self._multiply(x, self._constant(-slope, scaled), scaled),
            editor.make("RELU", (x,), above),
            editor.make("RELU", (scaled,), below),
            editor.make("SUB", (above, below), output, schema.SubOptionsT()),
        ]
        return self._put(op, made, is_wide)

    def decided(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """A SELECT whose comparison the range of its operand decides: the threshold beyond which softplus is the
        identity, for one. An integer can't go beyond that range."""
        del is_wide
        editor = self._editor
        condition, _, other = editor.inputs(op)
        compares = editor.producers().get(condition)
        if compares is None or editor.kind(compares) not in ("GREATER", "GREATER_EQUAL"):
            return False
        x, limit = editor.inputs(compares)
        values, threshold = self._ranges.get(editor.tensor_name(x)), editor.constant(limit)
        if values is None or threshold is None or values.max >= threshold.min():
            return False
        if editor.shape(other) != editor.shape(editor.outputs(op)[0]):
            return False
        op.inputs = np.array([other], np.int32)
        return editor.bypass(op)

    def mean(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """Means over the last axes as means over one axis of a single batch, which is how the NPU reduces depth."""
        from ai_edge_litert import schema_py_generated as schema

        editor, ((x, axes), (output,)) = self._editor, (self._editor.inputs(op), self._editor.outputs(op))
        chosen, shape = editor.constant(axes), editor.shape(x)
        if chosen is None or not editor.is_static(x):
            return False
        reduced = sorted({int(axis) % len(shape) for axis in chosen.reshape(-1)})
        kept = [axis for axis in range(len(shape)) if axis not in reduced and shape[axis] > 1]
        moving = [axis for axis in reduced if shape[axis] > 1]
        if not moving or (kept and kept[-1] > moving[0]) or (len(shape) < 4 and shape[0] == 1):
            return False
        rows, columns = (int(np.prod([shape[axis] for axis in part])) for part in (kept, moving))
        name, values = editor.tensor_name(output), self._ranges[editor.tensor_name(output)]
        flat = self._view(x, (1, rows, columns, 1), output, self._ranges[editor.tensor_name(x)])
        means = self._view(x, (1, rows, 1, 1), output, values)
        options = schema.ReducerOptionsT()
        options.keepDims = True
        along = editor.add_constant(np.array([2], np.int32), f"{name}/axes")
        before = self._reshape(x, flat, (1, rows, columns, 1))
        after = self._reshape(means, output, editor.shape(output))
        mean = editor.make("MEAN", (flat, along), means, options)
        return self._put(op, [before, mean, after], is_wide)

    def broadcast(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """BROADCAST_TO as a product with ones."""
        editor, (output,) = self._editor, self._editor.outputs(op)
        shape = editor.shape(output)
        if not editor.is_static(output) or np.prod(shape) > _LARGEST_BROADCAST:
            return False
        ones = editor.add_constant(np.ones(shape, np.float32), f"{editor.tensor_name(output)}/ones")
        return self._put(op, [self._multiply(editor.inputs(op)[0], ones, output)], is_wide)

    def embedding(self, op: schema.OperatorT, is_wide: bool) -> bool:
        """GATHER from a table in 8 bits whose columns all reach from -1 to 1, and their true size as factors.

        LiteRT's EMBEDDING_LOOKUP gives float values, which neither the NPU nor its emulator takes. A single scale for a
        whole table would spend most of its bits on the few columns with large values.
        """
        from ai_edge_litert import schema_py_generated as schema

        editor, ((indices, table), (output,)) = self._editor, (self._editor.inputs(op), self._editor.outputs(op))
        values = editor.constant(table)
        if values is None or len(editor.readers()[table]) > 1:
            return False
        columns = np.maximum(np.abs(values).max(axis=0), np.float32(np.finfo(np.float32).tiny))
        name = editor.tensor_name(output)
        rows = self._new(output, output, Range(-1.0, 1.0))
        overwrite(editor.model, table, values / columns)
        factors = editor.add_constant(columns.astype(np.float32), f"{name}/1")
        made = [
            editor.make("GATHER", (table, indices), rows, schema.GatherOptionsT()),
            self._multiply(rows, factors, output),
        ]
        self.made.ranges[name] = Range(min(float(values.min()), 0.0), max(float(values.max()), 0.0))
        editor.replace(op, made)
        if is_wide:
            self.made.wide.add(name)
        return True

    def _put(self, op: schema.OperatorT, made: list[schema.OperatorT], is_wide: bool = True) -> bool:
        """Replace an operator, by others with 16 bits."""
        if is_wide:
            self.made.wide |= {self._editor.tensor_name(i) for each in made for i in self._editor.outputs(each)}
        self._editor.replace(op, made)
        return True

    def _expm1(self, index: int) -> schema.OperatorT | None:
        """The EXP of which a tensor is (exp(x) - 1) times constants."""
        editor, producers = self._editor, self._editor.producers()
        op = producers.get(index)
        while op is not None and editor.kind(op) == "MUL" and editor.is_constant(editor.inputs(op)[1]):
            op = producers.get(editor.inputs(op)[0])
        if op is None or editor.kind(op) not in ("SUB", "ADD"):
            return None
        one = editor.constant(editor.inputs(op)[1])
        source = producers.get(editor.inputs(op)[0])
        if one is None or not np.all(one == (1 if editor.kind(op) == "SUB" else -1)) or source is None:
            return None
        alone = len(editor.readers()[editor.outputs(source)[0]]) == 1
        return source if editor.kind(source) == "EXP" and alone else None

    def _bound(self, exponential: schema.OperatorT) -> None:
        """Give an EXP that ends at 1, and what is computed of it up to the branch, ranges to match."""
        editor = self._editor
        index = editor.outputs(exponential)[0]
        self.made.ranges[editor.tensor_name(index)] = Range(0.0, 1.0)
        (shift,) = editor.readers()[index]
        index, values = editor.outputs(shift)[0], Range(-1.0, 0.0)
        self.made.ranges[editor.tensor_name(index)] = values
        while (scaling := editor.readers()[index][0]) is not None and editor.kind(scaling) == "MUL":
            factor = editor.constant(editor.inputs(scaling)[1])
            if factor is None:
                return
            ends = (values.min * float(factor.min()), values.min * float(factor.max()), 0.0)
            index, values = editor.outputs(scaling)[0], Range(min(ends), max(ends))
            self.made.ranges[editor.tensor_name(index)] = values

    def _view(self, like: int, shape: tuple[int, ...], output: int, values: Range) -> int:
        index = self._new(like, output, values)
        self._editor.graph.tensors[index].shape = np.array(shape, np.int32)
        return index

    def _reshape(self, source: int, result: int, shape: tuple[int, ...]) -> schema.OperatorT:
        from ai_edge_litert import schema_py_generated as schema

        target = self._editor.add_constant(np.array(shape, np.int32), f"{self._editor.tensor_name(result)}/shape")
        return self._editor.make("RESHAPE", (source, target), result, schema.ReshapeOptionsT())

    def _new(self, like: int, output: int, values: Range) -> int:
        """An activation shaped as another one, of the layer that makes `output`."""
        index = self._editor.add_float(like, self._editor.tensor_name(output).partition(":")[0])
        self.made.ranges[self._editor.tensor_name(index)] = values
        return index

    def _constant(self, value: float, reader: int) -> int:
        return self._editor.add_constant(np.array(value, np.float32), f"{self._editor.tensor_name(reader)}/1")

    def _multiply(self, left: int, right: int, output: int) -> schema.OperatorT:
        from ai_edge_litert import schema_py_generated as schema

        return self._editor.make("MUL", (left, right), output, schema.MulOptionsT())

    def _add(self, left: int, right: int, output: int) -> schema.OperatorT:
        from ai_edge_litert import schema_py_generated as schema

        return self._editor.make("ADD", (left, right), output, schema.AddOptionsT())


#: Operator -> what may be written in its place; the first that fits is.
_REWRITES: Mapping[str, tuple[Callable[[_Writer, schema.OperatorT, bool], bool], ...]] = {
    "GELU": (_Writer.gelu,),
    "EMBEDDING_LOOKUP": (_Writer.embedding,),
    "SQUARED_DIFFERENCE": (_Writer.squared_difference,),
    "RSQRT": (_Writer.root,),
    "SQRT": (_Writer.root,),
    "SELECT": (_Writer.elu, _Writer.decided),
    "SELECT_V2": (_Writer.elu, _Writer.decided),
    "MEAN": (_Writer.mean,),
    "BROADCAST_TO": (_Writer.broadcast,),
    "ABS": (_Writer.absolute,),
    "LEAKY_RELU": (_Writer.leaky,),
}
