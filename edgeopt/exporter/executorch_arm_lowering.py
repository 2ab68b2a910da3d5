"""The call into Arm's ExecuTorch backends: a quantized graph in, a .pte file and the TOSA graphs in it out."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.executorch_arm_backend import compile_spec, converter_on_path, is_plumbing, partitioner, refusals
from edgeopt.exporter.executorch_graph import layer_of
from edgeopt.exporter.executorch_lowering import blame, first_line
from edgeopt.formats.executorch_blocks import BlockTables, add_tables
from edgeopt.types import Npu, Vgf

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

_CONVERSIONS = ("quantize_per", "dequantize_per")
_CONVERSION_REASON = "it converts between float and integers beside a float operator, input or output"
_FLOAT_REASON = "it computes in float: its operands are not quantized"
_ISLAND_REASON = "it stands among operators that stay on the CPU"
#: Compile specification under which a backend remembers where it left intermediate files.
_DUMP_KEY = "debug_artifact_path"


@dataclass(frozen=True, slots=True)
class Left:
    """An operator that stays on the CPU. `converts`: it only changes between float and integers."""

    name: str
    type: str
    layer: str
    reason: str
    converts: bool


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered program.

    Attributes:
        graph: the edge program with its delegate calls, its constants being attributes.
        tosa: name of each delegate's module in it -> the TOSA flatbuffer that the delegate was compiled from.
        on_cpu: what stays outside the delegates, in the program's order.
        delegated: type and source layer of what went into them.
    """

    graph: GraphModule
    tosa: Mapping[str, bytes]
    on_cpu: tuple[Left, ...]
    delegated: tuple[tuple[str, str], ...]


def lower_to_arm(program: ExportedProgram, npu: Npu | None, path: Path) -> Lowered:
    """Delegate what the accelerator takes and write the .pte file, source layers and refusals included.

    Raises:
        ConversionError: naming operator and layer, when a pass or the accelerator's compiler fails.
    """
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    spec = compile_spec(npu)
    segments = isinstance(npu, Vgf)  # a microcontroller's loader reads the flatbuffer in place, delegates included
    with tempfile.TemporaryDirectory(prefix="edgeopt-") as dumps, redirect_stdout(io.StringIO()), converter_on_path():
        spec.dump_intermediate_artifacts_to(dumps)
        try:
            edge = to_edge_transform_and_lower(program, partitioner=[partitioner(spec)])
            exported = edge.exported_program()
            modules = _lowered_modules(exported)
            tosa = {name: _dumped(module, Path(dumps)) for name, module in modules.items()}
            for module in modules.values():  # the file must not depend on where it was made
                module.compile_specs[:] = [s for s in module.compile_specs if s.key != _DUMP_KEY]
            on_cpu = _on_cpu(exported, refusals(exported, spec))
            handles = {n.name: n.meta["debug_handle"] for n in exported.graph.nodes if "debug_handle" in n.meta}
            graph: GraphModule = exported.module(check_guards=False)  # what follows takes the program itself apart
            blocks = [_operators(module.original_module) for module in modules.values()]
            manager = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=segments))
        except (Exception, SystemExit) as error:  # the passes raise all kinds, and Vela exits
            raise _error(program, error) from error
    _check_kernels(manager, on_cpu)
    layers, told = _by_instruction(manager, handles, on_cpu)
    path.write_bytes(add_tables(manager.buffer, layers, BlockTables(blocks, told), segments=segments))
    return Lowered(graph, tosa, tuple(on_cpu.values()), tuple(operator for block in blocks for operator in block))


def _lowered_modules(program: ExportedProgram) -> dict[str, LoweredBackendModule]:
    """The delegates by name, in the order of their calls."""
    calls = [node for node in program.graph.nodes if "call_delegate" in str(node.target)]
    modules = dict(program.graph_module.named_modules())
    return {str(call.args[0].target): modules[str(call.args[0].target)] for call in calls}


