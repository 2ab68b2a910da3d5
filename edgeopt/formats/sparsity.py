"""How many weights of an exported file are zero, whatever its format: read from its constants, without running it."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import UsageError
from edgeopt.formats import SUFFIXES
from edgeopt.types import Array

if TYPE_CHECKING:
    import onnx
    from ai_edge_litert import schema_py_generated as schema
    from executorch.exir.schema import Buffer, EValue

_DAMAGE = (
    struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, AssertionError, OverflowError,
    subprocess.SubprocessError,
)  # fmt: skip
#: What four bits stand for zero where they are stored unsigned.
_MIDDLE_OF_4_BITS = 8
_XNNPACK_4_BITS = ("qcint4", "qbint4")


@dataclass(frozen=True, slots=True)
class TensorZeros:
    """One weight: how many elements it has and how many of them stand for 0."""

    name: str
    elements: int
    zeros: int

    @property
    def share(self) -> float:
        return self.zeros / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class FileZeros:
    """Every weight of a file: float or integer constants of two or more dimensions, so no biases, no scales."""

    tensors: tuple[TensorZeros, ...]

    @property
    def elements(self) -> int:
        return sum(t.elements for t in self.tensors)

    @property
    def zeros(self) -> int:
        return sum(t.zeros for t in self.tensors)

    @property
    def share(self) -> float:
        """Over all weights, 0..1."""
        return self.zeros / self.elements if self.elements else 0.0


def zeros_of(path: Path) -> FileZeros:
    """Count the zero weights of a .tflite, .onnx or .pte file; of a quantized weight, what equals its zero point.

    Raises:
        UsageError: the file is absent, of another kind, or corrupt.
        MissingError: a .pte file, and ExecuTorch is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError("is not a model file", where=str(path), fix=f"give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    read = {"litert": _litert, "onnx": _onnx, "executorch": _executorch}[SUFFIXES[path.suffix]]
    try:
        return FileZeros(tuple(read(path)))
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=str(path), fix="export it again") from error


def _nibbles(packed: Array) -> Array:
    """Unsigned four-bit numbers, the low ones of each byte first."""
    numbers: Array = np.stack([packed & 15, packed >> 4], axis=-1).ravel()
    return numbers


# --- LiteRT ----------------------------------------------------------------------------------------------------------


def _litert(path: Path) -> Iterator[TensorZeros]:
    from ai_edge_litert.tools import flatbuffer_utils

    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ValueError("not a LiteRT file")
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    seen: set[int] = set()
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.buffer in seen or tensor.shape is None or len(tensor.shape) < 2:
                continue
            content = model.buffers[tensor.buffer].data
            found = None if content is None else _litert_zeros(tensor, bytes(content))
            if found is not None:
                seen.add(tensor.buffer)
                yield found


def _litert_zeros(tensor: schema.TensorT, content: bytes) -> TensorZeros | None:
    from ai_edge_litert import schema_py_generated as schema

    types = schema.TensorType
    dtypes = {types.FLOAT32: np.float32, types.FLOAT16: np.float16, types.INT8: np.int8, types.UINT8: np.uint8}
    name, elements = tensor.name.decode(), int(np.prod(tensor.shape))
    if tensor.type == types.INT4:
        # Two's complement: 0 is 0 in either reading.
        numbers = _nibbles(np.frombuffer(content, np.uint8))[:elements]
        return TensorZeros(name, elements, int(np.count_nonzero(numbers == 0)))
    if tensor.type not in dtypes:
        return None
    values = np.frombuffer(content, dtypes[tensor.type])
    if tensor.sparsity is not None:  # zeros aren't stored
        return TensorZeros(name, elements, elements - int(np.count_nonzero(values)))
    quantization = tensor.quantization
    if quantization is None or quantization.zeroPoint is None or not len(quantization.zeroPoint):
        return TensorZeros(name, elements, int(np.count_nonzero(values == 0)))
    zero_points = np.array(quantization.zeroPoint)
    if len(zero_points) > 1:
        shape = [1] * len(tensor.shape)
        shape[quantization.quantizedDimension] = len(zero_points)
        zero_points = zero_points.reshape(shape)
    return TensorZeros(name, elements, int(np.count_nonzero(values.reshape(tensor.shape) == zero_points)))


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _onnx(path: Path) -> Iterator[TensorZeros]:
    import onnx
    from onnx import numpy_helper

    from edgeopt.formats.onnx import load

    model = load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input if name in constants}
    kinds = onnx.TensorProto
    weights = {kinds.FLOAT, kinds.FLOAT16, kinds.INT8, kinds.UINT8, kinds.INT4, kinds.UINT4}
    for name, tensor in constants.items():
        if len(tensor.dims) < 2 or tensor.data_type not in weights or name not in readers:
            continue
        reader = readers[name]
        if reader.op_type == "MatMulNBits":
            if reader.input[1] == name:
                yield _onnx_blocks(reader, constants)
            continue
        # 4-bit types have no arithmetic of their own in NumPy.
        values = numpy_helper.to_array(tensor)
        values = values if values.dtype.kind == "f" else values.astype(np.int16)
        zeros = np.count_nonzero(values == _onnx_zero_point(reader, name, values.shape, constants))
        yield TensorZeros(name, values.size, int(zeros))


