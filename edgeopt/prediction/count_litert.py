"""Work per operator of a .tflite file."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgeopt.errors import UsageError
from edgeopt.formats import summarize
from edgeopt.prediction.work import Arithmetic, FileWork, Kind, OpWork
from edgeopt.types import OpInfo

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_BITS = {"float32": 32, "int32": 32, "uint32": 32, "float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16,
         "int64": 64, "uint64": 64, "float64": 64, "int4": 4, "int2": 2}  # fmt: skip
_DAMAGE = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)
_LOOPS = {"WHILE", "IF", "CALL", "CALL_ONCE", "STABLEHLO_WHILE", "STABLEHLO_CASE"}
_LSTM = {"UNIDIRECTIONAL_SEQUENCE_LSTM", "LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM"}
_GATES = 4
_KINDS: dict[Kind, set[str]] = {
    "conv": {"CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "CONV_3D_TRANSPOSE"},
    "depthwise": {"DEPTHWISE_CONV_2D"},
    "matmul": {"FULLY_CONNECTED", "BATCH_MATMUL", *_LSTM},
    "pool": {
        "AVERAGE_POOL_2D", "MAX_POOL_2D", "L2_POOL_2D", "MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD",
        "REDUCE_ANY", "REDUCE_ALL", "ARG_MAX", "ARG_MIN", "TOPK_V2",
    },
    "elementwise": {
        "ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "ABS", "NEG",
        "SQUARE", "SQUARED_DIFFERENCE", "QUANTIZE", "DEQUANTIZE", "HARD_SWISH", "PRELU", "LEAKY_RELU", "CAST", "EQUAL",
        "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "SELECT", "SELECT_V2", "LOGICAL_AND",
        "LOGICAL_OR", "LOGICAL_NOT", "FLOOR", "CEIL", "ROUND", "SIGN", "FLOOR_DIV", "FLOOR_MOD", "ADD_N", "CUMSUM",
        "RESIZE_BILINEAR",
    },
    "transcendental": {
        "SOFTMAX", "LOG_SOFTMAX", "LOGISTIC", "TANH", "EXP", "LOG", "SQRT", "RSQRT", "GELU", "ELU", "SIN", "COS", "POW",
        "L2_NORMALIZATION", "LOCAL_RESPONSE_NORMALIZATION",
    },
    "movement": {
        "TRANSPOSE", "PAD", "PADV2", "MIRROR_PAD", "CONCATENATION", "SLICE", "STRIDED_SLICE", "GATHER", "GATHER_ND",
        "SPLIT", "SPLIT_V", "PACK", "UNPACK", "TILE", "BROADCAST_TO", "RESIZE_NEAREST_NEIGHBOR", "SPACE_TO_DEPTH",
        "DEPTH_TO_SPACE", "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND", "REVERSE_V2", "SCATTER_ND", "EMBEDDING_LOOKUP",
        "ONE_HOT", "WHERE", "RANGE", "FILL", "ZEROS_LIKE", "DYNAMIC_UPDATE_SLICE", "REVERSE_SEQUENCE",
    },
    "free": {"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "SHAPE", "RANK"},
}  # fmt: skip
_KIND_OF: Mapping[str, Kind] = {name: kind for kind, names in _KINDS.items() for name in names}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    is_dynamic: bool
    dtype: str
    is_constant: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return -(-self.elements * _BITS.get(self.dtype, 8) // 8)


def count(path: Path) -> FileWork:
    """See `edgeopt.prediction.count.count`. Dynamic dimensions count as the file stores them, usually 1."""
    infos = summarize(path).ops
    try:
        return _count(path.read_bytes(), infos)
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=str(path), fix="export it again") from error


def _count(data: bytes, infos: Sequence[OpInfo]) -> FileWork:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    main = model.SignatureDefs(0).SubgraphIndex() if model.SignatureDefsLength() else 0
    before = sum(model.Subgraphs(i).OperatorsLength() for i in range(main))
    graph = model.Subgraphs(main)
    types = {v: k for k, v in vars(schema.TensorType).items() if not k.startswith("_")}
    tensors = [_tensor(graph.Tensors(i), model, types) for i in range(graph.TensorsLength())]
    listed = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    own = infos[before : before + len(listed)]
    loops = sorted({info.type for info in own if info.type in _LOOPS})
    if loops:
        return FileWork((), unsupported=f"repeats or chooses operators as it runs ({', '.join(loops)})")
    decoded = _decoded(listed, own, tensors)
    tensors = [_decode(t) if i in decoded else t for i, t in enumerate(tensors)]
    ops = tuple(_ops(listed, own, tensors, decoded))
    dynamic = {t.name: t for t in tensors if t.is_dynamic}
    inputs = [tensors[i] for i in _indices(graph.InputsAsNumpy())]
    assumed = tuple(f"{t.name}: {'x'.join(map(str, t.shape))}" for t in inputs if t.name in dynamic)
    wide = [
        info for info in own if info.dtype == "int16" and _KIND_OF.get(info.type) in ("conv", "depthwise", "matmul")
    ]
    if wide:
        reason = "multiplies by 16-bit activations, for which LiteRT has reference kernels only"
        return FileWork(ops, assumed, unsupported=reason)
    return FileWork(ops, assumed)


def _tensor(tensor: schema.Tensor, model: schema.Model, types: Mapping[int, str]) -> _Tensor:
    stored = tuple(int(d) for d in _list(tensor.ShapeAsNumpy()))
    signature = () if tensor.ShapeSignatureIsNone() else tuple(int(d) for d in _list(tensor.ShapeSignatureAsNumpy()))
    buffer = model.Buffers(tensor.Buffer())
    return _Tensor(
        name=(tensor.Name() or b"").decode(),
        shape=tuple(max(d, 1) for d in stored),
        is_dynamic=any(d < 0 for d in (*stored, *signature)),
        dtype=types[tensor.Type()].lower(),
        is_constant=not buffer.DataIsNone() or buffer.Offset() > 1,
    )


def _list(vector: object) -> list[int]:
    # FlatBuffers gives the number 0 for a vector that is absent.
    return [] if isinstance(vector, int) else list(cast("list[int]", vector))


def _indices(vector: object) -> tuple[int, ...]:
    return tuple(int(i) for i in _list(vector) if i >= 0)


def _decoded(listed: Sequence[schema.Operator], infos: Sequence[OpInfo], tensors: Sequence[_Tensor]) -> set[int]:
    """Weights that are stored narrow and decoded once, when the file is loaded."""
    found: set[int] = set()
    for operator, info in zip(listed, infos, strict=True):
        inputs = _indices(operator.InputsAsNumpy())
        if info.type in ("DEQUANTIZE", "DENSIFY") and all(tensors[i].is_constant or i in found for i in inputs):
            found.update(_indices(operator.OutputsAsNumpy()))
    return found


def _decode(tensor: _Tensor) -> _Tensor:
    return _Tensor(tensor.name, tensor.shape, tensor.is_dynamic, tensor.dtype, is_constant=True)


def _ops(
    listed: Sequence[schema.Operator], infos: Sequence[OpInfo], tensors: Sequence[_Tensor], decoded: set[int]
) -> Iterator[OpWork]:
    for operator, info in zip(listed, infos, strict=True):
        outputs = _indices(operator.OutputsAsNumpy())
        if any(i in decoded for i in outputs):
            continue
        reads = [tensors[i] for i in _indices(operator.InputsAsNumpy())]
        yield _work(info, reads, [tensors[i] for i in outputs])


def _work(info: OpInfo, reads: Sequence[_Tensor], writes: Sequence[_Tensor]) -> OpWork:
    kind = _KIND_OF.get(info.type, "unknown")
    activations = [t for t in reads if not t.is_constant]
    output = writes[0] if writes else None
    macs = channels = 0
    if kind == "pool":
        macs = sum(t.elements for t in activations)
    elif output is not None and kind in ("conv", "depthwise", "matmul"):
        macs = _macs(info.type, reads, output)
        channels = output.shape[-1] if output.shape else 1
    moved = [*activations, *writes]
    if info.type in ("GATHER", "EMBEDDING_LOOKUP"):
        moved, reads = [*writes, *writes], []  # of a table, only the rows that are asked for
    return OpWork(
        name=info.name,
        type=info.type,
        kind=kind,
        arithmetic=_arithmetic(info.dtype),
        macs=macs,
        channels=channels,
        elements=sum(t.elements for t in writes),
        weight_bytes=sum(t.size for t in reads if t.is_constant),
        activation_bytes=sum(t.size for t in moved),
    )


def _arithmetic(dtype: str) -> Arithmetic:
    if dtype in ("int8", "uint8", "int8-dynamic"):
        return "int8"
    return "fp16" if dtype == "float16" else "fp32"


def _macs(type_: str, reads: Sequence[_Tensor], output: _Tensor) -> int:
    if type_ == "BATCH_MATMUL":
        # Rows of the left operand times its other axis, transposed or not.
        left = reads[0]
        return output.elements * math.prod(left.shape[-2:]) // output.shape[-2]
    kernel = reads[1].shape
    if type_ == "TRANSPOSE_CONV":
        return reads[2].elements // kernel[3] * math.prod(kernel)
    if type_ == "CONV_3D":
        return output.elements * math.prod(kernel[:4])
    if type_ == "CONV_3D_TRANSPOSE":
        return reads[2].elements * math.prod(kernel[:4])
    if type_ == "DEPTHWISE_CONV_2D":
        return output.elements * math.prod(kernel[1:3])
    if type_ in _LSTM:
        units, depth = kernel
        return reads[0].elements // depth * _GATES * units * (depth + output.shape[-1])
    return output.elements * math.prod(kernel[1:])
