"""GELU from operators that the Edge TPU compiler knows: it refuses a file with the operator itself.

They compute in float on the CPU, where GELU would run anyway, and are as exact as float32 is; in an int8 file the
result is rounded to int8 as GELU's own table is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.litert_edge_tpu_editor import Editor

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Upper tail of the normal distribution: Abramowitz and Stegun 1964, 26.2.17; off by 7.5e-8 at most.
_RATE = 0.2316419
_SERIES = (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530)
#: GELU's tanh form: Hendrycks and Gimpel 2016.
_CUBIC = 0.044715


def spell_out_gelu(editor: Editor) -> int:
    """Replace every GELU, int8 or float."""
    found = [op for op in editor.graph.operators if editor.kind(op) == "GELU"]
    for op in found:
        editor.replace(op, _Formula(editor, op).operators())
    return len(found)


class _Formula:
    """Float arithmetic in place of one operator."""

    def __init__(self, editor: Editor, op: schema.OperatorT) -> None:
        self._editor, self._op = editor, op
        (self._source,), (self._output,) = editor.inputs(op), editor.outputs(op)
        self._made: list[schema.OperatorT] = []

    def operators(self) -> list[schema.OperatorT]:
        from ai_edge_litert import schema_py_generated as schema

        editor = self._editor
        source = self._source
        if editor.dtype(source) != "FLOAT32":
            source = self._apply("DEQUANTIZE", source, options=schema.DequantizeOptionsT())
        form = self._tanh_form if editor.options(self._op).get("approximate") else self._exact_form
        result = form(source)
        if editor.dtype(self._output) != "FLOAT32":
            self._made.append(editor.make("QUANTIZE", (result,), self._output, schema.QuantizeOptionsT()))
        else:
            self._made[-1].outputs = np.array([self._output], np.int32)
        return self._made

    def _exact_form(self, x: int) -> int:
        """relu(x) - |x| Q(|x|), which is x Phi(x), with Q the upper tail of the normal distribution."""
        from ai_edge_litert import schema_py_generated as schema

        size = self._apply("ABS", x, options=schema.AbsOptionsT())
        t = self._divide(1.0, self._add(self._scale(size, _RATE), 1.0))
        series = self._scale(t, _SERIES[0])
        for factor in _SERIES[1:]:
            series = self._multiply(t, self._add(series, factor))
        exponent = self._scale(self._multiply(x, x), -0.5)
        density = self._scale(self._apply("EXP", exponent, options=schema.ExpOptionsT()), 1 / math.sqrt(2 * math.pi))
        tail = self._multiply(size, self._multiply(density, series))
        return self._apply("SUB", self._apply("RELU", x), tail, options=schema.SubOptionsT())

    def _tanh_form(self, x: int) -> int:
        """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
        cubic = self._add(self._scale(self._multiply(x, x), _CUBIC), 1.0)
        inner = self._scale(self._multiply(x, cubic), math.sqrt(2 / math.pi))
        gate = self._add(self._apply("TANH", inner), 1.0)
        return self._multiply(self._scale(x, 0.5), gate)

    def _scale(self, x: int, factor: float) -> int:
        return self._multiply(x, self._constant(factor))

    def _multiply(self, x: int, y: int) -> int:
        from ai_edge_litert import schema_py_generated as schema

        return self._apply("MUL", x, y, options=schema.MulOptionsT())

    def _add(self, x: int, term: float) -> int:
        from ai_edge_litert import schema_py_generated as schema

        return self._apply("ADD", x, self._constant(term), options=schema.AddOptionsT())

    def _divide(self, dividend: float, x: int) -> int:
        from ai_edge_litert import schema_py_generated as schema

        return self._apply("DIV", self._constant(dividend), x, options=schema.DivOptionsT())

    def _apply(self, kind: str, *inputs: int, options: object | None = None) -> int:
        output = self._editor.add_float(self._source, f"{self._editor.layer(self._op)}:gelu")
        self._made.append(self._editor.make(kind, inputs, output, options))
        return output

    def _constant(self, value: float) -> int:
        return self._editor.add_constant(np.array(value, np.float32), f"{self._editor.layer(self._op)}:gelu/1")
