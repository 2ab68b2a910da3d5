"""Whether a .tflite file has the form that the Edge TPU compiler, release 16, accepts and reads rightly.

The compiler is closed. The rules are what its documentation asks for (https://coral.ai/docs/edgetpu/models-intro), what
TensorFlow Lite 2.5, its parser, can read, and what was observed on files that it refused or read wrongly.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.errors import UsageError
from edgeopt.formats import edge_tpu_rules as rules
from edgeopt.formats.edge_tpu_graph import FlatGraph
from edgeopt.formats.edge_tpu_versions import KNOWN_VERSIONS, OpSignature, TensorType, needed_version

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: What the compiler writes in place of the operators that it took.
COMPILED = "edgetpu-custom-op"
#: What reading a damaged FlatBuffer can raise.
_DAMAGE = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)
_INTEGERS = ("INT8", "UINT8")


@dataclass(frozen=True, slots=True)
class FormViolation:
    """One thing in a file that the compiler doesn't take.

    Attributes:
        rule: short name of the rule.
        where: the operator or tensor, as `OpInfo.name`; the file's own name where it is about the whole file.
        problem: what is wrong, one clause.
        effect: the compiler refuses the file; it reads numbers wrongly, without a word; or it leaves operators on the
            CPU that it would take in another form.
    """

    rule: str
    where: str
    problem: str
    effect: Literal["refused", "misread", "on-cpu"]


def check_form(path: Path) -> tuple[FormViolation, ...]:
    """Everything in the file that is not as the compiler wants it, in file order; empty for a file in form.

    An operator that no Edge TPU can take is no violation: it runs on the CPU, and the compiler says so.

    Raises:
        UsageError: not a .tflite file, or a corrupt one.
    """
    from ai_edge_litert import schema_py_generated as schema

    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise UsageError("is not a LiteRT file, or it is truncated", where=str(path), fix="export it again")
    try:
        # Not through the helpers that resolve external buffers: whether there are any is the first question.
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        return tuple(_violations(model, path.name))
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=str(path), fix="export it again") from error


def signature_of(graph: FlatGraph, op: schema.OperatorT) -> OpSignature:
    """The operator as its version depends on it."""
    return OpSignature(
        graph.kind(op),
        tuple(None if i < 0 else _tensor_type(graph, i) for i in graph.inputs(op)),
        tuple(_tensor_type(graph, i) for i in graph.outputs(op)),
        graph.options(op),
    )


def _tensor_type(graph: FlatGraph, index: int) -> TensorType:
    return TensorType(graph.dtype(index), graph.shape(index), graph.scales(index))


def _violations(model: schema.ModelT, name: str) -> Iterator[FormViolation]:
    if len(model.subgraphs) != 1:
        yield FormViolation("one-subgraph", name, f"has {len(model.subgraphs)} subgraphs, not one", "refused")
    external = sum(buffer.offset > 1 for buffer in model.buffers)
    if external:
        told = f"{external} buffers lie outside the FlatBuffer, where the compiler finds no constants"
        yield FormViolation("inline-buffers", name, told, "misread")
        return  # Every rule about constants would see none.
    graph = FlatGraph(model)
    ops = graph.graph.operators
    if any(graph.kind(op) == COMPILED for op in ops):
        yield FormViolation("not-compiled", name, "is compiled for the Edge TPU already", "refused")
        return
    yield from _dynamic_tensors(graph)
    if not any(graph.dtype(i) in _INTEGERS for op in ops for i in graph.outputs(op)):
        yield FormViolation("quantized", name, "no operator computes in 8 bits", "refused")
    for op in ops:
        yield from _operator_violations(graph, op)


def _dynamic_tensors(graph: FlatGraph) -> Iterator[FormViolation]:
    for index in range(len(graph.graph.tensors)):
        if not graph.is_static(index):
            yield FormViolation("static-shapes", graph.tensor_name(index), "has a dynamic dimension", "refused")


def _operator_violations(graph: FlatGraph, op: schema.OperatorT) -> Iterator[FormViolation]:
    where, kind = graph.name(op), graph.kind(op)
    if told := _too_new(graph, op):
        yield FormViolation("operator-version", where, told, "refused")
    for rule, holds, told, effect in _OPERATOR_RULES:
        if holds(graph, op):
            yield FormViolation(rule, where, f"{kind} {told}", effect)


def _too_new(graph: FlatGraph, op: schema.OperatorT) -> str | None:
    if graph.model.operatorCodes[op.opcodeIndex].customCode:
        return None  # It stays on the CPU, whose runtime must have it.
    kind, version = graph.kind(op), graph.version(op)
    if kind not in KNOWN_VERSIONS:
        return f"{kind} is newer than the compiler"
    version = max(version, needed_version(signature_of(graph, op)) or 1)
    known = KNOWN_VERSIONS[kind]
    return f"{kind} needs version {version}, the compiler knows up to {known}" if version > known else None


_Rule = tuple[str, Callable[[FlatGraph, "schema.OperatorT"], bool], str, Literal["refused", "misread", "on-cpu"]]
_OPERATOR_RULES: tuple[_Rule, ...] = (
    ("int32-paddings", rules.has_wide_paddings, "has int64 paddings, which are read as int32", "misread"),
    ("pad-not-padv2", rules.pads_with_zero, "pads with zero, as PAD does", "on-cpu"),
    (
        "per-tensor-products",
        rules.is_per_channel_product,
        "has one weight scale per channel, of which the compiler knows one",
        "misread",
    ),
    ("reshape-not-move", rules.moves_nothing, "moves nothing; RESHAPE, or no operator, would do", "on-cpu"),
    ("channel-last", rules.takes_channels_first, "makes a channel-first input channel-last", "on-cpu"),
)
