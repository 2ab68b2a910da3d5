"""OpenVINO as an accelerator: which operators its device takes, which of them in int8, and the file in its own form."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.accelerators.base import Compiled
from edgeopt.errors import ConversionError, MissingError
from edgeopt.formats.onnx import CONVERSIONS, MOVEMENT, load, source_layer
from edgeopt.runtimes.openvino import OpenVinoRuntime, compile_model, last_line, read
from edgeopt.types import Artifact, Finding, Npu, OpenVino, OpPlacement, Placement, UnquantizedOp

if TYPE_CHECKING:
    import onnx
    import openvino

#: The one to ask first: what a device has an NPU for is what the file was made for.
_PREFERENCE = ("NPU", "GPU", "CPU")
_INTEGERS = ("u8", "i8", "u4", "i4")
_FLOATS = ("f32", "f16", "bf16")
_NAMED = 6


@dataclass(frozen=True, slots=True)
class _Node:
    """One operator of the file. `reads_integers`: its data comes out of a DequantizeLinear."""

    name: str
    type: str
    layer: str
    outputs: tuple[str, ...]
    reads_integers: bool


class OpenVinoAccelerator:
    """See `edgeopt.accelerators.base.Accelerator`. Says what OpenVINO says of the devices that this machine has."""

    def unavailable(self) -> str | None:
        return OpenVinoRuntime().unavailable()

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        """Place the operators on the first of the profile's NPU, GPU and CPU that is here, and write the file as
        OpenVINO's own (.xml and .bin), which loads faster and needs no ONNX front end."""
        if (missing := self.unavailable()) is not None:
            raise MissingError(missing)
        if not isinstance(npu, OpenVino):
            raise ValueError(f"{npu.kind} is not OpenVINO")
        nodes = _nodes(load(artifact.path, weights=False))
        graph = read(artifact.path)
        device, absent = _device(npu.devices)
        parts = _parts(graph, nodes)
        taken = _taken(graph, artifact.path, device)
        placement = Placement(
            accelerator=f"OpenVINO {device}",
            told_by=f"openvino {version('openvino')}",
            predicted=False,
            ops=tuple(_placed(node, parts[i], taken, device) for i, node in enumerate(nodes)),
        )
        compiled = (
            compile_model(graph, artifact.path, device, threads=1) if len(taken) == len(graph.get_ops()) else None
        )
        floats = _computed_in_float(compiled, nodes, parts, device) if compiled is not None else ()
        return Compiled(
            replace(artifact, unquantized_ops=(*artifact.unquantized_ops, *floats)),
            placement,
            findings=(*_not_executed(absent, device), *_float_finding(floats, device)),
            extra_files=_write(graph, artifact.path, directory),
        )