def _dumped(module: LoweredBackendModule, dumps: Path) -> bytes:
    """The TOSA graph that the backend has left behind, which it names after the partition."""
    graph = module.original_module.graph
    tag = next(node.meta["delegation_tag"] for node in graph.nodes if node.meta.get("delegation_tag"))
    found = sorted(dumps.glob(f"*_{tag}_*.tosa"))
    if len(found) != 1:
        raise FileNotFoundError(f"the backend left {len(found)} TOSA graphs of {tag}")
    return found[0].read_bytes()


def _operators(program: ExportedProgram) -> list[tuple[str, str]]:
    """Type and source layer of the operators in a delegate, conversions left out."""
    return [
        (_type(node), layer_of(node))
        for node in program.graph.nodes
        if node.op == "call_function" and not is_plumbing(node) and not _converts(node)
    ]


def _type(node: Node) -> str:
    """ "aten.convolution.default": the edge dialect's operators are called as ATen's."""
    return str(getattr(node.target, "_op", node.target))


def _converts(node: Node) -> bool:
    return any(word in str(node.target) for word in _CONVERSIONS)


def _on_cpu(program: ExportedProgram, told: Mapping[str, str]) -> dict[str, Left]:
    """What stays outside the delegates, by name."""
    found = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or is_plumbing(node):
            continue
        converts = _converts(node)
        reason = _CONVERSION_REASON if converts else told.get(node.name) or _unexplained(node)
        found[node.name] = Left(node.name, _type(node), layer_of(node), reason, converts)
    return found


def _unexplained(node: Node) -> str:
    """Why an operator that the accelerator has stays outside."""
    import torch

    value = node.meta.get("val")
    computes_in_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return _FLOAT_REASON if computes_in_float else _ISLAND_REASON


def _by_instruction(
    manager: ExecutorchProgramManager, handles: Mapping[str, int], on_cpu: Mapping[str, Left]
) -> tuple[dict[int | tuple[int, int], str], dict[int, str]]:
    """Source layers and reasons of the portable kernels, by instruction.

    Operators that come from one of the source's share its handle, so a kernel is found by handle and type.
    """
    found = {(handles.get(name), left.type.rpartition(".")[0]): left for name, left in on_cpu.items()}
    plan = manager.executorch_program.execution_plan[0]
    layers: dict[int | tuple[int, int], str] = {}
    reasons = {}
    for instruction, handle in manager.debug_handle_map["forward"].items():
        call = plan.chains[0].instructions[instruction].instr_args
        if not hasattr(call, "op_index"):
            continue
        type_ = plan.operators[call.op_index].name.replace("::", ".")
        left = found.get((handle, type_))
        if left is not None:
            layers[instruction] = left.layer
            reasons[instruction] = left.reason
    return layers, reasons


def _check_kernels(manager: ExecutorchProgramManager, on_cpu: Mapping[str, Left]) -> None:
    """Raise ConversionError where no portable kernel computes what the accelerator does not take."""
    from executorch.kernels import quantized  # noqa: F401 - registers the kernels that quantize and dequantize
    from executorch.runtime import Runtime

    registered = set(Runtime.get().operator_registry.operator_names)
    for operator in manager.executorch_program.execution_plan[0].operators:
        if f"{operator.name}.{operator.overload}" in registered or operator.name in registered:
            continue
        type_ = operator.name.replace("::", ".")
        left = next((op for op in on_cpu.values() if op.type.rpartition(".")[0] == type_), None)
        why = f" ({left.reason})" if left is not None else ""
        raise ConversionError(
            f"neither the accelerator{why} nor ExecuTorch's portable kernels have the operator {type_}",
            where=f"layer {left.layer!r}" if left is not None and left.layer else "the model",
            fix="replace that operator, or take the LiteRT route",
        )


def _error(program: ExportedProgram, error: BaseException) -> ConversionError:
    operator, layer = blame(program, error)
    at = f" at or next to the operator {operator}" if operator else ""
    return ConversionError(
        f"Arm's ExecuTorch backend fails{at}: {first_line(error)}",
        where=f"layer {layer!r}" if layer else "the model",
        fix="keep that layer in float (keep-float), or take the LiteRT route",
    )