def _onnx_blocks(reader: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> TensorZeros:
    """The weight of a MatMulNBits: (N, blocks, bytes), zero points (N, blocks) packed alike, the middle by default."""
    from onnx import numpy_helper

    attributes = {a.name: a.i for a in reader.attribute}
    bits, columns = attributes.get("bits", 4), attributes["K"]
    blocks = -(-columns // attributes["block_size"])

    def unpacked(name: str) -> Array:
        stored = numpy_helper.to_array(constants[name]).astype(np.uint8).reshape(attributes["N"], -1)
        return stored if bits == 8 else _nibbles(stored).reshape(len(stored), -1)

    values = unpacked(reader.input[1])[:, :columns]
    zero_point: Array = np.array([[1 << (bits - 1)]])
    if len(reader.input) > 3 and reader.input[3]:
        zero_point = np.repeat(unpacked(reader.input[3])[:, :blocks], attributes["block_size"], axis=1)[:, :columns]
    return TensorZeros(reader.input[1], values.size, int(np.count_nonzero(values == zero_point)))


def _onnx_zero_point(
    reader: onnx.NodeProto, name: str, shape: tuple[int, ...], constants: Mapping[str, onnx.TensorProto]
) -> Array:
    """What stands for 0, so that it compares with the weight; blocks of a blocked format repeat theirs."""
    from onnx import numpy_helper

    place, along = {"DequantizeLinear": (2, "axis"), "GatherBlockQuantized": (3, "quantize_axis")}.get(
        reader.op_type, (None, "")
    )
    if place is None or reader.input[0] != name or len(reader.input) <= place or reader.input[place] not in constants:
        return np.zeros((), np.int16)
    zero_point: Array = numpy_helper.to_array(constants[reader.input[place]]).astype(np.int16)
    attributes = {a.name: a.i for a in reader.attribute}
    axis = attributes.get(along, 1)
    if zero_point.ndim == 1 and zero_point.size > 1:
        sizes = [1] * len(shape)
        sizes[axis] = zero_point.size
        return zero_point.reshape(sizes)
    if zero_point.ndim == len(shape):
        return np.repeat(zero_point, attributes["block_size"], axis=axis).take(range(shape[axis]), axis=axis)
    return zero_point


# --- ExecuTorch ------------------------------------------------------------------------------------------------------


def _executorch(path: Path) -> Iterator[TensorZeros]:
    from edgeopt.formats.executorch import read_program, xnn_flatbuffer
    from edgeopt.formats.executorch_delegate import load_schema

    read_program(path)  # refuses what is corrupt, in a process of its own
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(path.read_bytes())
    program, classes = file.program, load_schema()
    plan = next((plan for plan in program.execution_plan if plan.name == "forward"), program.execution_plan[0])
    yield from _portable(plan.values, program.constant_buffer)
    named = file.named_data
    stored = {k: bytes(named.buffers[entry.buffer_index]) for k, entry in named.pte_data.items()} if named else {}
    names = {value: name for name, value in vars(classes.XNNDatatype).items() if not name.startswith("_")}
    for number, delegate in enumerate(plan.delegates):
        if delegate.id != "XnnpackBackend":
            continue
        blob = bytes(program.backend_delegate_data[delegate.processed.index].data)
        graph = classes.XNNGraphT.InitFromPackedBuf(xnn_flatbuffer(blob), 0)
        for value in graph.xvalues:
            tensor = getattr(value.xvalueUnion, "tensorValue", value.xvalueUnion)
            constant = graph.constantData[int(tensor.constantBufferIdx)] if int(tensor.constantBufferIdx) else None
            if constant is None or constant.namedKey is None or tensor.dims is None or len(tensor.dims) < 2:
                continue
            kind = names[int(tensor.datatype)].removeprefix("xnn_datatype_")
            zero_point = getattr(getattr(value.xvalueUnion, "quantParams", None), "zeroPoint", 0)
            values = _xnnpack_values(kind, stored[constant.namedKey.decode()])
            if values is not None:
                elements, name = int(np.prod(tensor.dims)), f"delegate {number}, value {int(tensor.idOut)}"
                zero = _MIDDLE_OF_4_BITS if kind in _XNNPACK_4_BITS else int(zero_point)
                yield TensorZeros(name, elements, int(np.count_nonzero(values[:elements] == zero)))


def _xnnpack_values(kind: str, data: bytes) -> Array | None:
    """Elements of one of XNNPACK's datatypes; None where it is none of a weight."""
    dtypes = {"fp32": np.float32, "fp16": np.float16, "qint8": np.int8, "qcint8": np.int8, "quint8": np.uint8}
    if kind in _XNNPACK_4_BITS:
        return _nibbles(np.frombuffer(data, np.uint8))
    return np.frombuffer(data, dtypes[kind]) if kind in dtypes else None


def _portable(values: Sequence[EValue], buffers: Sequence[Buffer]) -> Iterator[TensorZeros]:
    """Weights of kernels outside delegates."""
    from executorch.exir.schema import ScalarType, Tensor

    dtypes = {ScalarType.FLOAT: np.float32, ScalarType.HALF: np.float16, ScalarType.CHAR: np.int8}
    for number, value in enumerate(values):
        tensor = value.val
        is_weight = isinstance(tensor, Tensor) and tensor.data_buffer_idx and tensor.allocation_info is None
        if is_weight and len(tensor.sizes) > 1 and tensor.scalar_type in dtypes:
            data = np.frombuffer(bytes(buffers[tensor.data_buffer_idx].storage), dtypes[tensor.scalar_type])
            # What comes after the last element is alignment.
            data = data[: int(np.prod(tensor.sizes))]
            yield TensorZeros(f"value {number}", data.size, int(np.count_nonzero(data == 0)))
