"""Which operators of a file the Edge TPU will run: rules for single operators, then the cut into two parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeopt.accelerators.edge_tpu import graph as graphs
from edgeopt.accelerators.edge_tpu import parser, rules
from edgeopt.accelerators.edge_tpu.graph import Graph, Operator
from edgeopt.accelerators.edge_tpu.rules import Refusal
from edgeopt.types import OpPlacement, Placement

NAME = "Edge TPU"
TOLD_BY = "published operator rules"


def predict(path: Path) -> Placement:
    """Tell for every operator of a .tflite file whether `edgetpu_compiler` 16 will map it.

    The compiler makes one partition: what does not depend on an operator that stays on the CPU, once the first
    supported operator has come. Everything behind that operator runs on the CPU, too.

    Raises:
        UsageError: the file is not a .tflite file, or it is corrupt.
    """
    return placement(graphs.read(path))


def placement(graph: Graph) -> Placement:
    """The same for a file that was read before."""
    refusals = refused(graph)
    operators = tuple(
        OpPlacement(op.name, op.type, "accelerator", op.layer)
        if found is None
        else OpPlacement(op.name, op.type, "cpu", op.layer, found.reason, found.fix)
        for op, found in zip(graph.operators, refusals, strict=True)
    )
    return Placement(NAME, TOLD_BY, predicted=True, ops=operators)


def refused(graph: Graph) -> list[Refusal | None]:
    """Per operator, why it stays on the CPU; None where it is mapped."""
    unknown = [parser.unknown(op) for op in graph.operators]
    first = next(((op, found) for op, found in zip(graph.operators, unknown, strict=True) if found), None)
    if first is not None:
        whole = Refusal(f"the compiler refuses the whole file: {_called(first[0])}", first[1].reason, first[1].fix)
        return [found or whole for found in unknown]
    own = [rules.refusal(graph, op) for op in graph.operators]
    mapped = partition(graph, [found is None for found in own])
    blockers = _blockers(graph, own)
    return [
        None if number in mapped else found or _behind(blocker)
        for number, (found, blocker) in enumerate(zip(own, blockers, strict=True))
    ]


def partition(graph: Graph, supported: Sequence[bool]) -> set[int]:
    """Numbers of the operators in the compiler's one partition.

    As LiteRT cuts a graph for a delegate (tensorflow/lite/graph_info.cc): rounds of supported and of unsupported
    operators by turns, each round taking all that can run by then. The kind of the first operator begins, and the
    compiler keeps the first round of supported ones.
    """
    pending = list(range(len(graph.operators)))
    ready = {i for i, tensor in enumerate(graph.tensors) if tensor.content != "activation"} | set(graph.inputs)
    ready |= _fed_from_nowhere(graph)
    kind = supported[0] if supported else False
    while pending:
        taken = _round(graph, pending, ready, supported, kind)
        if kind and taken:
            return taken
        if not taken and not any(_can_run(graph.operators[n], ready) for n in pending):
            return set()  # a cycle: no runtime can order it
        pending = [n for n in pending if n not in taken]
        kind = not kind
    return set()


def _fed_from_nowhere(graph: Graph) -> set[int]:
    """Tensors that nothing computes, such as empty ones: they hold nobody up."""
    written = {i for op in graph.operators for i in op.outputs}
    return set(range(len(graph.tensors))) - written


def _round(graph: Graph, pending: Sequence[int], ready: set[int], supported: Sequence[bool], kind: bool) -> set[int]:
    """All pending operators of that kind that can run one after the other; their outputs become ready."""
    taken: set[int] = set()
    while True:
        before = len(taken)
        for number in pending:
            if number not in taken and supported[number] == kind and _can_run(graph.operators[number], ready):
                taken.add(number)
                ready.update(graph.operators[number].outputs)
        if len(taken) == before:
            return taken


def _can_run(operator: Operator, ready: set[int]) -> bool:
    return all(i in ready for i in operator.inputs if i is not None)


def _blockers(graph: Graph, own: Sequence[Refusal | None]) -> list[Operator | None]:
    """Per operator, the nearest one before it that is refused for its own sake."""
    behind: dict[int, Operator] = {}
    blockers: list[Operator | None] = []
    for operator, found in zip(graph.operators, own, strict=True):
        blocker = next((behind[i] for i in operator.inputs if i is not None and i in behind), None)
        blockers.append(blocker)
        source = operator if found is not None else blocker
        if source is not None:
            behind.update(dict.fromkeys(operator.outputs, source))
    return blockers


def _behind(blocker: Operator | None) -> Refusal:
    if blocker is None:
        return Refusal(rules.ONE_SUBGRAPH)
    return Refusal(rules.ONE_SUBGRAPH, f"runs after {_called(blocker)}", f"bring {_called(blocker)} to the Edge TPU")


def _called(operator: Operator) -> str:
    return f"{operator.type} {operator.name!r}"
