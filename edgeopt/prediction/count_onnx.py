"""Work per operator of an .onnx file, as ONNX Runtime's CPU provider runs it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.formats.onnx import CONVERSIONS, DECODERS, load, read_ops, type_name
from edgeopt.prediction.onnx_shapes import infer
from edgeopt.prediction.work import Arithmetic, FileWork, Kind, OpWork
from edgeopt.types import OpInfo

if TYPE_CHECKING:
    import onnx

_BITS = {"float32": 32, "int32": 32, "uint32": 32, "float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16,
         "int64": 64, "uint64": 64, "float64": 64, "int4": 4, "uint4": 4}  # fmt: skip
_LOOPS = {"If", "Loop", "Scan"}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_INT8_LEVEL = 4
#: Position of the weights, where it is not 1.
_WEIGHTS = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_CONVS = {"Conv", "ConvInteger", "QLinearConv"}
_KINDS: dict[Kind, set[str]] = {
    "conv": {*_CONVS, "ConvTranspose"},
    "matmul": {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul",
               "MatMulIntegerToFloat", "MatMulNBits", "FusedMatMul", *_RECURRENT},
    "pool": {
        "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "ReduceMean", "ReduceSum",
        "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd", "ArgMax", "ArgMin", "TopK", "QLinearAveragePool",
        "QLinearGlobalAveragePool",
    },
    "elementwise": {
        "Add", "Sub", "Mul", "Div", "Max", "Min", "Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "HardSigmoid",
        "Abs", "Neg", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Where", "Equal",
        "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Floor", "Ceil", "Round", "Sign",
        "BatchNormalization", "Mod", "IsNaN", "IsInf", "CumSum", "Resize", "Upsample", "QLinearAdd", "QLinearMul",
        "QLinearLeakyRelu", "Xor",
    },
    "transcendental": {
        "Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Reciprocal", "Gelu", "FastGelu", "Erf",
        "Elu", "Selu", "Softplus", "Sin", "Cos", "Pow", "LayerNormalization", "InstanceNormalization",
        "GroupNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization",
        "QLinearSoftmax", "QLinearSigmoid", "Mish", "LRN", "BiasGelu", "QuickGelu",
    },
    "movement": {
        "Transpose", "Concat", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Pad", "Tile", "Expand",
        "DepthToSpace", "SpaceToDepth", "ScatterND", "ScatterElements", "OneHot", "Range", "ConstantOfShape",
        "QLinearConcat", "GatherBlockQuantized", "Trilu", "NonZero", "EyeLike",
    },
    "free": {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Dropout"},
}  # fmt: skip
_KIND_OF: Mapping[str, Kind] = {name: kind for kind, names in _KINDS.items() for name in names}
#: What ONNX Runtime computes as it writes a convolution's result.
_FUSED = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "BatchNormalization"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """`shape` is None where the file doesn't tell."""

    shape: tuple[int, ...] | None
    dtype: str
    is_constant: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape or ())

    def size(self, dtype: str | None = None) -> int:
        return -(-self.elements * _BITS.get(dtype or self.dtype, 8) // 8)


def count(path: Path) -> FileWork:
    """See `edgeopt.prediction.count.count`. Dynamic dimensions count as 1."""
    model = load(path, weights=False)
    texts = (text for node in model.graph.node for text in (node.op_type, node.name, *node.input, *node.output))
    if not all(isinstance(text, str) for text in texts):  # protobuf hands out as bytes what is not UTF-8
        raise UsageError("is damaged: names in it are not text", where=str(path))
    loops = sorted({node.op_type for node in model.graph.node} & _LOOPS)
    if loops:
        return FileWork((), unsupported=f"repeats or chooses operators as it runs ({', '.join(loops)})")
    infos = list(read_ops(model))
    assumed = _fix_dimensions(model)
    graph = _Graph(model, infos)
    try:
        return FileWork(tuple(graph.works()), assumed)
    except (IndexError, KeyError, ZeroDivisionError, ValueError) as error:
        raise UsageError("has shapes that don't fit its operators", where=str(path)) from error


def _fix_dimensions(model: onnx.ModelProto) -> tuple[str, ...]:
    """Set every named dimension to 1; returns which inputs had one."""
    assumed = []
    for info in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        dims = info.type.tensor_type.shape.dim
        dynamic = [d for d in dims if not d.HasField("dim_value")]
        for d in dynamic:
            d.dim_value = 1
        if dynamic and any(info.name == i.name for i in model.graph.input):
            assumed.append(f"{info.name}: {'x'.join(str(d.dim_value) for d in dims)}")
    return tuple(assumed)


class _Graph:
    def __init__(self, model: onnx.ModelProto, infos: Sequence[OpInfo]) -> None:
        inferred = infer(model)
        nodes = model.graph.node
        self._tensors = {v.name: _value(v) for v in (*inferred.value_info, *inferred.input, *inferred.output)}
        self._tensors |= {i.name: _Tensor(tuple(i.dims), type_name(i.data_type), True) for i in model.graph.initializer}
        for node in nodes:
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                shape, dtype = ((), "float32") if value is None else (tuple(value.dims), type_name(value.data_type))
                self._tensors[node.output[0]] = _Tensor(shape, dtype, True)
        outputs = {o.name for o in model.graph.output}
        self._stored: dict[str, str] = {}
        kept = [node for node in nodes if node.op_type != "Constant" and not self._decodes(node, outputs)]
        self._nodes = list(zip(kept, infos, strict=True))
        self._readers = Counter(name for node in nodes for name in set(node.input))
        self._makers = {o: (node, info) for node, info in self._nodes for o in node.output}
        self._dtypes_of_readers: dict[str, list[OpInfo]] = {}
        for node, info in self._nodes:
            for name in set(node.input):
                self._dtypes_of_readers.setdefault(name, []).append(info)

    def works(self) -> Iterator[OpWork]:
        for node, info in self._nodes:
            if not self._is_fused(node):
                yield self._work(node, info)

    def _decodes(self, node: onnx.NodeProto, outputs: set[str]) -> bool:
        """Whether a node only decodes constants, as `edgeopt.formats.onnx.read_ops` leaves them out."""
        inputs = [name for name in node.input if name]
        known = all(self._tensor(name).is_constant for name in inputs)
        if node.op_type not in DECODERS or node.output[0] in outputs or not inputs or not known:
            return False
        name = node.output[0]
        first = self._tensor(inputs[0])
        shape = self._tensor(name).shape or first.shape
        # The runtime keeps what it decodes as it is stored where an integer kernel reads it.
        self._stored[name] = self._stored.get(inputs[0], first.dtype)
        self._tensors[name] = _Tensor(shape, self._tensor(name).dtype, True)
        return True

    def _tensor(self, name: str) -> _Tensor:
        return self._tensors.get(name, _Tensor(None, "float32", False))

    def _is_fused(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "DequantizeLinear":
            readers = self._dtypes_of_readers.get(node.output[0], [])
            return bool(readers) and all(r.type not in CONVERSIONS and r.dtype in ("int8", "int16") for r in readers)
        maker = self._makers.get(node.input[0]) if node.input else None
        if maker is None:
            return False
        if node.op_type == "QuantizeLinear":
            return maker[1].type not in CONVERSIONS and maker[1].dtype in ("int8", "int16")
        return node.op_type in _FUSED and maker[0].op_type == "Conv" and self._readers[node.input[0]] == 1

    def _work(self, node: onnx.NodeProto, info: OpInfo) -> OpWork:
        kind = _KIND_OF.get(node.op_type, "unknown")
        # A name read twice is read twice.
        reads = [self._tensor(name) for name in node.input if name]
        writes = [self._tensor(name) for name in node.output if name]
        activations = [t for t in reads if not t.is_constant]
        integer = info.dtype in ("int8", "int4") and node.op_type not in CONVERSIONS
        macs = channels = 0
        if kind == "pool":
            macs = sum(t.elements for t in activations)
        elif kind in ("conv", "matmul"):
            macs, channels = self._macs(node, writes[0])
            if node.op_type in _CONVS and self._is_depthwise(node):
                kind = "depthwise"
        width = "int8" if integer and info.type != "MatMulNBits" else None
        weights = sum(
            self._tensor(name).size(self._stored.get(name, None) if integer else None)
            for name in node.input
            if name and self._tensor(name).is_constant
        )
        moved = sum(t.size(width if t.dtype in ("float32", "float16") else None) for t in (*activations, *writes))
        if node.op_type in ("Gather", "GatherBlockQuantized"):
            weights, moved = 0, 2 * sum(t.size() for t in writes)  # of a table, only the rows that are asked for
        return OpWork(
            name=info.name,
            type=node.op_type,
            kind=kind,
            arithmetic=_arithmetic(node, info.dtype),
            macs=macs,
            channels=channels,
            elements=sum(t.elements for t in writes),
            weight_bytes=weights,
            activation_bytes=moved,
        )

    def _is_depthwise(self, node: onnx.NodeProto) -> bool:
        weights = self._tensor(node.input[_WEIGHTS.get(node.op_type, 1)]).shape or ()
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        return group > 1 and len(weights) > 1 and weights[1] == 1

    def _macs(self, node: onnx.NodeProto, output: _Tensor) -> tuple[int, int]:
        """Multiply-accumulates, and output channels."""
        data = self._known(node, 0)
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            return math.prod(data[:-1]) * sizes["K"] * sizes["N"], sizes["N"]
        weights = self._known(node, _WEIGHTS.get(node.op_type, 1))
        if node.op_type in _RECURRENT:
            recurrent = self._known(node, 2)
            return math.prod(data[:2]) * (math.prod(weights) + math.prod(recurrent)), weights[1]
        if node.op_type == "ConvTranspose":
            return math.prod(data) * math.prod(weights[1:]), weights[1]
        if node.op_type in _CONVS:
            return self._written(node, output) * math.prod(weights[1:]), weights[0]
        depth = data[-1]
        if node.op_type == "Gemm" and next((a.i for a in node.attribute if a.name == "transA"), 0):
            depth = data[0]
        shape = output.shape or (1,)
        return self._written(node, output) * depth, shape[-1]

    def _known(self, node: onnx.NodeProto, position: int) -> tuple[int, ...]:
        shape = self._tensor(node.input[position]).shape
        if shape is None:
            raise UsageError("the shape of its input can't be told", where=f"operator {node.name or node.op_type!r}")
        return shape

    def _written(self, node: onnx.NodeProto, output: _Tensor) -> int:
        if output.shape is None:
            raise UsageError("the shape of its output can't be told", where=f"operator {node.name or node.op_type!r}")
        return output.elements


def _value(info: onnx.ValueInfoProto) -> _Tensor:
    kind = info.type.tensor_type
    shape = tuple(d.dim_value or 1 for d in kind.shape.dim) if kind.HasField("shape") else None
    return _Tensor(shape, type_name(kind.elem_type), False)


def _arithmetic(node: onnx.NodeProto, dtype: str) -> Arithmetic:
    if node.op_type == "MatMulNBits":
        # Accuracy level 4 quantizes activations to int8; below, tiles of weights are decoded and multiplied as floats.
        return "int8" if next((a.i for a in node.attribute if a.name == "accuracy_level"), 0) == _INT8_LEVEL else "fp32"
    if dtype in ("int8", "int4"):
        return "int8"
    return "fp16" if dtype == "float16" else "fp32"
