"""Equivalent .tflite graphs whose operators have fast int8 kernels."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema


def split_hardswish(model: schema.ModelT, kept: Collection[str]) -> dict[str, Range]:
    """Write HARD_SWISH(x) in the main graph as x * (relu6(x + 3) * 1/6), in place.

    XNNPACK has no int8 HARD_SWISH, and LiteRT's own takes many times as long as these three. In int8 the factor 1/6
    changes the scale only: nothing is rounded there.

    Args:
        kept: output tensors of operators that stay float; in float, XNNPACK has a HARD_SWISH.

    Returns:
        The ranges of the activations that are new.
    """
    from ai_edge_litert import schema_py_generated as schema

    graph = model.subgraphs[0]
    editor = _Editor(model, graph)
    operators = []
    for operator in graph.operators:
        if _is_hardswish(model, operator) and graph.tensors[operator.outputs[0]].name.decode() not in kept:
            (source,), (output,) = operator.inputs, operator.outputs
            gate, unit = editor.activation(output, Range(0, 6)), editor.activation(output, Range(0, 1))
            relu6 = schema.ActivationFunctionType.RELU6
            operators += [
                editor.add(source, editor.constant(3, gate), gate, relu6),
                editor.multiply(gate, editor.constant(1 / 6, unit), unit),
                editor.multiply(source, unit, output),
            ]
        else:
            operators.append(operator)
    graph.operators = operators
    return editor.ranges


def _is_hardswish(model: schema.ModelT, operator: schema.OperatorT) -> bool:
    from ai_edge_litert import schema_py_generated as schema

    code = model.operatorCodes[operator.opcodeIndex].builtinCode
    return bool(code == schema.BuiltinOperator.HARD_SWISH)


class _Editor:
    """Adds tensors to a graph, and makes operators for it. Tensors are named as `litert_names.rename` does.

    Attributes:
        ranges: of the activations that were added, by name.
    """

    def __init__(self, model: schema.ModelT, graph: schema.SubGraphT) -> None:
        self._model, self._graph = model, graph
        self._taken = {tensor.name for each in model.subgraphs for tensor in each.tensors}
        self.ranges: dict[str, Range] = {}

    def activation(self, like: int, values: Range) -> int:
        """A tensor that an operator of the same layer computes, of the same shape and type."""
        tensor = copy.copy(self._graph.tensors[like])
        tensor.buffer = 0
        index = self._append(tensor, tensor.name.decode().partition(":")[0])
        self.ranges[tensor.name.decode()] = values
        return index

    def constant(self, value: float, reader: int) -> int:
        """A float32 scalar, for the operator that computes the tensor `reader`."""
        from ai_edge_litert import schema_py_generated as schema

        buffer, tensor = schema.BufferT(), schema.TensorT()
        buffer.data = np.frombuffer(np.float32(value).tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        tensor.buffer, tensor.type = len(self._model.buffers) - 1, schema.TensorType.FLOAT32
        tensor.shape, tensor.hasRank = np.array([], np.int32), True
        return self._append(tensor, f"{self._graph.tensors[reader].name.decode()}/1")

    def add(self, left: int, right: int, output: int, activation: int) -> schema.OperatorT:
        """ADD with a fused activation."""
        from ai_edge_litert import schema_py_generated as schema

        options = schema.AddOptionsT()
        options.fusedActivationFunction = activation
        operator = self._operator(schema.BuiltinOperator.ADD, (left, right), output)
        operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.AddOptions, options
        return operator

    def multiply(self, left: int, right: int, output: int) -> schema.OperatorT:
        """MUL."""
        from ai_edge_litert import schema_py_generated as schema

        operator = self._operator(schema.BuiltinOperator.MUL, (left, right), output)
        operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.MulOptions, schema.MulOptionsT()
        return operator

    def _operator(self, kind: int, inputs: tuple[int, int], output: int) -> schema.OperatorT:
        from ai_edge_litert import schema_py_generated as schema

        codes = self._model.operatorCodes
        if kind not in [code.builtinCode for code in codes]:
            code = schema.OperatorCodeT()
            # Readers of old files look at the deprecated field.
            code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, kind, 1
            codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = [code.builtinCode for code in codes].index(kind)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        return operator

    def _append(self, tensor: schema.TensorT, name: str) -> int:
        unique, number = name, 0
        while unique.encode() in self._taken:
            number += 1
            unique = f"{name}:{number}"
        tensor.name = unique.encode()
        self._taken.add(tensor.name)
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1
