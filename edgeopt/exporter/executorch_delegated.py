"""Lowering to a delegate that does not run on this machine, and the same program in a form that does."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import make_artifact
from edgeopt.exporter.executorch_graph import dynamic_shapes, example_inputs, layer_of, operator_name, simplify
from edgeopt.exporter.executorch_lowering import blame, capture, first_line, lower
from edgeopt.formats.executorch import read_program
from edgeopt.formats.executorch_delegated import VULKAN, operators
from edgeopt.formats.executorch_layers import add_layers
from edgeopt.types import Artifact, Model, Scheme, StepRecord

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, Node

#: Names of one computation before and after the Vulkan delegate's own passes.
_VULKAN_FAMILIES = {
    "aten.addmm": "linear",
    "aten.mm": "linear",
    "aten.linear": "linear",
    "aten.convolution": "convolution",
    "et_vk.conv_with_clamp": "convolution",
}


_NO_LAYER = "_empty_nn_module_stack"


def capture_model(model: Model) -> ExportedProgram:
    """The model as torch.export sees it, simplified. Raises ConversionError."""
    if model.module is None:
        raise ConversionError(
            "ExecuTorch is made from a PyTorch module, and this model has none",
            where=model.name,
            fix="give the PyTorch model, or choose a LiteRT or ONNX target",
        )
    program = capture(model.module, example_inputs(model), dynamic_shapes(model.inputs))
    simplify(program)
    return program


def lower_delegated(
    program: ExportedProgram,
    partitioner: Partitioner,
    backend: str,
    path: Path,
    settle: Callable[[bytes], bytes] | None = None,
) -> None:
    """Delegate what the partitioner takes and write the .pte file, source layers included.

    Args:
        settle: turns a delegate into the one form of it that is always the same, where its compiler is not so minded.

    Raises:
        ConversionError: naming the operator and the layer where lowering stopped, or that nothing was delegated.
    """
    from executorch.exir import to_edge_transform_and_lower

    try:
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
        exported = edge.exported_program()
        handles = {n.meta["debug_handle"]: _layer_of(n) for n in exported.graph.nodes if "debug_handle" in n.meta}
        blocks = [_inner_layers(block, backend) for block in _delegated_blocks(exported)]
        manager = edge.to_executorch()
    except Exception as error:  # the compilers' passes raise all kinds
        raise _lowering_error(program, error, backend) from error
    if not blocks:
        raise ConversionError(
            f"the partitioner of {backend} takes none of its operators",
            where=path.name,
            fix="choose an ExecuTorch target for the CPU",
        )
    layers: dict[int | tuple[int, int], str] = {}
    remaining = iter(blocks)
    for instruction, handle in manager.debug_handle_map["forward"].items():
        if isinstance(handle, list):
            layers |= {(instruction, key): layer for key, layer in next(remaining, {}).items()}
        else:
            layers[instruction] = handles.get(handle, "")
    content = _settled(manager.buffer, backend, settle) if settle is not None else manager.buffer
    path.write_bytes(content)
    add_layers(path, layers)


def delegated_artifact(
    model: Model, float_artifact: Artifact, scheme: Scheme, path: Path, emulation: Path, backend: str, tool: str
) -> Artifact:
    """Describe the file; it has the inputs and outputs of its float twin. Raises ConversionError where it has not."""
    ours, theirs = float_artifact.signature, read_program(path).signature
    for kind, wanted, found in (("inputs", ours.inputs, theirs.inputs), ("outputs", ours.outputs, theirs.outputs)):
        if [t.dtype for t in wanted] != [t.dtype for t in found]:
            raise ConversionError(f"the {kind} of the delegated file are not those of the model", where=model.name)
    config = {"format": "executorch", "precision": scheme.precision, "delegate": backend}
    return make_artifact(
        path,
        format_="executorch",
        precision=scheme.precision,
        signature=ours,
        history=(*model.history, StepRecord("lower", config)),
        tools=("torch", "executorch", tool),
        emulation=emulation,
    )


def write_emulation(model: Model, scheme: Scheme, path: Path) -> None:
    """The same program for this machine's kernels. At fp16 every tensor is rounded to float16, so that what overflows
    there overflows here; sums inside one operator are float32, as on GPUs and NPUs that accumulate so."""
    program = capture_model(model)
    if scheme.precision == "fp16":
        graph = program.module(check_guards=False)
        _round_to_float16(graph)
        program = capture(graph, example_inputs(model), dynamic_shapes(model.inputs))
    lower(program, path)


def _round_to_float16(module: GraphModule) -> None:
    """Round every float32 tensor to float16, in place: constants once, others where they are made."""
    import torch

    graph = module.graph
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "get_attr":
            _round_constant(module, str(node.target))
        elif node.op != "output" and isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            users = list(node.users)
            with graph.inserting_after(node):
                half = graph.call_function(torch.ops.aten.to.dtype, (node, torch.float16))
            with graph.inserting_after(half):
                real = graph.call_function(torch.ops.aten.to.dtype, (half, torch.float32))
            for made in (half, real):
                made.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
            for user in users:
                user.replace_input_with(node, real)
    graph.lint()
    module.recompile()


def _round_constant(module: GraphModule, target: str) -> None:
    """Give the module a rounded copy: the tensor itself is the user's model's."""
    import torch

    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    value = getattr(owner, name)
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        rounded = value.detach().to(torch.float16).to(torch.float32)
        is_parameter = isinstance(value, torch.nn.Parameter)
        setattr(owner, name, torch.nn.Parameter(rounded, requires_grad=False) if is_parameter else rounded)


def _settled(program: bytes, backend: str, settle: Callable[[bytes], bytes]) -> bytes:
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    file = deserialize_pte_binary(program)
    for plan in file.program.execution_plan:
        for index in sorted({d.processed.index for d in plan.delegates if d.id == backend}):
            delegate = file.program.backend_delegate_data[index]
            delegate.data = settle(bytes(delegate.data))
    return bytes(serialize_pte_binary(file, extract_delegate_segments=True))


# --- layers ----------------------------------------------------------------------------------------------------------


def _layer_of(node: Node) -> str:
    """The source layer; torch marks what has none by a name of its own."""
    layer = layer_of(node)
    return "" if layer.startswith(_NO_LAYER) else layer


class _Block:
    """One delegated part of the program: its operators before the delegate's passes, and what those made of it."""

    def __init__(self, graph: Graph, blob: bytes) -> None:
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
        self.blob = blob


