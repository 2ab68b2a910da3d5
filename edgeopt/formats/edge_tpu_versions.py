"""Versions of LiteRT's operators: which ones the Edge TPU compiler's parser knows, and which one an operator needs.

The compiler's last release (16.0.384591198, July 2021) reads files with TensorFlow Lite 2.5, the release that its
runtime library and PyCoral were built from; a file with one newer operator, or one newer version, it refuses whole.

Sources: tensorflow/lite/tools/versioning/runtime_version.cc (which release brought which version) and op_version.cc
(which version a signature needs) in https://github.com/tensorflow/tensorflow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Operator -> its newest version in TensorFlow Lite 2.5. An operator that isn't here came later.
KNOWN_VERSIONS: Mapping[str, int] = {
    "ABS": 3, "ADD": 3, "ADD_N": 1, "ARG_MAX": 2, "ARG_MIN": 2, "AVERAGE_POOL_2D": 3, "BATCH_MATMUL": 4,
    "BATCH_TO_SPACE_ND": 3, "BIDIRECTIONAL_SEQUENCE_LSTM": 3, "BIDIRECTIONAL_SEQUENCE_RNN": 3, "BROADCAST_TO": 3,
    "CALL_ONCE": 1, "CAST": 1, "CEIL": 1, "COMPLEX_ABS": 1, "CONCATENATION": 3, "CONV_2D": 5, "CONV_3D": 1, "COS": 1,
    "CUMSUM": 1, "DENSIFY": 1, "DEPTH_TO_SPACE": 2, "DEPTHWISE_CONV_2D": 6, "DEQUANTIZE": 4, "DIV": 2, "ELU": 1,
    "EMBEDDING_LOOKUP": 3, "EMBEDDING_LOOKUP_SPARSE": 1, "EQUAL": 3, "EXP": 1, "EXPAND_DIMS": 1, "FAKE_QUANT": 2,
    "FILL": 3, "FLOOR": 1, "FLOOR_DIV": 2, "FLOOR_MOD": 1, "FULLY_CONNECTED": 9, "GATHER": 5, "GATHER_ND": 3,
    "GREATER": 2, "GREATER_EQUAL": 2, "HARD_SWISH": 1, "HASHTABLE": 1, "HASHTABLE_FIND": 1, "HASHTABLE_IMPORT": 1,
    "HASHTABLE_LOOKUP": 1, "HASHTABLE_SIZE": 1, "IF": 1, "IMAG": 1, "L2_NORMALIZATION": 2, "L2_POOL_2D": 1,
    "LEAKY_RELU": 2, "LESS": 2, "LESS_EQUAL": 2, "LOCAL_RESPONSE_NORMALIZATION": 1, "LOG": 1, "LOG_SOFTMAX": 2,
    "LOGICAL_AND": 1, "LOGICAL_NOT": 1, "LOGICAL_OR": 1, "LOGISTIC": 3, "LSH_PROJECTION": 1, "LSTM": 4,
    "MATRIX_DIAG": 1, "MATRIX_SET_DIAG": 1, "MAX_POOL_2D": 3, "MAXIMUM": 4, "MEAN": 3, "MINIMUM": 4, "MIRROR_PAD": 2,
    "MUL": 4, "NEG": 1, "NON_MAX_SUPPRESSION_V4": 1, "NON_MAX_SUPPRESSION_V5": 1, "NOT_EQUAL": 3, "ONE_HOT": 1,
    "PACK": 3, "PAD": 3, "PADV2": 3, "POW": 1, "PRELU": 1, "QUANTIZE": 2, "RANGE": 1, "RANK": 1, "REAL": 1,
    "REDUCE_ANY": 1, "REDUCE_MAX": 3, "REDUCE_MIN": 3, "REDUCE_PROD": 1, "RELU": 3, "RELU6": 3, "RELU_N1_TO_1": 1,
    "RESHAPE": 1, "RESIZE_BILINEAR": 4, "RESIZE_NEAREST_NEIGHBOR": 4, "REVERSE_SEQUENCE": 1, "REVERSE_V2": 3,
    "RFFT2D": 1, "RNN": 3, "ROUND": 1, "RSQRT": 2, "SCATTER_ND": 1, "SEGMENT_SUM": 1, "SELECT": 2, "SELECT_V2": 1,
    "SHAPE": 1, "SIN": 1, "SKIP_GRAM": 1, "SLICE": 5, "SOFTMAX": 3, "SPACE_TO_BATCH_ND": 3, "SPACE_TO_DEPTH": 2,
    "SPARSE_TO_DENSE": 3, "SPLIT": 4, "SPLIT_V": 2, "SQRT": 1, "SQUARE": 1, "SQUARED_DIFFERENCE": 2, "SQUEEZE": 2,
    "STRIDED_SLICE": 5, "SUB": 5, "SUM": 2, "SVDF": 4, "TANH": 3, "TILE": 2, "TOPK_V2": 2, "TRANSPOSE": 5,
    "TRANSPOSE_CONV": 3, "UNIDIRECTIONAL_SEQUENCE_LSTM": 3, "UNIDIRECTIONAL_SEQUENCE_RNN": 3, "UNIQUE": 1,
    "UNPACK": 4, "WHERE": 1, "WHILE": 1, "ZEROS_LIKE": 1,
}  # fmt: skip

#: Operators whose version follows from their first input's type alone: (int8, int16); all others need version 1.
_BY_TYPE: Mapping[str, tuple[int, int]] = {
    "ABS": (2, 3), "ARG_MAX": (2, 1), "ARG_MIN": (2, 1), "AVERAGE_POOL_2D": (2, 3), "BATCH_MATMUL": (2, 3),
    "CONCATENATION": (2, 3), "DEPTH_TO_SPACE": (2, 1), "EQUAL": (2, 4), "EXP": (2, 2), "GELU": (2, 1),
    "GREATER": (2, 1), "GREATER_EQUAL": (2, 3), "LEAKY_RELU": (1, 2), "LESS": (2, 3), "LESS_EQUAL": (2, 1),
    "L2_NORMALIZATION": (2, 1), "LOG_SOFTMAX": (2, 1), "LOGISTIC": (2, 3), "MAX_POOL_2D": (2, 3), "MEAN": (2, 3),
    "MIRROR_PAD": (2, 3), "NOT_EQUAL": (2, 1), "PACK": (2, 3), "REDUCE_MAX": (2, 3), "REDUCE_MIN": (2, 3),
    "REDUCE_PROD": (2, 2), "RELU": (2, 3), "RELU6": (2, 3), "RESHAPE": (1, 1), "RSQRT": (2, 1), "SOFTMAX": (2, 3),
    "SPACE_TO_DEPTH": (2, 1), "SPLIT_V": (2, 1), "SQUARED_DIFFERENCE": (2, 1), "SUM": (2, 1), "TANH": (2, 3),
    "TOPK_V2": (2, 1), "TILE": (3, 1), "UNPACK": (2, 4), "HARD_SWISH": (1, 1), "PRELU": (1, 1), "EXPAND_DIMS": (1, 1),
    "SQUEEZE": (1, 1), "NEG": (1, 1), "ELU": (1, 1), "SQRT": (1, 1), "POW": (1, 1), "LOG": (1, 1), "SQUARE": (1, 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor as versions depend on it; `dtype` as the schema names it, `scales` empty where it isn't quantized."""

    dtype: str
    shape: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OpSignature:
    """An operator as its version depends on it; an omitted optional input is None.

    Attributes:
        options: the schema's attributes by name.
    """

    kind: str
    inputs: tuple[TensorType | None, ...]
    outputs: tuple[TensorType, ...]
    options: Mapping[str, int]

    def option(self, name: str) -> int:
        return self.options.get(name, 0)

    def type_of(self, position: int) -> str:
        tensor = self.inputs[position] if position < len(self.inputs) else None
        return "none" if tensor is None else tensor.dtype

    @property
    def rank(self) -> int:
        """Of the input that has most dimensions."""
        return max((len(tensor.shape) for tensor in self.inputs if tensor is not None), default=0)

    @property
    def broadcasts(self) -> bool:
        shapes = [tensor.shape for tensor in self.inputs[:2] if tensor is not None]
        return len(set(shapes)) > 1


