"""What a .pte file holds: its portable kernel calls and the operators inside each XNNPACK delegate.

Both layers are flatbuffers. ExecuTorch's wheel ships their schemas and the flatbuffer compiler, which turns them into
JSON in a process of its own: nothing here imports torch, runs the model, or can be crashed by a corrupt file.
"""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeopt.errors import MissingError, UsageError
from edgeopt.formats.executorch_layers import KEY, Layers, decode
from edgeopt.formats.files import mapped, sha256_of, size_of
from edgeopt.types import DType, FileSummary, OpInfo, Signature, SignatureTensor

_Json = Mapping[str, Any]

_SCALAR_TYPES: dict[str, DType] = {
    "BYTE": "uint8",
    "CHAR": "int8",
    "SHORT": "int16",
    "INT": "int32",
    "LONG": "int64",
    "HALF": "float16",
    "FLOAT": "float32",
    "BOOL": "bool",
}
_XNN_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "pfp32": "float32", "int32": "int32"}

#: flatc writes non-finite floats bare, which JSON does not know; Python's parser takes these spellings.
_NON_FINITE = re.compile(r"(?<=[:\[,])(\s*)([+-]?)(inf|nan)(?=\s*[,\]}])")
_PYTHON_SPELLING = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN", "-nan": "NaN"}
_FLATC_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ProgramOp:
    """An operator with the handles by which an exporter finds the source layer.

    Attributes:
        info: as `summarize` shows it.
        instruction: index of the instruction in the method that runs it (delegated operators share their block's).
        debug_handle: ExecuTorch's handle of the source node, inside a delegate; None for portable kernels.
        layer: path of the source layer; "" where the file does not say.
        inputs, outputs: element types, in order; constants included.
    """

    info: OpInfo
    instruction: int
    debug_handle: int | None
    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One parsed method of a .pte file. `methods` names all of them."""

    version: int
    method: str
    methods: tuple[str, ...]
    signature: Signature
    ops: tuple[ProgramOp, ...]
    delegates: tuple[str, ...]


def summarize(path: Path) -> FileSummary:
    """Read a .pte file. Raises UsageError when it is corrupt, MissingError when ExecuTorch is not installed."""
    program = read_program(path)
    delegated = Counter(program.delegates)
    metadata = {"method": program.method, "methods": ", ".join(program.methods), "schema": str(program.version)}
    metadata |= {f"delegated blocks: {name}": str(count) for name, count in sorted(delegated.items())}
    return FileSummary(
        format="executorch",
        size_bytes=size_of(path),
        sha256=sha256_of(path),
        signature=program.signature,
        ops=tuple(op.info for op in program.ops),
        metadata=metadata,
    )


def read_program(path: Path) -> Program:
    """The operators with their handles; same errors as `summarize`."""
    return _parse(mapped(path), path)


def _parse(data: mmap.mmap | bytes, path: Path) -> Program:
    try:
        return Reader(data).program()
    except (ValueError, LookupError, TypeError, AttributeError, subprocess.SubprocessError) as error:
        raise UsageError(
            "is not a readable ExecuTorch program", where=str(path), fix="export it again; it may be cut short"
        ) from error


# --- flatbuffers to JSON ---------------------------------------------------------------------------------------------


def executorch_root() -> Path:
    """Where the executorch package lies. Raises MissingError."""
    spec = find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("reading .pte files needs the package 'executorch'", fix="pip install executorch")
    return Path(next(iter(spec.submodule_search_locations)))


def find_flatc(root: Path) -> Path:
    """The flatbuffer compiler in an executorch package. Raises MissingError."""
    flatc = next((p for p in (root / "data" / "bin").glob("flatc*") if p.is_file()), None)
    if flatc is None:
        raise MissingError("this build of executorch lacks the flatbuffer compiler", fix="pip install executorch>=1.5")
    return flatc


def _decode(buffers: Sequence[bytes], schema: str) -> list[_Json]:
    """Flatbuffers of one schema, as JSON values. `schema` is relative to the executorch package."""
    root = executorch_root()
    flatc = find_flatc(root)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        files = [directory / f"{i}.bin" for i in range(len(buffers))]
        for file, buffer in zip(files, buffers, strict=True):
            file.write_bytes(buffer)
        flags = ["--json", "--strict-json", "--defaults-json", "--raw-binary"]
        command = [str(flatc), *flags, "-o", str(directory), str(root / schema), "--", *map(str, files)]
        subprocess.run(command, check=True, capture_output=True, timeout=_FLATC_SECONDS)
        return [_load(file.with_suffix(".json").read_text("utf-8", "replace")) for file in files]


def _load(text: str) -> _Json:
    def spell(match: re.Match[str]) -> str:
        return match[1] + _PYTHON_SPELLING[match[2].replace("+", "") + match[3]]

    value = json.loads(_NON_FINITE.sub(spell, text))
    if not isinstance(value, dict):
        raise ValueError("a flatbuffer without a table")
    return value


# --- the program -----------------------------------------------------------------------------------------------------


class Reader:
    """Reads one file. The layout is ExecuTorch's schema/program.fbs and its extended header (schema/README)."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        if data[4:6] != b"ET":
            raise ValueError("not an ExecuTorch program")
        has_header = data[8:12] == b"eh00"
        size = int.from_bytes(data[16:24], "little") if has_header else len(data)
        self._segments_at = int.from_bytes(data[24:32], "little") if has_header else len(data)
        if size > len(data) or self._segments_at > len(data):
            raise ValueError("the header points past the end of the file")
        self._data = data
        self.root = _decode([data[:size]], "exir/_serialize/program.fbs")[0]
        self._counts: Counter[str] = Counter()
        self._layers = self._read_layers()

    def program(self) -> Program:
        plans = self.root["execution_plan"]
        plan = next((p for p in plans if p["name"] == "forward"), plans[0])
        values = [v.get("val") or {} for v in plan["values"]]
        signature = Signature(
            inputs=tuple(_tensor(values[v], f"input_{i}") for i, v in enumerate(plan["inputs"])),
            outputs=tuple(_tensor(values[v], f"output_{i}") for i, v in enumerate(plan["outputs"])),
        )
        return Program(
            version=int(self.root["version"]),
            method=plan["name"],
            methods=tuple(p["name"] for p in plans),
            signature=signature,
            ops=tuple(self._ops(plan, values)),
            delegates=tuple(d["id"] for d in plan.get("delegates", [])),
        )

    def _read_layers(self) -> Layers:
        for entry in self.root.get("named_data") or []:
            if entry["key"] == KEY:
                return decode(self._segment(entry["segment_index"]))
        return {}

    def _ops(self, plan: _Json, values: Sequence[_Json]) -> list[ProgramOp]:
        blobs = self.delegate_graphs(plan.get("delegates", []))
        constants = self._constant_sizes()
        readers = Counter(
            values[arg].get("data_buffer_idx", 0)
            for chain in plan["chains"]
            for instruction in chain["instructions"]
            if instruction["instr_args_type"] == "KernelCall"
            for arg in set(instruction["instr_args"]["args"])
            if _is_constant(values[arg])
        )
        ops: list[ProgramOp] = []
        for chain in plan["chains"]:
            for index, instruction in enumerate(chain["instructions"]):
                kind, args = instruction["instr_args_type"], instruction["instr_args"]
                if kind == "KernelCall":
                    operator = plan["operators"][args["op_index"]]
                    tensors = [values[a] for a in args["args"] if "scalar_type" in values[a]]
                    buffers = {t["data_buffer_idx"] for t in tensors if _is_constant(t)}
                    owned = sum(constants[b] for b in buffers if readers[b] == 1 and b < len(constants))
                    ops.append(self._kernel_call(operator, tensors, index, owned))
                elif kind == "DelegateCall":
                    delegate = args["delegate_index"]
                    ops += self._delegate_ops(plan["delegates"][delegate]["id"], blobs[delegate], index)
        return ops

    def _kernel_call(self, operator: _Json, tensors: Sequence[_Json], index: int, owned: int) -> ProgramOp:
        type_ = operator["name"].replace("::", ".")
        if operator.get("overload"):
            type_ += f".{operator['overload']}"
        types = tuple(_SCALAR_TYPES.get(t["scalar_type"], t["scalar_type"].lower()) for t in tensors)
        # Portable kernels take their result as the last tensor argument (an out-variant repeats it).
        dtype = types[-1] if types else "none"
        layer = self._layers.get(index, "")
        info = OpInfo(name=self._name(type_, layer), type=type_, dtype=dtype, delegate=None, weight_bytes=owned)
        return ProgramOp(info, index, None, layer, inputs=types[:-1], outputs=types[-1:])

    def _delegate_ops(self, delegate: str, graph: _Json | None, index: int) -> list[ProgramOp]:
        if graph is None:  # a delegate whose contents only its vendor can read
            info = OpInfo(name=self._name(delegate), type=delegate, dtype="unknown", delegate=delegate, weight_bytes=0)
            return [ProgramOp(info, index, None, "", (), ())]
        tensors = {v["id_out"]: v for v in map(xnn_tensor, graph["xvalues"])}
        readers = Counter(buffer for node in graph["xnodes"] for buffer in _xnn_constants(node, tensors))
        ops = []
        for node in graph["xnodes"]:
            type_ = node["xnode_union_type"].removeprefix("XNN")
            inputs = tuple(_xnn_type(tensors[i]) for i in xnn_ids(node, inputs=True) if i in tensors)
            outputs = tuple(_xnn_type(tensors[i]) for i in xnn_ids(node, inputs=False) if i in tensors)
            owned = sum(
                int(graph["constant_data"][b]["size"]) for b in _xnn_constants(node, tensors) if readers[b] == 1
            )
            # A conversion computes in neither type; it is named after what it makes.
            dtype = outputs[0] if type_ == "Convert" or not inputs else inputs[0]
            handle = int(node["debug_handle"])
            layer = self._layers.get((index, handle), "")
            name = self._name(type_, layer)
            info = OpInfo(name=name, type=type_, dtype=dtype, delegate="XNNPACK", weight_bytes=owned)
            ops.append(ProgramOp(info, index, handle, layer, inputs, outputs))
        return ops

    def delegate_graphs(self, delegates: Sequence[_Json]) -> list[_Json | None]:
        """The serialized graph of each XNNPACK delegate, None for others."""
        wanted = [i for i, delegate in enumerate(delegates) if delegate["id"] == "XnnpackBackend"]
        blobs = [xnn_flatbuffer(self._delegate_bytes(delegates[i]["processed"])) for i in wanted]
        decoded = _decode(blobs, "backends/xnnpack/serialization/schema.fbs") if blobs else []
        graphs: list[_Json | None] = [None] * len(delegates)
        for i, graph in zip(wanted, decoded, strict=True):
            graphs[i] = graph
        return graphs

    def _delegate_bytes(self, reference: _Json) -> bytes:
        if reference["location"] == "INLINE":
            return bytes(self.root["backend_delegate_data"][reference["index"]]["data"])
        return self._segment(reference["index"])

    def _segment(self, index: int) -> bytes:
        segment = self.root["segments"][index]
        start = self._segments_at + int(segment["offset"])
        end = start + int(segment["size"])
        if end > len(self._data):
            raise ValueError("a segment ends past the end of the file")
        return self._data[start:end]

    def _constant_sizes(self) -> list[int]:
        """Bytes of each constant buffer, alignment included; index 0 stands for "not constant"."""
        constant = self.root.get("constant_segment")
        if not constant or not constant.get("offsets"):
            return [len(buffer.get("storage", [])) for buffer in self.root.get("constant_buffer", [])]
        ends = [*constant["offsets"][1:], int(self.root["segments"][constant["segment_index"]]["size"])]
        return [int(end) - int(start) for start, end in zip(constant["offsets"], ends, strict=True)]

    def _name(self, type_: str, layer: str = "") -> str:
        number = self._counts[type_]
        self._counts[type_] += 1
        return f"{layer}/{type_}_{number}" if layer else f"{type_}_{number}"


