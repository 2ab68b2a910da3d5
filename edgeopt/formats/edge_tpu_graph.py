"""A .tflite file's graph in plain values, for whoever checks or rewrites it for the Edge TPU compiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.formats.litert import readable
from edgeopt.types import Array

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Types whose constants can be looked at.
_VALUES = {
    "FLOAT32": np.float32, "INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16, "INT32": np.int32,
    "INT64": np.int64, "BOOL": np.bool_,
}  # fmt: skip


class FlatGraph:
    """The first subgraph of a file. Tensors go by their index; an operator is the schema's own object."""

    def __init__(self, model: schema.ModelT) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.model = model
        self.graph = model.subgraphs[0]
        self._kinds: dict[int, str] = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        self._types: dict[int, str] = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}

    def kind(self, op: schema.OperatorT) -> str:
        """The schema's operator name; the custom code's of a custom operator."""
        code = self.model.operatorCodes[op.opcodeIndex]
        # The second field exists since there are more than 127 operators; old files have the first one only.
        name = self._kinds.get(max(code.builtinCode, code.deprecatedBuiltinCode), "unknown")
        return str((code.customCode or b"CUSTOM").decode()) if name == "CUSTOM" else name

    def version(self, op: schema.OperatorT) -> int:
        return int(self.model.operatorCodes[op.opcodeIndex].version)

    def name(self, op: schema.OperatorT) -> str:
        """As `OpInfo.name`: after the first output."""
        return readable(self.tensor_name(int(op.outputs[0]))) if len(op.outputs) else self.kind(op)

    def options(self, op: schema.OperatorT) -> Mapping[str, int]:
        """The operator's flags and whole numbers by the schema's names."""
        values = vars(op.builtinOptions) if op.builtinOptions is not None else {}
        return {name: value for name, value in values.items() if isinstance(value, int)}

    def inputs(self, op: schema.OperatorT) -> tuple[int, ...]:
        """-1 stands for an omitted optional input."""
        return () if op.inputs is None else tuple(int(i) for i in op.inputs)

    def outputs(self, op: schema.OperatorT) -> tuple[int, ...]:
        return () if op.outputs is None else tuple(int(i) for i in op.outputs)

    def tensor_name(self, index: int) -> str:
        return str((self.graph.tensors[index].name or b"").decode())

    def dtype(self, index: int) -> str:
        """The schema's name of the type: "INT8"."""
        return self._types.get(self.graph.tensors[index].type, "unknown")

    def shape(self, index: int) -> tuple[int, ...]:
        shape = self.graph.tensors[index].shape
        return () if shape is None else tuple(int(d) for d in shape)

    def size(self, index: int) -> int:
        """Number of elements."""
        return int(np.prod(self.shape(index), dtype=np.int64))

    def is_static(self, index: int) -> bool:
        signature = self.graph.tensors[index].shapeSignature
        dims = self.shape(index) if signature is None else [int(d) for d in signature]
        return all(d >= 0 for d in dims)

    def scales(self, index: int) -> tuple[float, ...]:
        """One per tensor or one per channel; none where the tensor is not quantized."""
        params = self.graph.tensors[index].quantization
        return () if params is None or params.scale is None else tuple(float(s) for s in params.scale)

    def zero_points(self, index: int) -> tuple[int, ...]:
        params = self.graph.tensors[index].quantization
        if params is None or params.zeroPoint is None:
            return (0,) * len(self.scales(index))
        return tuple(int(z) for z in params.zeroPoint)

    def same_values(self, a: int, b: int) -> bool:
        """Whether equal bytes in both tensors mean equal numbers."""
        return (self.dtype(a), self.scales(a), self.zero_points(a)) == (
            self.dtype(b),
            self.scales(b),
            self.zero_points(b),
        )

    def constant(self, index: int) -> Array | None:
        """The values of a constant, shaped; None for an activation, and for a type that can't be looked at."""
        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        dtype = _VALUES.get(self.dtype(index))
        if data is None or not len(data) or dtype is None:
            return None
        values: Array = np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype)
        return values.reshape(self.shape(index))

    def is_constant(self, index: int) -> bool:
        buffer = self.model.buffers[self.graph.tensors[index].buffer]
        return bool(buffer.offset) or (buffer.data is not None and len(buffer.data) > 0)

    def producers(self) -> dict[int, schema.OperatorT]:
        return {index: op for op in self.graph.operators for index in self.outputs(op)}

    def readers(self) -> dict[int, list[schema.OperatorT]]:
        """The operators that read each tensor; the graph's outputs are not counted."""
        found: dict[int, list[schema.OperatorT]] = defaultdict(list)
        for op in self.graph.operators:
            for index in dict.fromkeys(i for i in self.inputs(op) if i >= 0):
                found[index].append(op)
        return found

    def borders(self) -> tuple[set[int], set[int]]:
        """The graph's inputs and its outputs."""
        return {int(i) for i in self.graph.inputs}, {int(i) for i in self.graph.outputs}