def needed_version(op: OpSignature) -> int | None:
    """The oldest version of the operator that describes it; None for an operator that isn't known here."""
    rule = _RULES.get(op.kind)
    if rule is not None:
        return rule(op)
    if op.kind in _BY_TYPE:
        int8, int16 = _BY_TYPE[op.kind]
        return {"INT8": int8, "INT16": int16}.get(op.type_of(0), 1)
    return None


def _conv(op: OpSignature) -> int:
    data, weight = op.inputs[0], op.inputs[1]
    if data is not None and weight is not None and data.shape[-1:] != weight.shape[-1:]:
        return 6  # grouped
    types = (op.type_of(0), op.type_of(1))
    if types == ("FLOAT32", "INT8"):
        return 5 if weight is not None and len(weight.scales) > 1 else 2
    return {("INT8", "INT4"): 7, ("INT8", "INT8"): 3, ("INT16", "INT8"): 4}.get(types, 1)


def _depthwise(op: OpSignature) -> int:
    weight = op.inputs[1]
    types = (op.type_of(0), op.type_of(1))
    if types == ("FLOAT32", "INT8"):
        return 6 if weight is not None and len(weight.scales) > 1 else 4
    dilated = max(op.option("dilationWFactor"), op.option("dilationHFactor")) > 1
    return {("INT8", "INT4"): 7, ("INT8", "INT8"): 3, ("INT16", "INT8"): 5}.get(types, 2 if dilated else 1)


