"""ONNX -> what Qualcomm's HTP takes of it, by the provider's own word, and a context binary for one system on chip."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.accelerators.base import Compiled
from edgeopt.errors import ConversionError, MissingError
from edgeopt.formats.files import size_of
from edgeopt.formats.onnx import CONVERSIONS, load, read_ops, source_layer
from edgeopt.formats.onnx_hexagon import FIRST_WITH_FLOAT
from edgeopt.layer_names import strip_wrapper
from edgeopt.runtimes.qnn_htp_process import HtpProcess, missing
from edgeopt.types import Artifact, Finding, Hexagon, Npu, OpPlacement, Placement

if TYPE_CHECKING:
    import onnx

#: The graph as HTP's own binary inside an ONNX file, which loads without being compiled on the phone.
CONTEXT_NAME = "model_qnn_ctx.onnx"
_PROVIDER = "QNNExecutionProvider"
#: The provider's log on a node and the conversions around it.
_REFUSAL = re.compile(r"Validation FAILED for [^\n]*\n((?:\tOperator type: [^\n]*\n)+)\tREASON : ([^\n]*)")
_MEMBER = re.compile(r"Node name: (.*?) Node index: ")
_NODE = re.compile(r"[Nn]ode:? [`']([^`']+)[`']")
_FIXES: Mapping[str, str] = {
    "Erf": "compute GELU with torch.nn.GELU, which becomes one operator",
    "GRU": "replace the recurrent layer by convolutions or attention, or run it on the CPU after the rest",
    "LSTM": "replace the recurrent layer by convolutions or attention, or run it on the CPU after the rest",
    "RNN": "replace the recurrent layer by convolutions or attention, or run it on the CPU after the rest",
}


class HexagonAccelerator:
    """ONNX Runtime's QNN provider on this machine: it decides for each node with the device's operator tables.

    Says nothing on latency: what the emulator counts are cycles of this machine.
    """

    def unavailable(self) -> str | None:
        return missing()

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        problem = missing()
        if problem is not None:
            raise MissingError(problem)
        if not isinstance(npu, Hexagon):
            raise ValueError(f"{npu.kind} is no Hexagon")
        proto = load(artifact.path)
        with TemporaryDirectory() as scratch:
            path = _named(proto, artifact.path, Path(scratch))
            context = directory / CONTEXT_NAME if npu.soc_model is not None else None
            rows, refusals = _partition(path, proto, npu, context)
        ops = tuple(_placed(proto, rows, refusals))
        placement = Placement(
            f"Hexagon {npu.architecture}", f"onnxruntime-qnn {version('onnxruntime-qnn')}", predicted=False, ops=ops
        )
        written = context is not None and context.is_file() and size_of(context) > 0
        return Compiled(
            artifact,
            placement,
            findings=() if written else (_no_context(npu),),
            extra_files=(context,) if written and context is not None else (),
        )


def _no_context(npu: Hexagon) -> Finding:
    told = "QNN wrote none for this file"
    if npu.soc_model is None:
        told = "the device profile names no soc-model, so the phone compiles the file when it first opens it"
    return Finding("no-context-binary", f"hexagon {npu.architecture}", told)


def _named(proto: onnx.ModelProto, path: Path, scratch: Path) -> Path:
    """The file itself where its nodes have names of their own, by which the provider speaks of them; else a copy in
    which they have (weights in files beside it included)."""
    import onnx

    names = [node.name for node in proto.graph.node]
    if all(names) and len(set(names)) == len(names):
        return path
    for i, node in enumerate(proto.graph.node):
        node.name = f"{node.name or node.op_type}_{i}"
    copy = scratch / path.name
    onnx.save(proto, str(copy))
    return copy


def _partition(
    path: Path, proto: onnx.ModelProto, npu: Hexagon, context: Path | None
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Nodes that stay on the CPU (name, type), and why the provider refused nodes, by name. Writes the context."""
    entries = {}
    if context is not None:
        context.unlink(missing_ok=True)
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "1",
            "ep.context_file_path": str(context),
        }
    try:
        process = HtpProcess(path, npu, entries, verbose=True)
    except ConversionError as error:
        raise _naming_the_layer(error, proto, npu) from error
    try:
        refusals: dict[str, str] = {}
        for members, reason in _REFUSAL.findall(process.log()):
            refusals |= dict.fromkeys(_MEMBER.findall(members), _in_words(reason))
        rows = [(name, kind) for provider, name, kind in process.assignment if provider != _PROVIDER]
    finally:
        process.close()
    return rows, refusals


def _naming_the_layer(error: ConversionError, proto: onnx.ModelProto, npu: Hexagon) -> ConversionError:
    """The provider's error, with operator and layer where it names a node or where one is known to be at fault."""
    nodes = {node.name: node for node in proto.graph.node}
    found = _NODE.search(error.problem)
    node = _owner(found.group(1), nodes) if found is not None else None
    if npu.architecture < FIRST_WITH_FLOAT:
        # QNN lets some float operators pass there, and fails when it compiles them.
        floats = (nodes.get(op.name) for op in read_ops(proto) if op.dtype in ("float32", "float16"))
        node = node or next((n for n in floats if n is not None and n.op_type not in CONVERSIONS), None)
    if node is None:
        return error
    layer = strip_wrapper(source_layer(node))
    return ConversionError(
        f"HTP takes no graph with this {node.op_type}: {error.problem}",
        where=f"layer {layer!r}" if layer else f"node {node.name!r}",
        fix=f"Hexagon {npu.architecture} has no float arithmetic: replace what stays in float"
        if npu.architecture < FIRST_WITH_FLOAT
        else "replace that operator, or keep its layer out of the quantization",
    )


def _owner(name: str, nodes: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The file's node that one of the partitioned graph was made of: ONNX Runtime adds to names ("_token_3")."""
    best = max((own for own in nodes if own and _extends(name, own)), key=len, default=None)
    return None if best is None else nodes[best]


def _extends(name: str, own: str) -> bool:
    rest = name.removeprefix(own)
    return name.startswith(own) and (not rest or rest.startswith(("_token_", "/", "_nhwc")))


def _in_words(reason: str) -> str:
    if "are not supported by QNN EP" in reason:
        return "QNN has no such operator"
    if reason.startswith("Failed to add"):
        return "HTP has no kernel for it with these types and sizes"
    return f"QNN: {reason.rstrip('.')}"


def _placed(proto: onnx.ModelProto, rows: list[tuple[str, str]], refusals: Mapping[str, str]) -> Iterator[OpPlacement]:
    """The file's operators in order."""
    nodes = {node.name: node for node in proto.graph.node}
    reasons: dict[str, str] = {}
    for name, kind in rows:
        node = _owner(name, nodes) if kind not in CONVERSIONS else None
        if node is not None:
            reasons[node.name] = refusals.get(name, refusals.get(node.name, "its neighbours are on the CPU"))
    listed = {op.name for op in read_ops(proto)}
    for node in proto.graph.node:
        if node.op_type in CONVERSIONS or node.name not in listed:
            continue
        layer = strip_wrapper(source_layer(node)) or None
        reason = reasons.get(node.name)
        if reason is None:
            yield OpPlacement(node.name, node.op_type, "accelerator", layer)
        else:
            yield OpPlacement(node.name, node.op_type, "cpu", layer, reason, _FIXES.get(node.op_type))
