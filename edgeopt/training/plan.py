"""Which tensors of a network a format's int8 file rounds, and onto which grid.

The exporters decide that on their own graphs; this is the same decision for the network itself, so that training sees
the file's arithmetic. It needs no more than the order of the operators and who reads what (see `graph`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.calibration.ranges import Range
from edgeopt.layer_names import layer_is_exempt
from edgeopt.training.fake_quant import Grid
from edgeopt.training.formats import FORMATS, Choice, choose
from edgeopt.training.graph import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Graph, Operation
from edgeopt.training.sites import Site
from edgeopt.types import Format, LayerRules, Scheme

_INT16 = Grid(bits=16, symmetric=True)


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """One range.

    Attributes:
        grid: its integers.
        fixed: the range, where the format prescribes it (the output of a sigmoid).
        layers: layers with weights that read it; the exporters know a range by such a layer.
    """

    grid: Grid
    fixed: Range | None
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """One weight.

    Attributes:
        parameter: its path, empty if it is computed from several.
        layer: of the operator that reads it.
        axis: dimension with a scale for each entry; None for one scale in all.
        folded: path of the batch normalization that the file multiplies it by; set where that changes the grid.
        output_axis: dimension of the output channels, which batch normalization scales.
    """

    parameter: str
    layer: str
    axis: int | None
    folded: str | None
    output_axis: int


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What is rounded at one operator; the integers are places of tensors among its arguments.

    Attributes:
        reads: place -> the range that it is rounded to before it is read.
        own_ranges: constants, which get the grid that just covers them.
        run_time: place -> how many leading dimensions have ranges of their own, found anew for every input.
        weight: its place and key.
        output: range of the result.
    """

    reads: Mapping[int, str]
    own_ranges: tuple[int, ...]
    run_time: Mapping[int, int]
    weight: tuple[int, str] | None
    output: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is rounded; keys are names of ranges and of weights."""

    sites: Mapping[Site, SitePlan]
    activations: Mapping[str, ActivationPlan]
    weights: Mapping[str, WeightPlan]


def composites_of(format_: Format) -> frozenset[str]:
    """Operators that the format's files have as several ones."""
    return FORMATS[format_].composites


def plan(graph: Graph, format_: Format, scheme: Scheme, rules: LayerRules, *, is_static: bool) -> Plan:
    """The simulation of `graph` in a file of that format and scheme.

    Args:
        is_static: no input has a free dimension, which decides how some operators are written.
    """
    return _Planner(graph, format_, scheme, rules, is_static).run()


