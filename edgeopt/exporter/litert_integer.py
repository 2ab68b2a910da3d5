"""What an NPU that computes in integers alone needs of a float .tflite file before it is quantized.

On a CPU float normalizations and float attention cost little and lose nothing; on such an NPU each is an island that
falls back to the host. Here they become operators that have integer kernels, those that need precision with 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.litert_plan import MASK, Graph, delicate, multiplies_activations
from edgeopt.types import Array, NpuKind, Scheme

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Products keep 8 bits: an Ethos-U55 has no others between two activations, and the larger ones are slower at 16.
_NARROW = frozenset({"BATCH_MATMUL"})
#: exp(-16) is 1e-7: what a softmax leaves of a score that lies so far below the smallest one that counts.
_MASKED = 16.0
#: Curved so steeply that 8 bits lose one end of their range, with the arithmetic on both sides of them.
_STEEP, _BESIDE = frozenset({"EXP", "LOG"}), frozenset({"ADD", "SUB", "MUL", "DIV"})


@dataclass(frozen=True, slots=True)
class IntegerNpu:
    """What an NPU without float arithmetic takes.

    Attributes:
        has_16_bits: whether its elementwise operators and tables take 16-bit activations.
        fills: operators without a recipe in ai-edge-quantizer that it has in integers.
        lacks: operators that are to be written as others.
    """

    has_16_bits: bool
    fills: frozenset[str]
    lacks: frozenset[str]


_MOVES = frozenset({"EXPAND_DIMS", "SQUEEZE", "MINIMUM", "REDUCE_MAX", "RELU6"})
_ETHOS_U = IntegerNpu(
    has_16_bits=True,
    fills=_MOVES | {"EXP", "LEAKY_RELU", "LOG", "REVERSE_V2", "SPLIT_V", "TILE"},
    lacks=frozenset(
        {
            "ABS", "BROADCAST_TO", "EMBEDDING_LOOKUP", "GATHER_ND", "GELU", "MEAN", "RSQRT", "SELECT", "SELECT_V2",
            "SQRT", "SQUARED_DIFFERENCE",
        }
    ),
)  # fmt: skip
_EDGE_TPU = IntegerNpu(has_16_bits=False, fills=_MOVES, lacks=frozenset({"ABS", "LEAKY_RELU"}))
_NPUS: Mapping[NpuKind, IntegerNpu] = {
    "ethos-u55": _ETHOS_U, "ethos-u65": _ETHOS_U, "ethos-u85": _ETHOS_U, "edge-tpu": _EDGE_TPU,
}  # fmt: skip


def integer_npu(scheme: Scheme) -> IntegerNpu | None:
    """What the scheme's NPU takes, where a float operator in a static file would fall back to the CPU.

    None with scales that are powers of two: LiteRT's 16-bit activations beside 8-bit ones have none.
    """
    if scheme.npu is None or scheme.activations != "static" or scheme.scale == "power-of-two":
        return None
    return _NPUS.get(scheme.npu.kind)


def attends(graph: Graph) -> bool:
    """Whether the network multiplies activations with one another, which an Edge TPU leaves to the CPU, with all that
    follows: nothing is gained by its normalizations in integers."""
    computed = graph.computed()
    return any(multiplies_activations(op, computed) for op in graph.ops)


def wide_by_nature(graph: Graph) -> set[str]:
    """First outputs of the operators of normalizations and attention that get 16 bits in an 8-bit file."""
    found = {op.outputs[0] for op in delicate(graph) if op.outputs and op.kind not in _NARROW}
    steep = [op for op in graph.ops if op.kind in _STEEP]
    touched = {name for op in steep for name in (*op.inputs, *op.outputs)} - graph.constants.keys()
    beside = [op for op in graph.ops if op.kind in _BESIDE and touched & {*op.inputs, *op.outputs}]
    return found | {op.outputs[0] for op in (*steep, *beside)}


@dataclass(frozen=True, slots=True)
class Finite:
    """Constants that are finite now, and ranges of the activations made of them."""

    constants: frozenset[str]
    ranges: Mapping[str, Range]


def finite_masks(model: schema.ModelT, graph: Graph, masks: Mapping[str, float], ranges: Mapping[str, Range]) -> Finite:
    """Replace the "minus infinity" of attention masks, in place, by a number just large enough to mask.

    Args:
        masks: how far each tensor reaches that is as wide as a mask, see `Graph.masks`.
        ranges: of the activations that are not in `masks`.

    Returns:
        What was replaced, and ranges of the activations in `masks` that follow from it and `ranges`. A range from
        samples would not do: there may be none with padding among them.
    """
    reach = -(_MASKED + max((_needed(ranges[n]) for n in _met(graph, masks) if n in ranges), default=0.0))
    values: dict[str, Range] = {}
    replaced = set()
    for name, constant in graph.constants.items():
        if name in masks and np.nanmin(constant) <= -MASK and np.nanmax(constant) < MASK:
            finite = np.maximum(constant, np.float32(reach))
            values[name] = Range(float(finite.min()), max(float(finite.max()), 0.0))
            overwrite(model, graph.floats[name], finite)
            replaced.add(name)
        elif constant.size and name not in masks:
            values[name] = Range(float(constant.min()), float(constant.max()))
    found: dict[str, Range] = {}
    for op in graph.ops:
        rule = _INTERVALS.get(op.kind, _union)
        floats = [n for n in op.inputs if n in graph.floats]
        known = [found.get(n) or values.get(n) or ranges.get(n) for n in floats]
        inputs = [r for r in known if r is not None]
        if len(inputs) == len(floats) and inputs:
            found.update({n: rule(inputs) for n in op.outputs if n in masks})
    return Finite(frozenset(replaced), found)


def _met(graph: Graph, masks: Mapping[str, float]) -> set[str]:
    """Activations that an operator joins with a mask."""
    return {n for op in graph.ops if masks.keys() & {*op.inputs} for n in op.inputs if n not in masks}


def _needed(scores: Range) -> float:
    """By how much to go below zero, or below the largest score, to be as low as the smallest."""
    return max(scores.max - scores.min, -scores.min)


def overwrite(model: schema.ModelT, index: int, values: Array) -> None:
    """Give a constant of the main graph other values; others that share its buffer keep theirs."""
    from ai_edge_litert import schema_py_generated as schema

    tensor = model.subgraphs[0].tensors[index]
    if sum(other.buffer == tensor.buffer for graph in model.subgraphs for other in graph.tensors) > 1:
        model.buffers.append(schema.BufferT())
        tensor.buffer = len(model.buffers) - 1
    model.buffers[tensor.buffer].data = np.frombuffer(values.astype(np.float32).tobytes(), np.uint8)


def _union(inputs: list[Range]) -> Range:
    return Range(min(r.min for r in inputs), max(r.max for r in inputs))


def _sum(inputs: list[Range]) -> Range:
    return Range(sum(r.min for r in inputs), sum(r.max for r in inputs))


def _difference(inputs: list[Range]) -> Range:
    left, right = inputs
    return Range(left.min - right.max, left.max - right.min)


def _product(inputs: list[Range]) -> Range:
    left, right = inputs
    corners = [a * b for a in (left.min, left.max) for b in (right.min, right.max)]
    return Range(min(corners), max(corners))


_INTERVALS: Mapping[str, Callable[[list[Range]], Range]] = {"ADD": _sum, "SUB": _difference, "MUL": _product}
