"""What a .tflite file holds, read from its FlatBuffer (schema: tensorflow/compiler/mlir/lite/schema/schema.fbs)."""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from edgeopt.errors import UsageError
from edgeopt.formats.files import mapped, sha256_of
from edgeopt.types import DType, FileSummary, OpInfo, QuantParams, Signature, SignatureTensor

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_IDENTIFIER = b"TFL3"
_INTEGERS = ("int8", "uint8", "int16", "int4")
#: What reading a damaged FlatBuffer can raise: offsets beyond the file, indices beyond a table, texts that are none.
_DAMAGE = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


#: Stands for the outermost module, whose own path is empty, in operators' names.
ROOT = "(root)"
_LITERT_TORCH_NAME = re.compile(r"(?P<scope>[\w<>]+\.[\w<>.]+(?:/[\w<>]+\.[\w<>.]+)*);.*?(?P<number>\d*)")


def layer_of(name: str) -> str:
    """The source layer in an operator's name: what stands before the first ":" (see `OpInfo.name`)."""
    return name.partition(":")[0]


def summarize(path: Path) -> FileSummary:
    """Read one .tflite file without running it.

    Operators are named after their first output tensor: "features.0.conv" or, where a layer has several,
    "features.0.conv:1". `dtype` is the type of that output, or "int8-dynamic" where int8 weights meet float
    activations (the kernel quantizes those as it runs).

    Raises:
        UsageError: the file is not a .tflite file, or it is corrupt or truncated.
    """
    data = mapped(path)
    if data[4:8] != _IDENTIFIER:
        raise UsageError("is not a LiteRT file, or it is truncated", where=str(path), fix="export it again")
    try:
        model = _parse(data)
        ops = tuple(op for graph in model.graphs for op in graph.ops)
        return FileSummary(
            format="litert",
            size_bytes=len(data),
            sha256=sha256_of(path),
            signature=model.signature,
            ops=_with_unique_names(ops),
            metadata=model.metadata,
        )
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=str(path), fix="export it again") from error


