"""The calls into torch.export and ExecuTorch, with their noise muffled and their errors in one line."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.executorch_attention import drop_idle_expansions, write_out_attention, write_out_insertions
from edgeopt.exporter.executorch_graph import layer_of, operator_name, own_every_dequantize, write_out_gelus
from edgeopt.formats.executorch_layers import add_layers
from edgeopt.layer_names import strip_wrapper

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

_OPERATOR = re.compile(r"\b(aten|torchvision|torchaudio|prims|quantized_decomposed)(?:::|\.)(\w+)(?:\.(\w+))?")


@contextmanager
def quiet_vendor() -> Iterator[None]:
    """Warnings raised and logged inside the vendors' code are about their code, not about the user's model."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def capture(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    shapes: Sequence[Mapping[int, object]] | None,
) -> ExportedProgram:
    """torch.export of a module. Raises ConversionError naming the operator and the layer it stopped at."""
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=_by_parameter(module, shapes))
    except Exception as error:  # anything the user's forward or torch's tracer raises
        raise _capture_error(module, error) from error


def lower(program: ExportedProgram, path: Path) -> None:
    """Delegate to XNNPACK what it takes and write the .pte file, source layers included. Raises ConversionError."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackDynamicallyQuantizedPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    from edgeopt.exporter.executorch_partitioner import partitioner

    has_state = _writes_to_buffers(program)  # such as a cache that the network keeps itself
    # One partitioner alone finds dependency cycles around what is written to a buffer.
    first = [XnnpackDynamicallyQuantizedPartitioner()] if has_state else []
    write_out_gelus(program)
    write_out_insertions(program)
    write_out_attention(program)
    try:
        edge = to_edge_transform_and_lower(
            program, transform_passes=[own_every_dequantize, drop_idle_expansions], partitioner=[*first, partitioner()]
        )
        exported = edge.exported_program()
        handles = {n.meta["debug_handle"]: layer_of(n) for n in exported.graph.nodes if "debug_handle" in n.meta}
        blocks = [_layers(graph) for graph in _delegated_graphs(exported)]
        # Written in place, else each run copies every buffer.
        manager = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=has_state))
    except Exception as error:  # the compiler's passes raise all kinds
        raise _lowering_error(program, error) from error
    layers: dict[int | tuple[int, int], str] = {}
    remaining = iter(blocks)
    for instruction, handle in manager.debug_handle_map["forward"].items():
        if isinstance(handle, list):
            layers |= {(instruction, inner): layer for inner, layer in next(remaining, {}).items()}
        else:
            layers[instruction] = handles.get(handle, "")
    with path.open("wb") as file:
        manager.write_to_file(file)
    del edge, exported, blocks, manager  # each holds the weights once more
    add_layers(path, layers)
    _check_loads(path)


def _writes_to_buffers(program: ExportedProgram) -> bool:
    """Whether a run leaves something behind. The signature tells only after torch has taken in-place operators out."""
    buffers = program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            written = node
            while written.op == "call_function" and written.all_input_nodes:  # through views
                written = written.all_input_nodes[0]
            if written.name in buffers:
                return True
    return False


def _delegated_graphs(program: ExportedProgram) -> list[Graph]:
    """What went into each delegated block, in the order of their calls."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "call_delegate" in str(n.target)]
    blocks = dict(program.graph_module.named_modules())
    return [blocks[str(call.args[0].target)].original_module.graph for call in calls]


def _layers(graph: Graph) -> dict[int, str]:
    """Debug handle -> layer inside a delegated block. The (de)quantizers around an operator share its handle."""
    found: dict[int, str] = {}
    for node in graph.nodes:
        handle = node.meta.get("debug_handle")
        if node.op == "call_function" and handle is not None and "quantized_decomposed" not in str(node.target):
            found.setdefault(handle, layer_of(node))
    return found


def _check_loads(path: Path) -> None:
    """The runtime accepts the file and has a kernel for every operator in it."""
    from executorch.runtime import Runtime

    if path.stat().st_size == 0:
        raise ConversionError("ExecuTorch wrote an empty file", where=str(path))
    try:
        Runtime.get().load_program(path).load_method("forward")
    except RuntimeError as error:
        raise ConversionError(
            f"ExecuTorch's runtime refuses the file it wrote ({first_line(error)})",
            where=str(path),
            fix="keep the layers involved in float, or choose another format",
        ) from error


