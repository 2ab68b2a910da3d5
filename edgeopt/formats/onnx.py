"""What an .onnx file holds, read without running it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from edgeopt.errors import UsageError
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.types import DType, FileSummary, OpInfo, QuantParams, Signature, SignatureTensor

if TYPE_CHECKING:
    import onnx

# Measured on ONNX Runtime 1.31 (CPU): what becomes one integer kernel between DequantizeLinear and QuantizeLinear.
#: Arithmetic that has an int8 kernel; every input dequantized, the output quantized.
INT8_ARITHMETIC = frozenset(
    {"Conv", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool"}
)
#: Matrix products, whose int8 kernels may also return float.
INT8_PRODUCTS = frozenset({"MatMul", "Gemm"})
#: Operators that only move, pick or clip values: they run on integers as well as on floats.
MOVEMENT = frozenset(
    {
        "MaxPool", "ReduceMax", "ReduceMin", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice",
        "Split", "Expand", "Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth", "Tile", "Pad",
        "Identity", "Cast", "Where", "Relu", "Clip",
    }
)  # fmt: skip
#: Integer operators that take quantized tensors directly.
INTEGER_TYPES: Mapping[str, str] = {
    "MatMulInteger": "int8", "ConvInteger": "int8", "QLinearConv": "int8", "QLinearMatMul": "int8",
    "DynamicQuantizeMatMul": "int8", "MatMulIntegerToFloat": "int8", "QGemm": "int8", "QLinearAdd": "int8",
    "QLinearMul": "int8", "QLinearConcat": "int8", "QLinearSigmoid": "int8", "QLinearLeakyRelu": "int8",
    "QLinearSoftmax": "int8", "QLinearAveragePool": "int8", "QLinearGlobalAveragePool": "int8", "MatMulNBits": "int4",
}  # fmt: skip
#: What weights of weight-only schemes are decoded by. ONNX Runtime does it once, when it loads the file.
DECODERS = frozenset(
    {"DequantizeLinear", "Cast", "Sub", "Mul", "Gather", "GatherElements", "Reshape", "Slice", "Transpose"}
)
#: Operators that change a tensor between real and quantized.
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def summarize(path: Path) -> FileSummary:
    """Read one .onnx file; weights in external files are counted, not opened. Raises UsageError when it is corrupt."""
    model = load(path, weights=False)
    return FileSummary(
        format="onnx",
        size_bytes=size_of(path),
        sha256=sha256_of(path),
        signature=read_signature(model),
        ops=tuple(read_ops(model)),
        metadata=_metadata(model),
    )


def load(path: Path, weights: bool = True) -> onnx.ModelProto:
    """Parse a file. Raises UsageError when it is not ONNX, has no graph, or its weights are missing."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=weights)
    except DecodeError as error:
        raise UsageError("is not an ONNX file, or is cut short", where=str(path)) from error
    except (OSError, onnx.checker.ValidationError) as error:
        raise UsageError(f"its weights can't be read: {_first_line(error)}", where=str(path)) from error
    if not model.graph.node and not model.graph.output:
        raise UsageError("is not an ONNX file: it holds no graph", where=str(path))
    return model


def source_layer(node: onnx.NodeProto) -> str:
    """Path of the module that a node comes from ("features.0.conv"); "" when unknown or the outermost module.

    In torch's dynamo exports the path is in the node's metadata. Other files are read by their node names, with "/"
    between scopes: ours are "features.0.conv/Conv", TorchScript's "/features/features.0/features.0.conv/Conv".
    """
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                break
            # The last entry is the operator's own name, the one before it the innermost module, or a marker for none.
            layer = str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
            return "" if layer.startswith("_empty_nn_module_stack") else layer
    path = ""
    for scope in node.name.strip("/").split("/")[:-1]:
        path = scope if not path or scope.startswith(f"{path}.") else f"{path}.{scope}"
    return path


def layer_names(node: onnx.NodeProto) -> tuple[str, ...]:
    """What a user may call a node's layer: its scope, or where it has none ("Conv_0"), its own name, also as torch
    spells it once the graph is rebuilt there."""
    layer = source_layer(node)
    own = node.name.strip("/")
    return (layer,) if layer else ("", own, as_attribute(own))