def _fully_connected(op: OpSignature) -> int:
    types = (op.type_of(0), op.type_of(1))
    if types[0] == "INT16":
        return 7
    if len(op.inputs) == 2 or op.inputs[2] is None:
        return 6
    if op.option("keepNumDims"):
        return 5
    if types == ("FLOAT32", "INT8"):
        return 9 if op.option("asymmetricQuantizeInputs") else 3
    return {("INT8", "INT8"): 4, ("INT8", "INT4"): 10}.get(types, 1)


def _transpose_conv(op: OpSignature) -> int:
    if op.option("fusedActivationFunction"):
        return 4
    if op.type_of(3) != "none":
        return 3
    return 2 if op.type_of(1) == "INT8" else 1


def _mul(op: OpSignature) -> int:
    kinds = {"INT64": 5, "INT16": 4}
    if op.type_of(0) in kinds:
        return kinds[op.type_of(0)]
    scales = [tensor.scales[0] for tensor in (*op.inputs, *op.outputs) if tensor is not None and tensor.scales]
    if len(scales) == 3 and scales[0] * scales[1] / scales[2] >= 1:
        return 3
    return 2 if op.type_of(0) == "INT8" else 1


def _add(op: OpSignature) -> int:
    return {"INT8": 2, "INT16": 1 if op.option("potScaleInt16") else 3, "INT64": 4}.get(op.type_of(0), 1)


def _sub(op: OpSignature) -> int:
    if op.type_of(0) == "INT16":
        return 1 if op.option("potScaleInt16") else 5
    if op.type_of(0) == "INT64":
        return 4
    return 3 if op.broadcasts and op.rank > 4 else 2 if op.type_of(0) == "INT8" else 1


def _extremum(op: OpSignature) -> int:
    if op.type_of(0) == "INT16":
        return 4
    return 3 if op.broadcasts and op.rank > 4 else 2 if op.type_of(0) == "INT8" else 1