def _tensor(value: _Json, name: str) -> SignatureTensor:
    """An input or output. The file keeps upper bounds of dynamic shapes only: "<=8" stands for such a dimension."""
    if "scalar_type" not in value:  # a plain number
        return SignatureTensor(name=name, native_name=name, shape=(), dtype="int64", model_dtype="int64")
    dtype = _SCALAR_TYPES[value["scalar_type"]]
    dynamic = value.get("shape_dynamism", "STATIC") != "STATIC"
    shape = tuple(f"<={size}" if dynamic and size > 1 else int(size) for size in value.get("sizes", []))
    return SignatureTensor(name=name, native_name=name, shape=shape, dtype=dtype, model_dtype=dtype)


def _is_constant(value: _Json) -> bool:
    return bool(value.get("data_buffer_idx")) and not value.get("allocation_info")


# --- XNNPACK's graph (backends/xnnpack/serialization/schema.fbs) ------------------------------------------------------


def xnn_flatbuffer(blob: bytes) -> bytes:
    """The flatbuffer inside a delegate blob, whose header ("XH00") says where it starts and ends."""
    if blob[4:8] != b"XH00":
        return blob
    start, size = int.from_bytes(blob[10:14], "little"), int.from_bytes(blob[14:18], "little")
    if start + size > len(blob) or not size:
        raise ValueError("a delegate's graph ends past its blob")
    return blob[start : start + size]


def xnn_tensor(value: _Json) -> _Json:
    union: _Json = value["xvalue_union"]
    return union["tensor_value"] if value["xvalue_union_type"] == "XNNQuantizedTensorValue" else union


def _xnn_type(tensor: _Json) -> str:
    name = str(tensor["datatype"]).removeprefix("xnn_datatype_")
    if name in _XNN_TYPES:
        return _XNN_TYPES[name]
    bits = re.search(r"(u?int)(\d+)$", name)
    return bits[0] if bits else name


XNN_INVALID = 0xFFFFFFFF


def xnn_ids(node: _Json, *, inputs: bool) -> list[int]:
    fields: _Json = node["xnode_union"]
    keys = [key for key in fields if key.endswith("_id") and (key.startswith("output") is not inputs)]
    return [int(fields[key]) for key in keys if int(fields[key]) != XNN_INVALID]


def _xnn_constants(node: _Json, tensors: Mapping[int, _Json]) -> set[int]:
    indices = {int(tensors[i]["constant_buffer_idx"]) for i in xnn_ids(node, inputs=True) if i in tensors}
    return indices - {0}
