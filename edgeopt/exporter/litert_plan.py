"""Which operators of a float .tflite file stay float, and which get 16-bit activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.formats.litert import ROOT, layer_of
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Array, LayerRules, Scheme

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Magnitude that only the "minus infinity" of an attention mask has; one int8 scale for it would erase all else.
MASK = 1e9
_MASK_CARRIERS = frozenset(
    {
        "ADD", "SUB", "MUL", "SELECT", "SELECT_V2", "RESHAPE", "TRANSPOSE", "BROADCAST_TO", "TILE", "SLICE",
        "STRIDED_SLICE", "CONCATENATION", "GATHER", "GATHER_ND", "EXPAND_DIMS", "SQUEEZE", "PAD", "PADV2", "MINIMUM",
        "DYNAMIC_UPDATE_SLICE",
    }
)  # fmt: skip
#: What a normalization is made of; LiteRT's int8 kernels for these are slower than float and lose the variance.
_NORMALIZING = frozenset({"SQUARED_DIFFERENCE", "RSQRT"})
#: Arithmetic that belongs to the normalization or attention it touches. Eight bits between two float operators would
#: cost two conversions and their precision; a softmax over n positions has few values above int8's step of 1/256.
_ARITHMETIC = _NORMALIZING | {
    "ADD", "SUB", "MUL", "DIV", "MEAN", "SUM", "SQRT", "POW", "MAXIMUM", "MINIMUM", "SOFTMAX", "SELECT", "SELECT_V2",
    "GELU", "TANH", "LOGISTIC",
}  # fmt: skip
#: Operators that arrange values in another order; arithmetic on both sides of one belongs together.
_REARRANGING = frozenset(
    {
        "RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "PACK",
        "UNPACK", "BROADCAST_TO", "TILE",
    }
)  # fmt: skip
#: Their output has the scale of their input.
SAME_SCALE = _REARRANGING | {"PAD", "MIRROR_PAD", "GATHER", "GATHER_ND", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE"}
#: Where weights have their output channels.
_CHANNEL_AXES = {
    "CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "TRANSPOSE_CONV": 0, "FULLY_CONNECTED": 0, "EMBEDDING_LOOKUP": 0,
}  # fmt: skip

#: The operators whose weights can have a scale per group.
GROUPED = frozenset({"FULLY_CONNECTED", "EMBEDDING_LOOKUP"})

ON_REQUEST = "kept in float on request"
_INSIDE = "inside another operator"
_DELICATE = "normalizes or attends: int8 is slower than float there and loses its precision"


@dataclass(frozen=True, slots=True)
class KeptFloat:
    """Output tensor of an operator that is to stay float, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Op:
    """One operator and its tensors, by name; omitted optional inputs are left out.

    Attributes:
        kind: as in `OpInfo.type`.
        channel_axis: of the weight, where the operator has one: its output channels.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    channel_axis: int | None = None

    @property
    def layer(self) -> str:
        """Source layer; "" for the outermost module, and for an operator without outputs."""
        return layer_of(self.outputs[0]).removeprefix(ROOT) if self.outputs else ""


@dataclass(frozen=True, slots=True)
class Graph:
    """One subgraph.

    Attributes:
        floats: index of each float32 tensor.
        constants: value of each float32 constant; a view into the file.
        masks: how far each tensor reaches that holds, or may hold, the "minus infinity" of an attention mask.
    """

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    floats: dict[str, int]
    constants: dict[str, Array] = field(default_factory=dict)
    masks: dict[str, float] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: schema.ModelT, graph: schema.SubGraphT) -> Graph:
        from ai_edge_litert import schema_py_generated as schema

        names = [tensor.name.decode() for tensor in graph.tensors]
        kinds = operator_names()
        floats = {names[i]: i for i, t in enumerate(graph.tensors) if t.type == schema.TensorType.FLOAT32}
        ops = tuple(
            Op(
                kinds[model.operatorCodes[op.opcodeIndex].builtinCode],
                tuple(names[i] for i in op.inputs if i >= 0),
                tuple(names[i] for i in op.outputs if i >= 0),
                _channel_axis(kinds[model.operatorCodes[op.opcodeIndex].builtinCode], op, graph),
            )
            for op in graph.operators
        )
        constants = {}
        for name, index in floats.items():
            data = model.buffers[graph.tensors[index].buffer].data
            if data is not None:
                values = np.frombuffer(data, np.float32)
                constants[name] = values.reshape(graph.tensors[index].shape)
        inputs, outputs = (tuple(names[i] for i in indices) for indices in (graph.inputs, graph.outputs))
        return cls(ops, inputs, floats, constants, spread_masks(ops, constants, floats), outputs)

    def weights(self) -> Iterator[tuple[Op, str]]:
        """Operators with a constant weight, and that weight's name."""
        for op in self.ops:
            name = next((n for n in op.inputs if n in self.constants and self.constants[n].ndim > 1), None)
            if op.channel_axis is not None and name is not None:
                yield op, name

    def computed(self) -> set[str]:
        """Tensors whose values differ from run to run."""
        return {*self.inputs, *(name for op in self.ops for name in op.outputs)}

    def activations(self) -> dict[str, int]:
        """Index of every float activation."""
        computed = self.computed()
        return {name: index for name, index in self.floats.items() if name in computed}

    def quantized_activations(self, kept: Iterable[str]) -> set[str]:
        """Float activations that an operator reads or writes that is not kept."""
        float_outputs = set(kept)
        ops = [op for op in self.ops if not float_outputs & {*op.outputs}]
        return {name for op in ops for name in (*op.inputs, *op.outputs)} & self.activations().keys()