def _pad(op: OpSignature) -> int:
    if op.inputs[0] is not None and len(op.inputs[0].shape) > 4:
        return 4
    return {"INT8": 2, "INT16": 3}.get(op.type_of(0), 1)


def _transpose(op: OpSignature) -> int:
    if op.inputs[0] is not None and len(op.inputs[0].shape) > 5:
        return 6
    if op.type_of(0) == "INT16":
        return 5
    if op.inputs[0] is not None and len(op.inputs[0].shape) > 4:
        return 4
    return {"BOOL": 3, "INT8": 2}.get(op.type_of(0), 1)


def _slice(op: OpSignature) -> int:
    if op.inputs[0] is not None and len(op.inputs[0].shape) > 4:
        return 5
    return {"INT16": 4, "STRING": 3, "INT8": 2}.get(op.type_of(0), 1)


def _strided_slice(op: OpSignature) -> int:
    if op.option("ellipsisMask") or op.option("newAxisMask"):
        return 6
    if op.inputs[0] is not None and len(op.inputs[0].shape) > 4:
        return 4
    return {"BOOL": 3, "INT8": 2}.get(op.type_of(0), 1)


def _resize_bilinear(op: OpSignature) -> int:
    if op.type_of(0) == "INT16":
        return 4
    return 3 if op.option("halfPixelCenters") else 2 if op.type_of(0) == "INT8" else 1


def _resize_nearest(op: OpSignature) -> int:
    if op.type_of(0) == "INT16":
        return 4
    special = op.option("halfPixelCenters") or op.option("alignCorners")
    return 3 if special else 2 if op.type_of(0) == "INT8" else 1


def _split(op: OpSignature) -> int:
    # The first input is the axis.
    return {"INT16": 4, "INT32": 3, "INT8": 2}.get(op.type_of(1), 1)


def _quantize(op: OpSignature) -> int:
    if op.outputs and len(op.outputs[0].scales) > 1:
        return 3
    return 2 if op.outputs and op.outputs[0].dtype == "INT16" else 1


def _dequantize(op: OpSignature) -> int:
    if op.inputs[0] is not None and len(op.inputs[0].scales) > 1:
        return 5
    return {"INT16": 3, "FLOAT16": 3, "INT8": 2, "INT4": 6}.get(op.type_of(0), 1)


def _gather(op: OpSignature) -> int:
    if op.option("batchDims"):
        return 5
    return {"INT16": 4, "BOOL": 3, "INT8": 2}.get(op.type_of(0), 1)


def _select(op: OpSignature) -> int:
    return 3 if op.rank > 4 else 2 if op.type_of(0) == "INT8" else 1


def _batch_space(op: OpSignature) -> int:
    if op.inputs[0] is not None and len(op.inputs[0].shape) != 4:
        return 3
    return 2 if op.type_of(0) == "INT8" else 1


_RULES: Mapping[str, Callable[[OpSignature], int]] = {
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": _fully_connected,
    "TRANSPOSE_CONV": _transpose_conv,
    "MUL": _mul,
    "ADD": _add,
    "SUB": _sub,
    "MAXIMUM": _extremum,
    "MINIMUM": _extremum,
    "DIV": lambda op: 2 if op.broadcasts and op.rank > 4 else 1,
    "PAD": _pad,
    "PADV2": _pad,
    "TRANSPOSE": _transpose,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "RESIZE_BILINEAR": _resize_bilinear,
    "RESIZE_NEAREST_NEIGHBOR": _resize_nearest,
    "SPLIT": _split,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "GATHER": _gather,
    "GATHER_ND": lambda op: 3 if op.type_of(0) == "INT16" else 1,
    "SELECT": _select,
    "SPACE_TO_BATCH_ND": _batch_space,
    "BATCH_TO_SPACE_ND": _batch_space,
    "BROADCAST_TO": lambda op: 3 if op.type_of(0) in ("INT8", "INT16") else 2,
}