@dataclass(frozen=True, slots=True)
class _Tensor:
    """`constant_bytes` is 0 for activations; `shape` has -1 for dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: int
    constant_bytes: int
    quantization: QuantParams | None


@dataclass(frozen=True, slots=True)
class _Graph:
    tensors: tuple[_Tensor, ...]
    ops: tuple[OpInfo, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Model:
    graphs: tuple[_Graph, ...]
    signature: Signature
    metadata: dict[str, str]


def _parse(data: mmap.mmap | bytes) -> _Model:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(data, 0)
    sizes = [_buffer_bytes(model.Buffers(i), len(data)) for i in range(model.BuffersLength())]
    kinds = [_operator_type(model.OperatorCodes(i)) for i in range(model.OperatorCodesLength())]
    tables = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    tensors = [tuple(_tensor(t.Tensors(i), sizes) for i in range(t.TensorsLength())) for t in tables]
    readers = Counter(
        tensors[g][index].buffer
        for g, table in enumerate(tables)
        for i in range(table.OperatorsLength())
        for index in _indices(table.Operators(i).InputsAsNumpy())
    )
    graphs = tuple(
        _Graph(
            tensors=tensors[g],
            ops=tuple(
                _operator(table.Operators(i), kinds, tensors[g], readers) for i in range(table.OperatorsLength())
            ),
            inputs=_indices(table.InputsAsNumpy()),
            outputs=_indices(table.OutputsAsNumpy()),
        )
        for g, table in enumerate(tables)
    )
    if not graphs:
        raise ValueError("no subgraph")
    return _Model(graphs, _signature(model, graphs), _metadata(model, data))


def _indices(vector: object) -> tuple[int, ...]:
    """Tensor indices of an operator or a graph, without the -1 of an omitted optional input."""
    # FlatBuffers gives the number 0 for a vector that is absent.
    return () if isinstance(vector, int) else tuple(int(i) for i in cast("list[int]", vector) if i >= 0)


def _buffer_bytes(buffer: schema.Buffer, file_size: int) -> int:
    if buffer.Offset() > 1:  # Large models keep their weights behind the FlatBuffer.
        if buffer.Offset() + buffer.Size() > file_size:
            raise ValueError("weights beyond the end of the file")
        return int(buffer.Size())
    # Reading the vector, not only its length, shows whether the file still holds all of it.
    return 0 if buffer.DataIsNone() else int(buffer.DataAsNumpy().size)


def _operator_type(code: schema.OperatorCode) -> str:
    from ai_edge_litert import schema_py_generated as schema

    # The second field exists since there are more than 127 operators.
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number == schema.BuiltinOperator.CUSTOM:
        return str(code.CustomCode().decode())
    return _constant_name(schema.BuiltinOperator, number)


def _constant_name(enumeration: type, number: int) -> str:
    for name, value in vars(enumeration).items():
        if not name.startswith("_") and value == number:
            return name
    raise ValueError(f"{enumeration.__name__} has no {number}")


def _tensor(tensor: schema.Tensor, buffer_sizes: list[int]) -> _Tensor:
    from ai_edge_litert import schema_py_generated as schema

    dtype = _constant_name(schema.TensorType, tensor.Type()).lower()
    vector = tensor.ShapeAsNumpy() if tensor.ShapeSignatureIsNone() else tensor.ShapeSignatureAsNumpy()
    shape = () if isinstance(vector, int) else tuple(int(d) for d in vector)
    return _Tensor(
        name=(tensor.Name() or b"").decode(),
        dtype=dtype,
        shape=shape,
        buffer=tensor.Buffer(),
        constant_bytes=buffer_sizes[tensor.Buffer()],
        quantization=_quantization(tensor, dtype),
    )


def _quantization(tensor: schema.Tensor, dtype: str) -> QuantParams | None:
    params = tensor.Quantization()
    if params is None or params.ScaleIsNone() or dtype not in _INTEGERS:
        return None
    scale = tuple(float(s) for s in params.ScaleAsNumpy())
    zeros = (0,) * len(scale) if params.ZeroPointIsNone() else tuple(int(z) for z in params.ZeroPointAsNumpy())
    return QuantParams(scale, zeros, axis=params.QuantizedDimension() if len(scale) > 1 else None)


def _operator(
    operator: schema.Operator, kinds: list[str], tensors: tuple[_Tensor, ...], readers: Counter[int]
) -> OpInfo:
    kind = kinds[operator.OpcodeIndex()]
    inputs = [tensors[i] for i in _indices(operator.InputsAsNumpy())]
    outputs = [tensors[i] for i in _indices(operator.OutputsAsNumpy())]
    return OpInfo(
        name=readable(outputs[0].name) if outputs else "",
        type=kind,
        dtype=_compute_dtype(kind, inputs, outputs),
        delegate=None,
        weight_bytes=sum(t.constant_bytes for t in inputs if readers[t.buffer] == 1),
    )


def _compute_dtype(kind: str, inputs: list[_Tensor], outputs: list[_Tensor]) -> str:
    if not outputs:
        return inputs[0].dtype if inputs else "none"
    dtype = outputs[0].dtype
    weights_are_int8 = any(t.constant_bytes and t.dtype in ("int8", "int4") for t in inputs)
    if dtype == "float32" and weights_are_int8 and kind != "DEQUANTIZE":
        return "int8-dynamic"
    return dtype


def readable(name: str) -> str:
    """A tensor's name with litert-torch's own form reduced to the layer path.

    litert-torch writes "pkg.Net/torch.nn.modules.conv.Conv2d_conv1;2": every part is a class, then the attribute
    under which the parent holds it. Files that edgeopt wrote already have "conv1:2".
    """
    match = _LITERT_TORCH_NAME.fullmatch(name)
    if match is None:
        return f"{ROOT}{name}" if name.startswith(":") else name
    attributes = [part.rpartition(".")[2].partition("_")[2] for part in match["scope"].split("/")]
    suffix = f":{match['number']}" if match["number"] else ""
    return (".".join(a for a in attributes if a) or ROOT) + suffix


def _with_unique_names(ops: tuple[OpInfo, ...]) -> tuple[OpInfo, ...]:
    seen: Counter[str] = Counter()
    named = []
    for op in ops:
        base = op.name or op.type
        name = base
        while seen[name]:
            name = f"{base}:{seen[base]}"
            seen[base] += 1
        seen[name] += 1
        named.append(OpInfo(name, op.type, op.dtype, op.delegate, op.weight_bytes))
    return tuple(named)


def _signature(model: schema.Model, graphs: tuple[_Graph, ...]) -> Signature:
    if not model.SignatureDefsLength():
        graph = graphs[0]
        return Signature(
            tuple(_signature_tensor(graph.tensors[i].name, graph.tensors[i]) for i in graph.inputs),
            tuple(_signature_tensor(graph.tensors[i].name, graph.tensors[i]) for i in graph.outputs),
        )
    definition = model.SignatureDefs(0)
    graph = graphs[definition.SubgraphIndex()]
    tensors = graph.tensors
    # The definition is sorted as text (args_0, args_1, args_10, ...); LiteRT numbers them as the graph does.
    inputs = sorted(
        (definition.Inputs(i) for i in range(definition.InputsLength())),
        key=lambda entry: graph.inputs.index(entry.TensorIndex()),
    )
    outputs = sorted(
        (definition.Outputs(i) for i in range(definition.OutputsLength())),
        key=lambda entry: graph.outputs.index(entry.TensorIndex()),
    )
    return Signature(
        tuple(_signature_tensor(entry.Name().decode(), tensors[entry.TensorIndex()]) for entry in inputs),
        tuple(_signature_tensor(entry.Name().decode(), tensors[entry.TensorIndex()]) for entry in outputs),
    )


def _signature_tensor(name: str, tensor: _Tensor) -> SignatureTensor:
    if tensor.dtype not in get_args(DType):
        raise UsageError(f"has the type {tensor.dtype}, which edgeopt can't feed", where=f"tensor {name!r}")
    dtype = cast("DType", tensor.dtype)
    return SignatureTensor(
        name=name,
        native_name=name,
        shape=tuple(d if d >= 0 else f"{name}_dim{axis}" for axis, d in enumerate(tensor.shape)),
        dtype=dtype,
        model_dtype="float32" if tensor.quantization else dtype,
        quantization=tensor.quantization,
    )


def _metadata(model: schema.Model, data: mmap.mmap | bytes) -> dict[str, str]:
    entries = {"schema_version": str(model.Version()), "description": (model.Description() or b"").decode()}
    if model.SignatureDefsLength():
        entries["signature"] = model.SignatureDefs(0).SignatureKey().decode()
    for i in range(model.MetadataLength()):
        entry = model.Metadata(i)
        buffer = model.Buffers(entry.Buffer())
        if buffer.Offset() > 1:
            content = data[buffer.Offset() : buffer.Offset() + buffer.Size()]
        else:
            content = b"" if buffer.DataIsNone() else buffer.DataAsNumpy().tobytes()
        text = content.rstrip(b"\0").decode("ascii", errors="replace")
        entries[entry.Name().decode()] = (
            text if text.isprintable() and "\ufffd" not in text else f"{len(content)} bytes"
        )
    return entries
