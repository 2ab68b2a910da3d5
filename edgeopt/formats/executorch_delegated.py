"""What is inside the Vulkan and Core ML delegates of a .pte file, read without the vendors' runtimes.

A Vulkan delegate is a flatbuffer behind a header ("VH00"); its schema and the flatbuffer compiler are in ExecuTorch's
wheel. A Core ML delegate is a package flattened into one run of bytes, with its table of contents as JSON, written
backwards, at the very end (executorchcoreml's in-memory file system).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeopt.errors import UsageError
from edgeopt.formats.executorch import executorch_root, find_flatc, read_program
from edgeopt.formats.executorch_layers import KEY, Layers, decode

VULKAN, COREML = "VulkanBackend", "CoreMLBackend"

_VULKAN_SCHEMA = "backends/vulkan/serialization/schema.fbs"
#: flatc writes non-finite constants bare, which JSON does not know.
_NON_FINITE = re.compile(r"(?<=[:\[,])\s*[+-]?(?:inf|nan)(?=\s*[,\]}])")
#: Of the files in a Core ML delegate.
COREML_MODEL = "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"
COREML_MANIFEST = "model.mlpackage/Manifest.json"
COREML_METADATA = "metadata.json"
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, subprocess.SubprocessError)


@dataclass(frozen=True, slots=True)
class DelegatedOp:
    """An operator inside a delegate; `key` finds its layer in the file's table, together with the instruction."""

    type: str
    key: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a delegate.

    Attributes:
        instruction: its index in the method.
        backend: the delegate's id ("VulkanBackend").
        ops: what it computes, in order; None where only its vendor can tell.
        layers: path of the source layer by `DelegatedOp.key`.
    """

    instruction: int
    backend: str
    ops: tuple[DelegatedOp, ...] | None
    layers: Mapping[int, str]


def read_calls(path: Path) -> tuple[Call, ...]:
    """The delegates that a file's main method calls. Raises UsageError when it is corrupt, MissingError when
    ExecuTorch is not installed."""
    read_program(path)  # refuses what is corrupt, in a process of its own
    from executorch.exir import schema
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        file = deserialize_pte_binary(path.read_bytes())
        plans = file.program.execution_plan
        plan = next((plan for plan in plans if plan.name == "forward"), plans[0])
        entry = file.named_data.pte_data.get(KEY) if file.named_data is not None else None
        layers: Layers = decode(bytes(file.named_data.buffers[entry.buffer_index])) if entry is not None else {}
        calls = []
        for index, instruction in enumerate(plan.chains[0].instructions):
            if isinstance(instruction.instr_args, schema.DelegateCall):
                delegate = plan.delegates[instruction.instr_args.delegate_index]
                blob = bytes(file.program.backend_delegate_data[delegate.processed.index].data)
                inner = {p[1]: layer for p, layer in layers.items() if isinstance(p, tuple) and p[0] == index}
                calls.append(Call(index, delegate.id, operators(delegate.id, blob), inner))
    except _DAMAGE as error:
        raise UsageError("a delegate in it can't be read", where=str(path), fix="export it again") from error
    return tuple(calls)


def operators(backend: str, blob: bytes) -> tuple[DelegatedOp, ...] | None:
    """What one delegate computes; None where the backend is not read here, or the file keeps no debug information.

    Raises ValueError and its kin on a damaged one.
    """
    if backend == VULKAN:
        return tuple(DelegatedOp(str(call["name"]), int(call["node_id"])) for call in _vulkan_graph(blob)["chain"])
    if backend == COREML:
        info = coreml_files(blob).get("debug_info.json")
        return None if info is None else tuple(_coreml_operators(info))
    return None


# --- Vulkan ----------------------------------------------------------------------------------------------------------


def _vulkan_graph(blob: bytes) -> Mapping[str, Any]:
    if blob[4:8] != b"VH00":
        raise ValueError("not a Vulkan delegate")
    start, size = int.from_bytes(blob[10:14], "little"), int.from_bytes(blob[14:18], "little")
    if not size or start + size > len(blob):
        raise ValueError("the graph ends past its delegate")
    root = executorch_root()
    with tempfile.TemporaryDirectory() as name:
        binary = Path(name, "graph.bin")
        binary.write_bytes(blob[start : start + size])
        flags = ["--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", name]
        command = [str(find_flatc(root)), *flags, str(root / _VULKAN_SCHEMA), "--", str(binary)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        text = binary.with_suffix(".json").read_text("utf-8", "replace")
    graph = json.loads(_NON_FINITE.sub("null", text))
    if not isinstance(graph, dict):
        raise ValueError("a graph without a table")
    return graph


# --- Core ML ---------------------------------------------------------------------------------------------------------


def coreml_files(blob: bytes) -> dict[str, bytes]:
    """Relative path -> content of what a Core ML delegate holds. Raises ValueError when it is damaged or empty."""
    found = {path: blob[start:end] for path, start, end in _coreml_regions(blob)}
    if not all(found.get(name) for name in (COREML_MODEL, COREML_MANIFEST, COREML_METADATA)):
        raise ValueError("a Core ML delegate without a model")
    return found


def coreml_blob(files: Mapping[str, bytes]) -> bytes:
    """The inverse of `coreml_files`: contents one after the other, then the table of contents, root last."""
    nodes: list[dict[str, object]] = []
    data = bytearray()

    def add(name: str, inside: Mapping[str, bytes]) -> int:
        children: dict[str, int] = {}
        region = {"offset": 0, "size": 0}
        if list(inside) == [""]:
            region = {"offset": len(data), "size": len(inside[""])}
            data.extend(inside[""])
        else:
            for child in sorted({path.partition("/")[0] for path in inside}):
                below = {p.partition("/")[2]: c for p, c in inside.items() if p.partition("/")[0] == child}
                children[child] = add(child, below)
        nodes.append({"children": children, "dataRegion": region, "kind": int(bool(children)), "name": name})
        return len(nodes) - 1

    add("lowered_module", files)
    table = json.dumps({"nodes": nodes}, separators=(",", ":"), sort_keys=True)
    return bytes(data) + table.encode()[::-1]


def _coreml_regions(blob: bytes) -> Iterator[tuple[str, int, int]]:
    """Path, start and end of each file."""
    # The text ends where its first brace closes; what comes before it, data, is of no concern to the decoder.
    nodes = json.JSONDecoder().raw_decode(blob[::-1].decode("latin-1"))[0]["nodes"]
    named = {int(child) for node in nodes for child in node["children"].values()}
    waiting = [("", number) for number in range(len(nodes)) if number not in named]
    while waiting:
        path, number = waiting.pop()
        node = nodes[number]
        waiting += [(f"{path}/{name}".lstrip("/"), int(child)) for name, child in sorted(node["children"].items())]
        if int(node["kind"]) == 0:
            start, size = int(node["dataRegion"]["offset"]), int(node["dataRegion"]["size"])
            if start + size > len(blob):
                raise ValueError("a file ends past its delegate")
            yield path, start, start + size


def _coreml_operators(info: bytes) -> Iterator[DelegatedOp]:
    """Operators of the converted model, which its debug information lists as "output:operator"."""
    for symbol, handles in json.loads(info)["debugSymbolToHandles"].items():
        type_ = symbol.rpartition(":")[2]
        if type_ != "const":
            yield DelegatedOp(type_, int(min(handles, default=-1)))