class _Planner:
    def __init__(self, graph: Graph, format_: Format, scheme: Scheme, rules: LayerRules, is_static: bool) -> None:
        self._graph = graph
        self._format = FORMATS[format_]
        self._scheme = scheme
        self._rules = rules
        self._choice: Choice = choose(graph, format_, scheme, rules, is_static)
        self._maker = {v: i for i, operation in enumerate(graph.operations) for v in operation.outputs}
        self._shared: dict[int, int] = {}
        self._sites: dict[Site, SitePlan] = {}
        self._grids: dict[str, Grid] = {}
        self._fixed: dict[str, Range] = {}
        self._layers: dict[str, list[str]] = {}
        self._used: set[str] = set()
        self._weights: dict[str, WeightPlan] = {}

    def run(self) -> Plan:
        if self._format.concatenation_shares_range:
            self._share_ranges()
        outputs = dict(self._outputs()) if self._scheme.activations == "static" else {}
        for index, operation in enumerate(self._graph.operations):
            if operation.site is not None:
                self._plan_site(index, operation, operation.site, outputs.get(index))
        # A layer that reads tensors of several ranges names none of them.
        names = Counter(layer for layers in self._layers.values() for layer in set(layers))
        activations = {
            key: ActivationPlan(
                grid,
                self._fixed.get(key),
                tuple(layer for layer in dict.fromkeys(self._layers.get(key, ())) if names[layer] == 1),
            )
            for key, grid in self._grids.items()
            if key in self._used
        }
        return Plan(self._sites, activations, self._weights)

    def _plan_site(self, index: int, operation: Operation, site: Site, output: str | None) -> None:
        weight = self._weight(index, operation)
        reads: dict[int, str] = {}
        run_time: dict[int, int] = {}
        constants: list[int] = []
        if index in self._choice.int8 and index not in self._choice.fused:
            for place, value in enumerate(operation.inputs):
                if value is None:
                    if (weight is None or place != weight[0]) and self._rounds_constants(operation):
                        constants.append(place)
                elif value in self._graph.floats:
                    if self._scheme.activations == "dynamic":
                        run_time[place] = self._format.run_time_dims(operation)
                    elif self._scheme.activations == "static":
                        key = self._key(value, operation.layer)
                        if not self._choice.is_stored(value):
                            reads[place] = key
                        if weight is not None:
                            self._layers.setdefault(key, []).append(operation.layer)
        if reads or run_time or constants or weight is not None or output is not None:
            self._used.update(reads.values(), () if output is None else (output,))
            self._sites[site] = SitePlan(reads, tuple(constants), run_time, weight, output)

    def _rounds_constants(self, operation: Operation) -> bool:
        return operation.operator in ("add", "sub", "mul", "div", "cat", "matmul") and (
            self._scheme.activations == "static"
        )

    def _outputs(self) -> list[tuple[int, str]]:
        """(operation, range) for each result that is rounded; that of a fused chain is its last operation's."""
        found = []
        for index, operation in enumerate(self._graph.operations):
            if index not in self._choice.int8 or index in self._choice.fused or index in self._choice.float_outputs:
                continue
            if operation.operator in self._choice.moves or self._choice.only_rescales(operation):
                continue
            tail = self._choice.tails.get(index, index)
            value = self._graph.operations[tail].outputs[0]
            key = self._key(value, operation.layer)
            fixed = self._format.fixed.get(operation.operator)
            if fixed is not None and tail == index:
                self._fixed[key] = fixed
            found.append((tail, key))
        return found

    def _key(self, value: int, layer: str) -> str:
        """Name of the range that a value is held in; what only moves or rescales values keeps its source's."""
        root = self._root(value)
        key = f"value_{root}"
        wide = layer_is_exempt(layer, self._rules.int16_activations) or self._scheme.activation_bits == 16
        grid = Grid(8, self._scheme.activation_symmetric, self._format.smallest_scale)
        if wide:
            grid = _INT16
        self._grids[key] = grid if key not in self._grids or wide else self._grids[key]
        return key

    def _root(self, value: int) -> int:
        index = self._maker.get(value)
        while index is not None and index in self._choice.int8:
            operation = self._graph.operations[index]
            keeps = operation.operator in self._choice.moves or operation.operator in self._format.same_range
            source = operation.inputs[0] if operation.inputs else None
            if not keeps or source is None or index in self._choice.fused:
                break
            value = source
            index = self._maker.get(value)
        return self._shared.get(value, value)

    def _share_ranges(self) -> None:
        """What is concatenated lies on one grid with the result."""
        for index, operation in enumerate(self._graph.operations):
            if operation.operator == "cat" and index in self._choice.int8:
                values = [v for v in (*operation.inputs, *operation.outputs) if v is not None]
                roots = {self._root(value) for value in values}
                target = min(roots)
                self._shared |= dict.fromkeys(roots, target)
                self._shared = {v: target if r in roots else r for v, r in self._shared.items()}

    def _weight(self, index: int, operation: Operation) -> tuple[int, str] | None:
        if operation.weight is None or index not in self._choice.weights:
            return None
        place, parameter = operation.weight
        per_tensor = self._scheme.weight_granularity == "per-tensor"
        axis = _output_axis(operation)
        key = f"weight_{parameter or operation.layer}".replace(".", "/")
        folded = self._choice.normalizations.get(index) if per_tensor else None
        planned = WeightPlan(parameter, operation.layer, None if per_tensor else axis, folded, axis)
        self._weights.setdefault(key, planned)
        return place, key


def _output_axis(operation: Operation) -> int:
    if operation.operator in TRANSPOSED_CONVOLUTIONS or operation.operator == "addmm":
        return 1
    if operation.operator in CONVOLUTIONS or operation.operator in ("linear", "embedding"):
        return 0
    return -1  # of a plain product x @ w
