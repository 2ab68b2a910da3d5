"""Work per operator of a .pte file: what XNNPACK runs of it, and the portable kernels around."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeopt.formats.executorch import ProgramOp, Reader, read_program, xnn_ids, xnn_tensor
from edgeopt.formats.executorch_kinds import PORTABLE_MOVEMENT
from edgeopt.prediction.work import Arithmetic, FileWork, Kind, OpWork

_Json = Mapping[str, Any]

#: Beyond this share of the multiply-accumulates, portable kernels decide the time, and no figure tells theirs.
_PORTABLE_SHARE = 0.02
_PORTABLE_PRODUCTS = {"aten.convolution", "aten.addmm", "aten.mm", "aten.bmm", "aten.linear", "aten.baddbmm"}
_FREE = {"executorch_prim.et_view", "aten.alias_copy", "aten.detach_copy"}
_TABLES = {"aten.embedding", "aten.index_select", "aten.gather", "aten.index"}
_BYTES = {"FLOAT": 4, "INT": 4, "HALF": 2, "BFLOAT16": 2, "SHORT": 2, "LONG": 8, "DOUBLE": 8}
_KINDS: dict[Kind, set[str]] = {
    "conv": {"Conv2d", "ConvTranspose2d"},
    "depthwise": {"DepthwiseConv2d"},
    "matmul": {"FullyConnected", "BatchMatrixMultiply", "ScaledDotProductAttention"},
    "pool": {"AvgPooling2d", "MaxPooling2d", "GlobalAvgPooling2d", "ArgMaxPooling2d"},
    "elementwise": {
        "Add", "Add2", "Subtract", "Multiply", "Multiply2", "Div", "Divide", "Minimum", "Maximum", "Clamp", "ReLU",
        "LeakyReLU", "PReLU", "Hardswish", "HardSwish", "Abs", "Negate", "Square", "SquaredDifference", "Floor",
        "Ceiling", "BankersRounding", "Convert", "StaticResizeBilinear2D",
    },
    "transcendental": {
        "Softmax", "Sigmoid", "Tanh", "ELU", "Gelu", "Exp", "Log", "SquareRoot", "SquareRootPad",
        "ReciprocalSquareRoot", "Sin", "Cos",
    },
    "movement": {"StaticTranspose", "StaticSlice", "StaticConstantPad", "Copy"},
    "free": {"StaticReshape"},
}  # fmt: skip
_KIND_OF: Mapping[str, Kind] = {name: kind for kind, names in _KINDS.items() for name in names}


def count(path: Path) -> FileWork:
    """See `edgeopt.prediction.count.count`. Dynamic dimensions count at their upper bounds."""
    program = read_program(path)  # refuses what is corrupt
    foreign = sorted({name for name in program.delegates if name != "XnnpackBackend"})
    if foreign:
        reason = f"hands work to {', '.join(foreign)}, of which no CPU figure tells anything"
        return FileWork((), delegates=tuple(foreign), unsupported=reason)
    ops = tuple(_works(Reader(path.read_bytes()), program.ops, program.method))
    dynamic = tuple(
        f"{tensor.name}: {'x'.join(str(d) for d in tensor.shape)}"
        for tensor in program.signature.inputs
        if any(isinstance(d, str) for d in tensor.shape)
    )
    products = sum(op.macs for op in ops if op.kind in ("conv", "depthwise", "matmul"))
    portable = sum(op.macs for op in ops if op.kind == "matmul" and op.type.startswith("aten."))
    if portable > _PORTABLE_SHARE * products:
        reason = (
            f"does {portable / products:.0%} of its multiplications in portable kernels, which no figure is known of"
        )
        return FileWork(ops, dynamic, unsupported=reason)
    return FileWork(ops, dynamic)


def _works(reader: Reader, listed: Sequence[ProgramOp], method: str) -> Iterator[OpWork]:
    """The same operators in the same order as `read_program` lists them, with shapes."""
    plan = next(p for p in reader.root["execution_plan"] if p["name"] == method)
    values = [v.get("val") or {} for v in plan["values"]]
    graphs = reader.delegate_graphs(plan.get("delegates", []))
    names = iter(listed)
    for chain in plan["chains"]:
        for instruction in chain["instructions"]:
            arguments = instruction["instr_args"]
            if instruction["instr_args_type"] == "KernelCall":
                tensors = [values[a] for a in arguments["args"] if "scalar_type" in values[a]]
                yield _portable(next(names), tensors)
            elif instruction["instr_args_type"] == "DelegateCall":
                graph = graphs[arguments["delegate_index"]]
                if graph is not None:
                    tensors_by_id = {v["id_out"]: v for v in map(xnn_tensor, graph["xvalues"])}
                    for node in graph["xnodes"]:
                        yield _delegated(next(names), node, tensors_by_id, graph["constant_data"])


def _delegated(op: ProgramOp, node: _Json, tensors: Mapping[int, _Json], constants: Sequence[_Json]) -> OpWork:
    type_ = op.info.type
    kind = _kind(type_)
    reads = [tensors[i] for i in xnn_ids(node, inputs=True) if i in tensors]
    writes = [tensors[i] for i in xnn_ids(node, inputs=False) if i in tensors]
    stored = [t for t in reads if t["constant_buffer_idx"]]
    activations = [t for t in reads if not t["constant_buffer_idx"]]
    macs = channels = 0
    if kind == "pool":
        macs = sum(_elements(t["dims"]) for t in activations)
    elif kind in ("conv", "depthwise", "matmul"):
        macs, channels = _macs(type_, reads, writes[0], int(node["xnode_union"].get("flags", 0)))
    return OpWork(
        name=op.info.name,
        type=type_,
        kind=kind,
        arithmetic=_arithmetic(op.inputs[0] if op.inputs else op.info.dtype),
        macs=macs,
        channels=channels,
        elements=sum(_elements(t["dims"]) for t in writes),
        weight_bytes=sum(int(constants[t["constant_buffer_idx"]]["size"]) for t in stored),
        activation_bytes=sum(_elements(t["dims"]) * _width(t) for t in (*activations, *writes)),
    )


def _kind(type_: str) -> Kind:
    if type_.startswith(("Concatenate", "EvenSplit", "StaticExpandDims")):
        return "movement"
    return _KIND_OF.get(type_, "unknown")


def _macs(type_: str, reads: Sequence[_Json], output: _Json, flags: int) -> tuple[int, int]:
    """Multiply-accumulates, and output channels."""
    left, dims = reads[0]["dims"], output["dims"]
    if type_ == "ScaledDotProductAttention":
        # queries x keys, then weights x values: (batch, heads, queries, depth), (batch, heads, keys, depth).
        return 2 * _elements(left) * int(reads[1]["dims"][-2]), int(dims[-1])
    kernel = reads[1]["dims"]
    if type_ == "Conv2d":
        return _elements(dims) * _elements(kernel[1:]), int(dims[-1])
    if type_ == "DepthwiseConv2d":
        return _elements(dims) * _elements(kernel[1:3]), int(dims[-1])
    if type_ == "ConvTranspose2d":
        return _elements(left) * _elements(kernel[:3]), int(dims[-1])
    if type_ == "BatchMatrixMultiply":
        return _elements(dims) * int(left[-1]), int(dims[-1])
    transposed = flags & 1  # XNN_FLAG_TRANSPOSE_WEIGHTS: (inputs, outputs) instead of (outputs, inputs)
    depth = int(kernel[0] if transposed else kernel[-1])
    return _elements(dims) * depth, int(dims[-1])


def _portable(op: ProgramOp, tensors: Sequence[_Json]) -> OpWork:
    """A kernel of plain C++, one value at a time: as slow as exponentials are elsewhere."""
    base = re.sub(r"\.\w+$", "", op.info.type) if op.info.type.count(".") > 1 else op.info.type
    outputs = tensors[-1:]
    # An out-variant lists its result twice.
    reads = [t for t in tensors[:-1] if t is not tensors[-1]]
    stored = [t for t in reads if t.get("data_buffer_idx") and not t.get("allocation_info")]
    activations = [t for t in reads if not any(t is s for s in stored)]
    written = sum(_elements(t["sizes"]) for t in outputs)
    kind: Kind = "free" if base in _FREE else "movement" if base in PORTABLE_MOVEMENT | _TABLES else "transcendental"
    macs = 0
    if base in _PORTABLE_PRODUCTS and reads:
        kind = "matmul"
        depth = _elements(reads[1]["sizes"][1:]) if base == "aten.convolution" else int(reads[-1]["sizes"][0])
        macs = written * depth
    moved = [*outputs, *outputs] if base in _TABLES else [*activations, *outputs]
    return OpWork(
        name=op.info.name,
        type=op.info.type,
        kind=kind,
        arithmetic="fp32",
        macs=macs,
        channels=0,
        elements=written,
        weight_bytes=0 if base in _TABLES else sum(_sized(t) for t in stored),
        activation_bytes=sum(_sized(t) for t in moved),
    )


def _sized(value: _Json) -> int:
    return _elements(value["sizes"]) * _BYTES.get(value["scalar_type"], 1)


def _elements(dims: Sequence[Any]) -> int:
    return math.prod(int(d) for d in dims)


def _width(tensor: _Json) -> int:
    name = str(tensor["datatype"])
    return 4 if "32" in name else 2 if "16" in name else 1


def _arithmetic(dtype: str) -> Arithmetic:
    if dtype in ("int8", "uint8"):
        return "int8"
    return "fp16" if dtype == "float16" else "fp32"
