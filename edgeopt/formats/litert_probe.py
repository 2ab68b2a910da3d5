"""Inner tensors of a .tflite file as extra outputs.

LiteRT keeps its operators, XNNPACK's delegate included, whatever tensors are outputs; only memory is shared less.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgeopt.errors import UsageError
from edgeopt.formats.litert import ROOT, layer_of, readable
from edgeopt.formats.probe import Probed, ProbePoint, probe_name
from edgeopt.formats.probe_points import Found, Operator, Role, find_points
from edgeopt.types import DType, QuantParams, Signature, SignatureTensor

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_KERNELS = frozenset(
    {
        "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "CONV_3D_TRANSPOSE", "FULLY_CONNECTED",
        "BATCH_MATMUL", "EMBEDDING_LOOKUP", "SVDF", "UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN",
        "BIDIRECTIONAL_SEQUENCE_LSTM",
    }
)  # fmt: skip
_ACTIVATIONS = frozenset({"RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "MINIMUM", "MAXIMUM"})
_PASSIVE = frozenset(
    {
        "QUANTIZE", "DEQUANTIZE", "CAST", "RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "STRIDED_SLICE", "SLICE",
        "SPLIT", "SPLIT_V", "GATHER", "GATHER_ND", "PAD", "PADV2", "MIRROR_PAD", "BROADCAST_TO", "PACK", "UNPACK",
        "TILE", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "REVERSE_V2",
    }
)  # fmt: skip
_DTYPES: dict[str, DType] = {
    "FLOAT32": "float32",
    "FLOAT16": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT16": "int16",
}
#: What reading a damaged FlatBuffer can raise.
_DAMAGE = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


def add_probes(source: Path, signature: Signature, destination: Path) -> Probed:
    """See `edgeopt.formats.probe.add_probes`."""
    from ai_edge_litert.tools import flatbuffer_utils

    try:
        model = flatbuffer_utils.read_model(str(source))
        definition = model.signatureDefs[0] if model.signatureDefs else None
        graph = _Graph(model, model.subgraphs[definition.subgraphIndex if definition is not None else 0])
        found = graph.points()
        outputs = tuple(graph.output(point, i, named=definition is not None) for i, point in enumerate(found))
        _give_out(graph.graph, definition, [int(point.tensor) for point in found], outputs)
        content = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=str(source), fix="export it again") from error
    destination.write_bytes(content)
    points = tuple(
        ProbePoint(point.operator.layer, point.operator.type, tensor, point.inputs)
        for point, tensor in zip(found, outputs, strict=True)
    )
    return Probed(destination, Signature(signature.inputs, (*signature.outputs, *outputs)), points)


def _give_out(
    graph: schema.SubGraphT,
    definition: schema.SignatureDefT | None,
    indices: list[int],
    outputs: tuple[SignatureTensor, ...],
) -> None:
    from ai_edge_litert import schema_py_generated as schema

    graph.outputs = list(dict.fromkeys([*(int(i) for i in graph.outputs), *indices]))
    if definition is None:
        return
    for index, tensor in zip(indices, outputs, strict=True):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = tensor.native_name.encode(), index
        definition.outputs.append(entry)


class _Graph:
    """One file's main graph as `find_points` takes it; tensors go by their index."""

    def __init__(self, model: schema.ModelT, graph: schema.SubGraphT) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.graph = graph
        self._codes = model.operatorCodes
        self._kinds = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
        self._types = {v: k for k, v in vars(schema.TensorType).items() if not k.startswith("_")}
        self._constant = {
            i
            for i, tensor in enumerate(graph.tensors)
            if model.buffers[tensor.buffer].data is not None and len(model.buffers[tensor.buffer].data)
        }
        for operator in graph.operators:  # a decoded weight is a constant too
            if len(operator.inputs) and all(i in self._constant for i in operator.inputs if i >= 0):
                self._constant.update(int(i) for i in operator.outputs)

    def points(self) -> list[Found]:
        operators = [self._operator(operator) for operator in self.graph.operators]
        return find_points(operators, {str(i) for i in self.graph.outputs})

    def output(self, point: Found, index: int, *, named: bool) -> SignatureTensor:
        """The tensor as an output; files without signatures know it by the tensor's own name only."""
        tensor = self.graph.tensors[int(point.tensor)]
        name = probe_name(index)
        shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        return SignatureTensor(
            name=name,
            native_name=name if named else tensor.name.decode(),
            shape=tuple(int(d) if d >= 0 else f"dim{axis}" for axis, d in enumerate(() if shape is None else shape)),
            dtype=_DTYPES[self._types[tensor.type]],
            model_dtype="float32",
            quantization=_quantization(tensor),
        )

    def _operator(self, operator: schema.OperatorT) -> Operator:
        code = self._codes[operator.opcodeIndex]
        kind = self._kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs = tuple(int(i) for i in operator.inputs if i >= 0)
        outputs = tuple(int(i) for i in operator.outputs)
        name = (self.graph.tensors[outputs[0]].name or b"").decode() if outputs else ""
        layer = layer_of(readable(name))
        return Operator(
            layer="" if layer == ROOT else layer,
            type=kind,
            role=self._role(kind, inputs, outputs),
            inputs=tuple(str(i) for i in inputs if i not in self._constant),
            outputs=tuple(map(str, outputs)),
        )

    def _role(self, kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Role:
        constants = [i for i in inputs if i in self._constant]
        is_real = bool(outputs) and self._is_real(outputs[0])
        if len(constants) == len(inputs) or not is_real:
            return Role.PASSIVE if kind in _PASSIVE and len(constants) < len(inputs) else Role.IGNORED
        looks_up = kind == "GATHER" and inputs[0] in constants and self._rank(inputs[0]) >= 2
        if kind in _KERNELS or looks_up:
            return Role.KERNEL
        if kind in _ACTIVATIONS and len(inputs) - len(constants) == 1:
            return Role.ACTIVATION
        if kind == "ADD" and len(inputs) - len(constants) == 1 and all(self._wide(i) <= 1 for i in constants):
            return Role.BIAS
        return Role.PASSIVE if kind in _PASSIVE else Role.COMPUTES

    def _is_real(self, index: int) -> bool:
        tensor = self.graph.tensors[index]
        kind = self._types[tensor.type]
        return kind in ("FLOAT32", "FLOAT16") or (kind in _DTYPES and _quantization(tensor) is not None)

    def _rank(self, index: int) -> int:
        shape = self.graph.tensors[index].shape
        return 0 if shape is None else len(shape)

    def _wide(self, index: int) -> int:
        shape = self.graph.tensors[index].shape
        return 0 if shape is None else sum(int(d) > 1 for d in cast("list[int]", shape))


def _quantization(tensor: schema.TensorT) -> QuantParams | None:
    """Scale and zero point of an activation, which has one of each."""
    params = tensor.quantization
    if params is None or params.scale is None or len(params.scale) != 1:
        return None
    zero_point = 0 if params.zeroPoint is None or not len(params.zeroPoint) else int(params.zeroPoint[0])
    return QuantParams((float(params.scale[0]),), (zero_point,))
