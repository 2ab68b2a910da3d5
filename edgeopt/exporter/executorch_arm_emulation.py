"""A program with the arithmetic of a .pte file for Arm's accelerators, which runs on any machine.

Where one delegate takes everything, it is that delegate's TOSA graph. Otherwise it is an archive of TOSA graphs and of
.pte files with what is between them, for the same portable kernels that the device has: see
`edgeopt.runtimes.tosa_program`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.executorch_arm_backend import is_plumbing
from edgeopt.exporter.executorch_arm_lowering import Lowered
from edgeopt.exporter.executorch_lowering import first_line

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node

#: One step: the file that computes it, names of the values that it reads, and of those that it makes.
_Step = dict[str, str | list[str]]


def write_emulation(lowered: Lowered, stem: Path) -> Path:
    """Write `<stem>.tosa` or `<stem>.tosa.zip`. Raises ConversionError where the parts on the CPU can't be taken out.

    The inputs and outputs are the .pte file's, in its order.
    """
    graph = lowered.graph
    calls = [node for node in graph.graph.nodes if _is_delegate(node)]
    if len(calls) == 1 and _is_whole(graph, calls[0]):
        path = stem.with_name(f"{stem.name}.tosa")
        path.write_bytes(lowered.tosa[_module_of(calls[0])])
        return path
    path = stem.with_name(f"{stem.name}.tosa.zip")
    _write_archive(path, graph, lowered.tosa)
    return path


def _is_delegate(node: Node) -> bool:
    return node.op == "call_function" and "call_delegate" in str(node.target)


def _module_of(call: Node) -> str:
    """Name of the delegate, the call's first argument."""
    return str(call.all_input_nodes[0].target)


def _arguments(call: Node) -> list[Node]:
    from torch.fx import Node

    return [argument for argument in call.args[1:] if isinstance(argument, Node)]


def _is_whole(graph: GraphModule, call: Node) -> bool:
    """Whether the call takes the program's inputs and makes its outputs, in their order, and nothing else is there."""
    nodes = list(graph.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"]
    computed = [node for node in nodes if node.op == "call_function" and not is_plumbing(node)]
    numbers = [leaf.args[1] if leaf in call.users else None for leaf in _outputs(graph)]
    return not computed and _arguments(call) == arguments and numbers == list(range(len(call.users)))


def _outputs(graph: GraphModule) -> list[Node]:
    from torch.fx import Node
    from torch.utils._pytree import tree_leaves

    output = next(node for node in graph.graph.nodes if node.op == "output")
    return [leaf for leaf in tree_leaves(output.args) if isinstance(leaf, Node)]


# --- the archive -----------------------------------------------------------------------------------------------------


def _write_archive(path: Path, graph: GraphModule, tosa: Mapping[str, bytes]) -> None:
    files: dict[str, bytes] = {}
    steps: list[_Step] = []
    for part in _parts(graph):
        name = f"{len(files):03d}"
        if _is_delegate(part[0]):
            call = part[0]
            made = {int(str(user.args[1])): user.name for user in call.users}
            files[f"{name}.tosa"] = tosa[_module_of(call)]
            reads = [node.name for node in _arguments(call)]
            makes = [made.get(number, "") for number in range(max(made) + 1)]
            steps.append({"file": f"{name}.tosa", "reads": reads, "makes": makes})
        else:
            inputs, outputs, program = _compile(graph, part)
            files[f"{name}.pte"] = program
            steps.append({"file": f"{name}.pte", "reads": inputs, "makes": outputs})
    arguments = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    content = {"inputs": arguments, "outputs": [node.name for node in _outputs(graph)], "steps": steps}
    files["program.json"] = json.dumps(content, indent=1).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # whose date is fixed


def _parts(graph: GraphModule) -> list[list[Node]]:
    """Steps in an order in which they can run: each delegate by itself, what is between them in as few as possible."""
    stages: dict[Node, int] = {}
    between: dict[int, list[Node]] = {}
    delegates: dict[int, list[Node]] = {}
    for node in graph.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in stages]
        if _is_delegate(node):
            stages[node] = max((stages[s] for s in sources), default=-1) + 1
            delegates.setdefault(stages[node], []).append(node)
        elif node.op == "call_function":
            # What a delegate of stage n makes is there from stage n on; kernels of a stage run after its delegates.
            stages[node] = max((stages[s] for s in sources), default=-1)
            if not (is_plumbing(node) and _is_delegate(node.args[0])):
                between.setdefault(stages[node], []).append(node)
    parts = []
    for stage in sorted({*between, *delegates}):
        parts += [[call] for call in delegates.get(stage, [])]
        parts += [between[stage]] if stage in between else []
    return parts


def _compile(graph: GraphModule, part: Sequence[Node]) -> tuple[list[str], list[str], bytes]:
    """Inputs, outputs and .pte file of some operators of a lowered program, on portable kernels."""
    import torch
    from executorch.exir import EdgeCompileConfig, to_edge
    from torch.fx import Graph, GraphModule

    inside = set(part)
    inputs = dict.fromkeys(s for node in part for s in node.all_input_nodes if s not in inside and s.op != "get_attr")
    results = set(_outputs(graph))
    outputs = [node for node in part if node in results or any(user not in inside for user in node.users)]
    outputs = [node for node in outputs if isinstance(node.meta.get("val"), torch.Tensor)]
    alone = Graph()
    copies: dict[Node, Node] = {node: alone.placeholder(node.name) for node in inputs}

    def copied(source: Node) -> Node:
        if source not in copies:  # a constant
            copies[source] = alone.node_copy(source)
        return copies[source]

    for node in part:
        copies[node] = alone.node_copy(node, copied)
        copies[node].target = getattr(node.target, "_op", node.target)
    alone.output(tuple(copies[node] for node in outputs))
    examples = tuple(_example(node) for node in inputs)
    try:
        program = torch.export.export(GraphModule(graph, alone), examples)
        data = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False)).to_executorch().buffer
    except Exception as error:  # the compiler's passes raise all kinds
        types = ", ".join(dict.fromkeys(str(node.target).rpartition("_ops.")[2] for node in part))
        raise ConversionError(
            f"the operators left to the CPU can't be taken out for a run on this machine ({first_line(error)})",
            where=types,
            fix="replace those operators, or take the LiteRT route",
        ) from error
    return [node.name for node in inputs], [node.name for node in outputs], bytes(data)


def _example(node: Node) -> torch.Tensor:
    import torch

    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype)