def _channel_axis(kind: str, operator: schema.OperatorT, graph: schema.SubGraphT) -> int | None:
    if kind == "BATCH_MATMUL":
        rank = len(graph.tensors[operator.inputs[1]].shape)
        return rank - 2 if operator.builtinOptions.adjY else rank - 1
    return _CHANNEL_AXES.get(kind)


def operator_names() -> dict[int, str]:
    """LiteRT's number of each built-in operator -> its name."""
    from ai_edge_litert import schema_py_generated as schema

    return {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


def kept_by_rule(graphs: Sequence[Graph], scheme: Scheme, rules: LayerRules) -> list[KeptFloat]:
    """Operators that stay float whatever the data: on request, and where the scheme has no form for them."""
    kept = [
        KeptFloat(op.outputs[0], ON_REQUEST)
        for graph in graphs
        for op in graph.ops
        if op.outputs and layer_is_exempt(op.layer, rules.keep_float)
    ]
    if scheme.activations == "static":
        # Nothing can be observed in there: the bodies of loops and reductions run inside one operator.
        kept += [KeptFloat(op.outputs[0], _INSIDE) for g in graphs[1:] for op in g.ops if op.outputs]
    if scheme.weight_granularity == "per-group":
        for graph in graphs:
            for op, name in graph.weights():
                width = graph.constants[name].shape[-1]
                if op.kind in GROUPED and width % scheme.group_size:
                    reason = f"its {width} inputs don't divide into groups of {scheme.group_size}"
                    kept.append(KeptFloat(op.outputs[0], reason))
    return kept


def kept_by_nature(graph: Graph, scheme: Scheme) -> list[KeptFloat]:
    """Normalization and attention, where the processor has fast float arithmetic."""
    return [KeptFloat(op.outputs[0], _DELICATE) for op in delicate(graph)] if scheme.activations == "static" else []


def kept_by_masks(graph: Graph, masks: Mapping[str, float]) -> list[KeptFloat]:
    """Operators that touch an activation as wide as a mask; `masks` has their reach, by tensor."""
    kept = []
    for op in graph.ops:
        widest = [masks[name] for name in (*op.inputs, *op.outputs) if name in masks]
        if widest and op.outputs:
            kept.append(KeptFloat(op.outputs[0], f"reaches {widest[0]:.3g} as attention masks do"))
    return kept


def wide_ops(graph: Graph, rules: LayerRules, kept: Iterable[str]) -> set[str]:
    """First outputs of the operators that get 16-bit activations in an 8-bit file."""
    if not rules.int16_activations:
        return set()
    names = {op.outputs[0] for op in graph.ops if op.outputs and layer_is_exempt(op.layer, rules.int16_activations)}
    return names - set(kept)


def wide_tensors(graph: Graph, wide: set[str], kept: Iterable[str]) -> set[str]:
    """Tensors whose range serves 16-bit integers: those that a 16-bit operator writes, and float ones that only such
    operators read."""
    float_outputs = set(kept)
    written = {name for op in graph.ops if wide & {*op.outputs} for name in op.outputs}
    narrow = [op for op in graph.ops if not (wide | float_outputs) & {*op.outputs}]
    read = {name for op in graph.ops if wide & {*op.outputs} for name in op.inputs}
    return written | (read - {name for op in narrow for name in (*op.inputs, *op.outputs)})


def delicate(graph: Graph) -> list[Op]:
    """Operators of normalizations and of attention, with the arithmetic around them.

    A convolutional network whose batch norms are folded has none.
    """
    computed = graph.computed()
    touching = _touching(graph)
    found: set[int] = set()
    queue = [i for i, op in enumerate(graph.ops) if op.kind in _NORMALIZING or multiplies_activations(op, computed)]
    seen = set(queue)
    while queue:
        index = queue.pop()
        if graph.ops[index].kind not in _REARRANGING:
            found.add(index)
        for near in touching[index] - seen:
            if graph.ops[near].kind in _ARITHMETIC | _REARRANGING:
                seen.add(near)
                queue.append(near)
    return [graph.ops[i] for i in sorted(found | _between(graph, found))]


def multiplies_activations(op: Op, computed: set[str]) -> bool:
    return op.kind == "BATCH_MATMUL" and all(name in computed for name in op.inputs)


def _touching(graph: Graph) -> dict[int, set[int]]:
    """Operators that hand each other a float activation."""
    producer = {name: i for i, op in enumerate(graph.ops) for name in op.outputs if name in graph.floats}
    near: dict[int, set[int]] = defaultdict(set)
    for i, op in enumerate(graph.ops):
        for name in op.inputs:
            if name in producer:
                near[i].add(producer[name])
                near[producer[name]].add(i)
    return near


def _between(graph: Graph, found: set[int]) -> set[int]:
    """Rearranging operators that have float operators on all sides."""
    producer = {name: i for i, op in enumerate(graph.ops) for name in op.outputs}
    readers: dict[str, list[int]] = defaultdict(list)
    for i, op in enumerate(graph.ops):
        for name in op.inputs:
            readers[name].append(i)
    moves = [i for i, op in enumerate(graph.ops) if op.kind in SAME_SCALE | {"CONCATENATION"}]
    fed, used = set(found), set(found)
    for i in moves:
        sources = [name for name in graph.ops[i].inputs if name in graph.floats and name not in graph.constants]
        if sources and all(producer.get(name) in fed for name in sources):
            fed.add(i)
    for i in reversed(moves):
        uses = [reader for name in graph.ops[i].outputs for reader in readers[name]]
        if uses and all(reader in used for reader in uses):
            used.add(i)
    return (fed & used) - found


def spread_masks(ops: Sequence[Op], constants: Mapping[str, Array], floats: Mapping[str, int]) -> dict[str, float]:
    """Follow mask constants to where a softmax or the like takes their size away.

    Looking at the data is not enough: in calibration samples without padding no mask is ever seen, and an int8 range
    without it would switch masking off.
    """
    masks = {}
    for name, values in constants.items():
        reach = mask_reach(values)
        if reach is not None:
            masks[name] = reach
    for op in ops:
        reached = [masks[name] for name in op.inputs if name in masks]
        if reached and op.kind in _MASK_CARRIERS:
            masks.update({name: reached[0] for name in op.outputs if name in floats})
    return masks


def mask_reach(values: Array) -> float | None:
    """The value of largest magnitude where that is beyond any activation (-inf included), else None."""
    if values.size == 0:
        return None
    low, high = float(values.min()), float(values.max())
    widest = low if -low > high else high
    return widest if abs(widest) >= MASK else None


def scopes(graphs: Sequence[Graph], outputs: Iterable[str]) -> list[str]:
    """The operators as ai-edge-quantizer's recipes name them: all output tensors, a semicolon after each."""
    wanted = set(outputs)
    return ["".join(f"{name};" for name in op.outputs) for g in graphs for op in g.ops if wanted & {*op.outputs}]
