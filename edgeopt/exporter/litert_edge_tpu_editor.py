"""Editing a .tflite file's graph in place: new tensors and operators, operators that others replace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.formats.edge_tpu_graph import FlatGraph
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema


class Editor(FlatGraph):
    """A graph that can be changed. Tensors keep their index until `sweep`."""

    def __init__(self, model: schema.ModelT) -> None:
        super().__init__(model)
        self._taken = {(tensor.name or b"").decode() for graph in model.subgraphs for tensor in graph.tensors}
        for buffer in model.buffers:
            if buffer.data is not None:  # Anything but an array is written byte by byte, which takes seconds.
                buffer.data = np.frombuffer(bytes(buffer.data), np.uint8)

    def layer(self, op: schema.OperatorT) -> str:
        """What the names of an operator's tensors start with."""
        return self.tensor_name(self.outputs(op)[0]).partition(":")[0]

    def add_constant(self, values: Array, name: str, scales: Sequence[float] = (), zero_point: int = 0) -> int:
        """A constant of a type that its values have; its scales are for its first axis where there are several."""
        from ai_edge_litert import schema_py_generated as schema

        types = {"float32": "FLOAT32", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64"}
        buffer, tensor = schema.BufferT(), schema.TensorT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        tensor.buffer = len(self.model.buffers) - 1
        tensor.type = getattr(schema.TensorType, types[str(values.dtype)])
        tensor.shape = np.array(values.shape, np.int32)
        if scales:
            params = schema.QuantizationParametersT()
            params.scale = np.array(scales, np.float32)
            params.zeroPoint = np.full(len(scales), zero_point, np.int64)
            tensor.quantization = params
        return self._append(tensor, name)

    def add_view(self, like: int, shape: Sequence[int], name: str) -> int:
        """A tensor of the same type and scales, in another shape; of a constant, with the same buffer."""
        tensor = copy.copy(self.graph.tensors[like])
        tensor.shape, tensor.shapeSignature = np.array(shape, np.int32), None
        return self._append(tensor, name)

    def add_float(self, like: int, name: str) -> int:
        """A float32 activation of the same shape."""
        from ai_edge_litert import schema_py_generated as schema

        tensor = schema.TensorT()
        tensor.type, tensor.shape = schema.TensorType.FLOAT32, np.array(self.shape(like), np.int32)
        return self._append(tensor, name)

    def make(
        self, kind: str, inputs: Sequence[int], output: int | Sequence[int], options: object | None = None
    ) -> schema.OperatorT:
        """An operator that is in no graph yet.

        Args:
            options: of the type that the schema has for it; None for an operator without attributes.
        """
        from ai_edge_litert import schema_py_generated as schema

        operator = schema.OperatorT()
        operator.opcodeIndex = self._code(getattr(schema.BuiltinOperator, kind))
        operator.inputs = np.array(inputs, np.int32)
        operator.outputs = np.array([output] if isinstance(output, int) else output, np.int32)
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        return operator

    def turn_into(self, op: schema.OperatorT, other: schema.OperatorT) -> None:
        """Make an operator of the graph the same as another one that is not in it."""
        vars(op).update(vars(other))

    def replace(self, op: schema.OperatorT, others: Sequence[schema.OperatorT]) -> None:
        """Put operators, in the order in which they run, in the place of one."""
        position = self._position(op)
        self.graph.operators[position : position + 1] = others

    def bypass(self, op: schema.OperatorT) -> bool:
        """Take out an operator whose output is its first input; False where both are borders of the graph."""
        source, output = self.inputs(op)[0], self.outputs(op)[0]
        inputs, outputs = self.borders()
        if output not in outputs:
            self._read_instead(output, source)
        elif source not in inputs and source not in outputs and source in self.producers():
            producer = self.producers()[source]
            producer.outputs = np.array([output if i == source else i for i in self.outputs(producer)], np.int32)
            self._read_instead(source, output)
        else:
            return False
        del self.graph.operators[self._position(op)]
        return True

    def drop_unused_operators(self) -> int:
        """Take out operators that nothing reads; how many."""
        before = len(self.graph.operators)
        needed = self.borders()[1]
        for op in reversed(list(self.graph.operators)):
            if needed & set(self.outputs(op)):
                needed |= set(self.inputs(op))
            else:
                del self.graph.operators[self._position(op)]
        return before - len(self.graph.operators)

    def sweep(self, metadata: frozenset[bytes] | None = None) -> None:
        """Leave out tensors, buffers and metadata that nothing needs; the rest keeps its order.

        Args:
            metadata: names of the entries that stay; None for all.
        """
        from ai_edge_litert import schema_py_generated as schema

        graph, model = self.graph, self.model
        used = {i for op in graph.operators for i in (*self.inputs(op), *self.outputs(op)) if i >= 0}
        used |= self.borders()[0] | self.borders()[1]
        order = sorted(used)
        new = {old: number for number, old in enumerate(order)} | {-1: -1}
        graph.tensors = [graph.tensors[i] for i in order]
        for op in graph.operators:
            op.inputs = np.array([new[i] for i in self.inputs(op)], np.int32)
            op.outputs = np.array([new[i] for i in self.outputs(op)], np.int32)
        graph.inputs = np.array([new[int(i)] for i in graph.inputs], np.int32)
        graph.outputs = np.array([new[int(i)] for i in graph.outputs], np.int32)
        for definition in model.signatureDefs or []:
            for entry in (*(definition.inputs or []), *(definition.outputs or [])):
                entry.tensorIndex = new[entry.tensorIndex]
        model.metadata = [e for e in model.metadata or [] if metadata is None or e.name in metadata]
        buffers = [schema.BufferT()]  # The first one is empty by definition: every activation has it.
        places: dict[int, int] = {}
        for owner in (*graph.tensors, *model.metadata):
            data = model.buffers[owner.buffer].data
            if data is None or not len(data):
                owner.buffer = 0
                continue
            if owner.buffer not in places:
                places[owner.buffer] = len(buffers)
                buffers.append(model.buffers[owner.buffer])
            owner.buffer = places[owner.buffer]
        model.buffers = buffers
        model.metadataBuffer = None

    def _code(self, number: int) -> int:
        from ai_edge_litert import schema_py_generated as schema

        codes = self.model.operatorCodes
        for position, code in enumerate(codes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                return position
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
        codes.append(code)
        return len(codes) - 1

    def _position(self, op: schema.OperatorT) -> int:
        return next(i for i, other in enumerate(self.graph.operators) if other is op)

    def _read_instead(self, old: int, new: int) -> None:
        for op in self.graph.operators:
            op.inputs = np.array([new if i == old else i for i in self.inputs(op)], np.int32)

    def _append(self, tensor: schema.TensorT, name: str) -> int:
        unique, number = name, 0
        while unique in self._taken or not unique:
            number += 1
            unique = f"{name}:{number}"
        self._taken.add(unique)
        tensor.name = unique.encode()
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1