def _device(wanted: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The device to ask, and those of the profile that this machine does not have. The CPU is always here."""
    import openvino

    here = {name.partition(".")[0] for name in openvino.Core().available_devices}
    ranked = [name for name in _PREFERENCE if name in wanted]
    return next((name for name in ranked if name in here), "CPU"), tuple(name for name in ranked if name not in here)


def _nodes(model: onnx.ModelProto) -> list[_Node]:
    """The file's operators: without constants, what is computed from constants alone, and conversions."""
    known = {i.name for i in model.graph.initializer}
    dequantized: set[str] = set()
    nodes = []
    for index, node in enumerate(model.graph.node):
        inputs = [name for name in node.input if name]
        # What only looks at nothing (Constant, and decoded weights) runs when the file is loaded.
        if all(name in known for name in inputs):
            known.update(node.output)
        elif node.op_type == "DequantizeLinear":
            dequantized.update(node.output)
        elif node.op_type not in CONVERSIONS:
            outputs = tuple(name for name in node.output if name)
            integers = any(name in dequantized for name in inputs)
            name = node.name or f"{node.op_type}_{index}"
            nodes.append(_Node(name, node.op_type, source_layer(node), outputs, integers))
    return nodes


def _parts(graph: openvino.Model, nodes: Sequence[_Node]) -> Mapping[int, set[str]]:
    """Position of each node -> names of the operators that OpenVINO made of it.

    Tensors keep their names, so the operator with a node's output is its last one; what has no tensor name goes into
    what reads it.
    """
    makers = {output: i for i, node in enumerate(nodes) for output in node.outputs}
    owners: dict[str, int | None] = {}
    parts: dict[int, set[str]] = defaultdict(set)
    for op in reversed(graph.get_ordered_ops()):
        if op.get_type_name() in ("Constant", "Parameter", "Result"):
            continue
        names = {name for port in op.outputs() for name in port.get_names()}
        if names:
            owner = next((makers[name] for name in sorted(names) if name in makers), None)
        else:
            readers = (owners.get(user.get_node().get_friendly_name()) for user in _users(op))
            owner = next((reader for reader in readers if reader is not None), None)
        owners[op.get_friendly_name()] = owner
        if owner is not None:
            parts[owner].add(op.get_friendly_name())
    return parts


def _users(op: openvino.Node) -> list[openvino.Input]:
    return [user for port in op.outputs() for user in port.get_target_inputs()]


def _taken(graph: openvino.Model, path: Path, device: str) -> frozenset[str]:
    """Names of the operators that a device's plugin takes."""
    import openvino

    try:
        return frozenset(openvino.Core().query_model(graph, device))
    except Exception as error:  # RuntimeError and its kin: the plugin refuses the graph as a whole
        raise ConversionError(f"OpenVINO can't place it on {device}: {last_line(error)}", where=str(path)) from error


def _placed(node: _Node, parts: set[str], taken: frozenset[str], device: str) -> OpPlacement:
    refused = bool(parts - taken)
    reason = f"OpenVINO's {device} plugin does not take it" if refused else None
    return OpPlacement(node.name, node.type, "cpu" if refused else "accelerator", node.layer or None, reason)


def _computed_in_float(
    compiled: openvino.CompiledModel, nodes: Sequence[_Node], parts: Mapping[int, set[str]], device: str
) -> tuple[UnquantizedOp, ...]:
    """Operators that the file has between quantized tensors and that the device's kernels compute in float."""
    if not any(node.reads_integers for node in nodes):
        return ()
    precisions: dict[str, set[str]] = defaultdict(set)
    for op in compiled.get_runtime_model().get_ops():
        about = {key: str(op.get_rt_info()[key].value) for key in ("originalLayersNames", "runtimePrecision")}
        for name in about["originalLayersNames"].split(","):
            precisions[name].add(about["runtimePrecision"])
    found = []
    for i, node in enumerate(nodes):
        types = {kind for name in parts[i] for kind in precisions[name]}
        in_float = types.intersection(_FLOATS) and not types.intersection(_INTEGERS)
        if node.reads_integers and node.type not in MOVEMENT and in_float:
            kind = next(kind for kind in _FLOATS if kind in types)
            found.append(
                UnquantizedOp(
                    node.name, node.type, f"quantized in the file, computed in {kind} by OpenVINO on {device}"
                )
            )
    return tuple(found)


def _not_executed(absent: Iterable[str], device: str) -> tuple[Finding, ...]:
    told = "is not on this machine: which operators it takes is not known here, and what is said is about OpenVINO's"
    return tuple(Finding("not-executed", name, f"the {name} of the device {told} {device}") for name in absent)


def _float_finding(floats: Sequence[UnquantizedOp], device: str) -> tuple[Finding, ...]:
    if not floats:
        return ()
    types = ", ".join(f"{kind} ({count})" for kind, count in sorted(Counter(op.type for op in floats).items()))
    names = ", ".join(op.name for op in floats[:_NAMED]) + (", ..." if len(floats) > _NAMED else "")
    message = f"quantized in the file, but computed in float by OpenVINO's kernels: {types}: {names}"
    return (Finding("float-operators", f"OpenVINO {device}", message),)


def _write(graph: openvino.Model, source: Path, directory: Path) -> tuple[Path, ...]:
    """The graph as OpenVINO's own two files, weights as they are. Raises ConversionError."""
    import openvino

    xml = directory / f"{source.stem}.xml"
    try:
        openvino.save_model(graph, xml, compress_to_fp16=False)
    except Exception as error:  # RuntimeError and its kin: nothing was written
        raise ConversionError(f"OpenVINO can't write its own form: {last_line(error)}", where=str(source)) from error
    files = (xml, xml.with_suffix(".bin"))
    if not all(file.is_file() and file.stat().st_size for file in files):
        raise ConversionError("OpenVINO wrote no file, or an empty one", where=str(xml))
    return files