def as_attribute(name: str) -> str:
    """A node's name as the layer that it becomes where the graph is rebuilt in torch."""
    plain = re.sub(r"\W+", "_", name).strip("_")
    return f"n{plain}" if plain[:1].isdigit() else plain


def read_signature(model: onnx.ModelProto) -> Signature:
    """Inputs and outputs; a uint8/int8 one next to a DequantizeLinear/QuantizeLinear is described as quantized."""
    constants = {i.name: i for i in model.graph.initializer}
    decoders = {n.input[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    encoders = {n.output[0]: n for n in model.graph.node if n.op_type == "QuantizeLinear"}
    inputs = [i for i in model.graph.input if i.name not in constants]
    return Signature(
        inputs=tuple(_signature_tensor(i, decoders.get(i.name), constants) for i in inputs),
        outputs=tuple(_signature_tensor(o, encoders.get(o.name), constants) for o in model.graph.output),
    )


def _signature_tensor(
    info: onnx.ValueInfoProto, converter: onnx.NodeProto | None, constants: Mapping[str, onnx.TensorProto]
) -> SignatureTensor:
    dtype = type_name(info.type.tensor_type.elem_type)
    if dtype not in get_args(DType):
        raise UsageError(f"has the element type {dtype}, which edgeopt does not handle", where=f"tensor {info.name!r}")
    quantization = None
    if dtype in ("int8", "uint8") and converter is not None and converter.input[1] in constants:
        quantization = _quantization(converter, constants)
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"dim{i}"
        for i, d in enumerate(info.type.tensor_type.shape.dim)
    )
    checked = cast(DType, dtype)
    return SignatureTensor(
        name=info.name,
        native_name=info.name,
        shape=shape,
        dtype=checked,
        model_dtype="float32" if quantization is not None else checked,
        quantization=quantization,
    )


def _quantization(converter: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> QuantParams:
    from onnx import numpy_helper

    scale = numpy_helper.to_array(constants[converter.input[1]]).reshape(-1)
    zero_point = [0] * scale.size
    if len(converter.input) > 2 and converter.input[2] in constants:
        zero_point = [int(z) for z in numpy_helper.to_array(constants[converter.input[2]]).reshape(-1)]
    return QuantParams(scale=tuple(float(s) for s in scale), zero_point=tuple(zero_point))


def read_ops(model: onnx.ModelProto) -> Iterator[OpInfo]:
    """The graph's operators in order; constants and the decoding of quantized constants belong to their readers."""
    graph = model.graph
    constants = _constant_bytes(graph)
    decoded = _decoded(graph, constants)
    readers = Counter(name for node in graph.node for name in set(node.input))
    types = tensor_types(model)
    makers = {o: n for n in graph.node for o in n.output}
    encoded = {n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    seen: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Constant" or node.output[0] in decoded:
            continue
        yield OpInfo(
            name=_unique(_op_name(node), seen),
            type=node.op_type,
            dtype=_compute_type(node, types, makers, encoded, constants),
            delegate=None,
            weight_bytes=sum(constants[name] for name in _own_constants(node, decoded, readers) if name in constants),
        )


def _decoded(graph: onnx.GraphProto, constants: Mapping[str, int]) -> dict[str, onnx.NodeProto]:
    """Tensors that are decoded from constants alone, by the node that makes each."""
    outputs = {o.name for o in graph.output}
    found: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        decodes = node.op_type in DECODERS and node.output[0] not in outputs
        if decodes and inputs and all(name in constants or name in found for name in inputs):
            found[node.output[0]] = node
    return found


def _own_constants(
    node: onnx.NodeProto, decoded: Mapping[str, onnx.NodeProto], readers: Mapping[str, int]
) -> Iterator[str]:
    """What no other node reads of a node's inputs, and of what they are decoded from."""
    for name in dict.fromkeys(node.input):
        if readers[name] == 1:
            yield name
            if name in decoded:
                yield from _own_constants(decoded[name], decoded, readers)


def _compute_type(
    node: onnx.NodeProto,
    types: Mapping[str, str],
    makers: Mapping[str, onnx.NodeProto],
    encoded: set[str],
    constants: Mapping[str, int],
) -> str:
    if node.op_type == "MatMulNBits":
        return f"int{next((a.i for a in node.attribute if a.name == 'bits'), 4)}"
    if node.op_type in INTEGER_TYPES:
        return INTEGER_TYPES[node.op_type]
    if node.op_type in CONVERSIONS:
        return _width([node.output[0], node.input[0]], types)
    data = [name for name in node.input if name and types.get(name) in ("float32", "float16")]
    results = [types[name] for name in node.output if name in types]
    # Shape, IsNaN, Greater... look at reals and compute none.
    if data and (not results or any(kind in ("float32", "float16") for kind in results)):
        decoders = [makers.get(name) for name in data if name not in constants]
        ready = all(decoder is not None and decoder.op_type == "DequantizeLinear" for decoder in decoders)
        ready = ready and (node.op_type in MOVEMENT or not any(name in constants for name in data))
        whole = node.op_type in INT8_ARITHMETIC | MOVEMENT | {"Resize"} and all(o in encoded for o in node.output)
        if ready and (whole or node.op_type in INT8_PRODUCTS):
            return _width([decoder.input[0] for decoder in decoders if decoder is not None], types)
        return types[data[0]]
    kinds = [*results, *(types[name] for name in node.input if name in types)]
    return kinds[0] if kinds else "unknown"


def _width(stored: Sequence[str], types: Mapping[str, str]) -> str:
    """ "int16" where a quantized tensor has that many bits, signed or not."""
    return "int16" if any(types.get(name) in ("int16", "uint16") for name in stored) else "int8"


def _op_name(node: onnx.NodeProto) -> str:
    # A dynamo export's node names are serial numbers; its metadata knows the layer.
    if any(entry.key == "pkg.torch.onnx.name_scopes" for entry in node.metadata_props):
        layer = source_layer(node)
        return f"{layer}/{node.op_type}" if layer else node.op_type
    return node.name or node.op_type


def _unique(name: str, seen: dict[str, int]) -> str:
    count = seen[name] = seen.get(name, -1) + 1
    return f"{name}_{count}" if count else name


def _constant_bytes(graph: onnx.GraphProto) -> dict[str, int]:
    sizes = {i.name: _tensor_bytes(i.data_type, i.dims) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            sizes[node.output[0]] = sum(
                _tensor_bytes(a.t.data_type, a.t.dims) for a in node.attribute if a.HasField("t")
            )
    return sizes


def _tensor_bytes(data_type: int, dims: Sequence[int]) -> int:
    import math

    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (math.prod(dims) + 1) // 2
    if data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        return 0
    return math.prod(dims) * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def tensor_types(model: onnx.ModelProto) -> dict[str, str]:
    """Element type by tensor name, inferred; tensors behind operators unknown to ONNX are absent."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (onnx.shape_inference.InferenceError, ValueError):
        graph = model.graph  # over 2 GiB, or ill-typed: what the file itself declares has to do
    infos = (*graph.value_info, *graph.input, *graph.output)
    types = {v.name: type_name(v.type.tensor_type.elem_type) for v in infos if v.type.HasField("tensor_type")}
    return types | {i.name: type_name(i.data_type) for i in graph.initializer}


def type_name(elem_type: int) -> str:
    """ONNX element type -> NumPy's name for it ("float32"), or ONNX's own in lower case where NumPy has none."""
    import onnx

    names: dict[int, str] = {value: name.lower() for name, value in onnx.TensorProto.DataType.items()}
    name = names.get(elem_type, "unknown")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    opsets = {f"opset{':' if o.domain else ''}{o.domain}": str(o.version) for o in model.opset_import}
    producer = f"{model.producer_name} {model.producer_version}".strip()
    own = {entry.key: entry.value for entry in model.metadata_props}
    return {**own, **opsets, "producer": producer, "ir_version": str(model.ir_version)}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