def _delegated_blocks(program: ExportedProgram) -> list[_Block]:
    """In the order of their calls."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "call_delegate" in str(n.target)]
    modules = dict(program.graph_module.named_modules())
    lowered = [modules[str(call.args[0].target)] for call in calls]
    return [_Block(block.original_module.graph, bytes(block.processed_bytes)) for block in lowered]


def _inner_layers(block: _Block, backend: str) -> dict[int, str]:
    """`DelegatedOp.key` -> layer. Reading the delegate also proves that what the vendor's compiler wrote is whole."""
    made = operators(backend, block.blob)
    if made == () and block.nodes:
        raise ValueError("the delegate holds no operators")
    if backend == VULKAN:
        return _layers_by_order([(op.key, op.type) for op in made or ()], block.nodes)
    found: dict[int, str] = {}
    for node in block.nodes:
        if (handle := node.meta.get("debug_handle")) is not None:
            found.setdefault(handle, _layer_of(node))
    return found


def _layers_by_order(made: Sequence[tuple[int, str]], nodes: Sequence[Node]) -> dict[int, str]:
    """The Vulkan compiler numbers its operators anew but keeps their order: where it has as many of a kind as there
    were, they are the same ones."""
    before: Mapping[str, list[Node]] = defaultdict(list)
    for node in nodes:
        before[_family(operator_name(node))].append(node)
    counts = Counter(_family(type_) for _, type_ in made)
    places: Counter[str] = Counter()
    found = {}
    for key, type_ in made:
        family = _family(type_)
        if counts[family] == len(before[family]):
            found[key] = _layer_of(before[family][places[family]])
        places[family] += 1
    return found


def _family(operator: str) -> str:
    match = operator.partition("aten.")[2]
    base = f"aten.{match}" if match else operator
    base = ".".join(base.split(".")[:2])
    return _VULKAN_FAMILIES.get(base, base)


def _lowering_error(program: ExportedProgram, error: Exception, backend: str) -> ConversionError:
    operator, layer = blame(program, error)
    layer = "" if layer.startswith(_NO_LAYER) else layer
    at = f" at or next to the operator {operator}" if operator else ""
    dynamic = any(not isinstance(size, int) for size in _sizes(program))
    fix = "give it fixed input shapes" if dynamic else "replace that operator, or choose another format"
    return ConversionError(
        f"lowering to {backend} fails{at} ({first_line(error)})",
        where=f"layer {layer!r}" if layer else "the model",
        fix=fix,
    )


def _sizes(program: ExportedProgram) -> list[object]:
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    return [size for value in values for size in getattr(value, "shape", ())]