def _by_parameter(module: torch.nn.Module, shapes: Sequence[Mapping[int, object]] | None) -> dict[str, object] | None:
    """Dynamic shapes as torch.export wants them: by parameter of forward(), a tuple for `*args`."""
    if shapes is None:
        return None
    arguments = inspect.signature(module.forward).bind(*shapes).arguments
    return dict(arguments)


# --- errors ----------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """The first line of a vendor's message that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _capture_error(module: torch.nn.Module, error: Exception) -> ConversionError:
    layer = _failing_layer(module, error)
    operator = _named_operator(error)
    text = str(error)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        problem = "what the model does depends on the values of its input, which torch.export can't follow"
        fix = "replace the Python `if` or loop on a tensor's value with torch.where or torch.cond"
    else:
        problem = f"torch.export failed: {first_line(error)}"
        fix = "run torch.export.export on the module to see the whole message"
    if operator:
        problem = f"{problem} (operator {operator})"
    return ConversionError(problem, where=f"layer {layer!r}" if layer else "the model", fix=fix)


def _failing_layer(module: torch.nn.Module, error: BaseException) -> str:
    """Path of the innermost submodule whose forward() was running."""
    paths = {id(child): name for name, child in module.named_modules()}
    layer, trace = "", error.__traceback__
    while trace is not None:
        name = paths.get(id(trace.tb_frame.f_locals.get("self")))
        layer = name or layer
        trace = trace.tb_next
    return strip_wrapper(layer)


def _named_operator(error: BaseException) -> str | None:
    match = _OPERATOR.search(str(error))
    return f"{match[1]}.{match[2]}" if match else None


def blame(program: ExportedProgram, error: BaseException) -> tuple[str | None, str]:
    """(operator, source layer) that a compiler's error is about; None and "" where nothing tells.

    The message may name the operator, that of any error in the chain. Where it doesn't, the node that the failing
    pass was looking at is among the variables of its frames.
    """
    chain = list(_chain(error))
    for link in reversed(chain):
        if (operator := _named_operator(link)) is not None and not _is_conversion(operator):
            return operator, _layer_with(program, operator)
    for link in reversed(chain):
        if (node := _node_at_hand(link)) is not None:
            match = _OPERATOR.search(str(node.target))
            return f"{match[1]}.{match[2]}" if match else node.name, layer_of(node)
    return None, ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what caused it, down to the first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _node_at_hand(error: BaseException) -> Node | None:
    """The operator that the innermost frame with one was at; in place of a (de)quantizer what is next to it."""
    from torch.fx import Node

    found = None
    trace = error.__traceback__
    while trace is not None:
        nodes = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, Node)]
        found = next((near for node in reversed(nodes) if (near := _source_operator(node)) is not None), found)
        trace = trace.tb_next
    return found


def _source_operator(node: Node) -> Node | None:
    """The node itself, or the closest one upstream that is an operator of the model and not of the compiler's."""
    while _is_conversion(str(node.target)) or not node.meta.get("nn_module_stack"):
        if node.op != "call_function" or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node if node.op == "call_function" else None


def _is_conversion(operator: str) -> bool:
    return "quantized_decomposed" in operator


def _lowering_error(program: ExportedProgram, error: Exception) -> ConversionError:
    operator, layer = blame(program, error)
    if operator is None:
        problem = "ExecuTorch can't lower the model"
    elif any(_named_operator(link) == operator for link in _chain(error)):
        problem = f"ExecuTorch can't take the operator {operator}"
    else:
        problem = f"ExecuTorch fails at or next to the operator {operator}"
    return ConversionError(
        f"{problem} ({first_line(error)})",
        where=f"layer {layer!r}" if layer else "the model",
        fix="replace that operator, or choose another format",
    )


def _layer_with(program: ExportedProgram, operator: str) -> str:
    """The layer that has this operator, as written or after torch took a larger one apart; empty if none has."""

    def find(graph: Graph) -> str:
        return next((layer_of(n) for n in graph.nodes if operator_name(n).startswith(f"{operator}.")), "")

    layer = find(program.graph)
    if not layer:
        with suppress(RuntimeError):  # the message then does without the layer
            layer = find(program.run_decompositions().graph)
    return layer
