"""What each format computes in int8, as its exporter and its runtime's kernels have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgeopt.calibration.ranges import Range
from edgeopt.layer_names import layer_is_exempt
from edgeopt.training.graph import CLIPS, CONVOLUTIONS, PRODUCTS, TRANSPOSED_CONVOLUTIONS, Graph, Operation
from edgeopt.types import Format, LayerRules, Scheme

_UNIT = Range(0.0, 1.0)
#: LiteRT's logistic and softmax: scale 1/256, zero point -128; its tanh: scale 1/128, zero point 0.
_LITERT_UNIT, _LITERT_TANH = Range(0.0, 255 / 256), Range(-1.0, 127 / 128)
_MOVES = frozenset(
    {
        "view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "max_pool2d", "chunk", "split",
        "getitem", "slice", "expand", "contiguous", "clone", "dropout", "interpolate", "pad", "constant_pad_nd",
        "pixel_shuffle", "unflatten",
    }
)  # fmt: skip
_LITERT_CLIPS = ((0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0))


@dataclass(frozen=True, slots=True)
class FormatRules:
    """A format's habits.

    Attributes:
        composites: operators that its files have as several ones.
        fixed: operator -> range of its result, where nothing is observed.
        same_range: operators that compute, and keep their input's range.
        concatenation_shares_range: what is concatenated gets one range with the result.
        smallest_scale: of activations.
        run_time_ranges: what one range covers when ranges are found at run time.
    """

    composites: frozenset[str]
    fixed: Mapping[str, Range]
    same_range: frozenset[str] = frozenset()
    concatenation_shares_range: bool = False
    smallest_scale: float = 2.0**-126
    run_time_ranges: Literal["sample", "row"] = "sample"

    def run_time_dims(self, operation: Operation) -> int:
        """How many leading dimensions of the input have ranges of their own."""
        if self.run_time_ranges == "row" and operation.operator not in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS:
            return max(operation.rank - 1, 1)
        return 1


FORMATS: Mapping[Format, FormatRules] = {
    "onnx": FormatRules(
        composites=frozenset({"hardswish", "silu", "scaled_dot_product_attention"}),
        fixed={"sigmoid": _UNIT, "hardsigmoid": _UNIT, "softmax": _UNIT},
    ),
    "litert": FormatRules(
        composites=frozenset({"hardswish", "silu", "scaled_dot_product_attention"}),
        fixed={"sigmoid": _LITERT_UNIT, "softmax": _LITERT_UNIT, "tanh": _LITERT_TANH, "hardsigmoid": _UNIT},
        same_range=frozenset({"avg_pool2d"}),
        run_time_ranges="row",
    ),
    "executorch": FormatRules(
        composites=frozenset(),
        fixed={},
        concatenation_shares_range=True,
        smallest_scale=2.0**-12,
        run_time_ranges="row",
    ),
}


@dataclass(slots=True)
class Choice:
    """Operations by index.

    Attributes:
        int8: those that compute in int8, what is fused into them included.
        fused: batch normalizations and clips that disappear into the operation before them.
        tails: int8 operation -> the last one that is fused into it.
        float_outputs: int8 operations whose result stays float.
        weights: those whose weights are int8.
        normalizations: convolution -> path of the batch normalization that is folded into it.
        moves: operators that pass values on as they are.
    """

    graph: Graph
    moves: frozenset[str]
    rescales: bool = False
    int8: set[int] = field(default_factory=set)
    fused: set[int] = field(default_factory=set)
    tails: dict[int, int] = field(default_factory=dict)
    float_outputs: set[int] = field(default_factory=set)
    weights: set[int] = field(default_factory=set)
    normalizations: dict[int, str] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)

    def is_stored(self, value: int) -> bool:
        """Whether the value exists on a grid only, for all its readers."""
        return value in self.stored

    def only_rescales(self, operation: Operation) -> bool:
        """Whether it is a product with a positive number, which changes the scale and rounds nothing."""
        return self.rescales and operation.factor is not None and operation.factor > 0

    def find_stored(self) -> None:
        """Set `stored` from what computes in int8."""
        self.stored = {
            value
            for index in self.int8 - self.float_outputs
            for value in self.graph.operations[self.tails.get(index, index)].outputs
            if index not in self.fused
        }


def choose(graph: Graph, format_: Format, scheme: Scheme, rules: LayerRules, is_static: bool) -> Choice:
    """What the exporter of that format would compute in int8."""
    if scheme.activations == "static":
        return {"onnx": _Onnx, "litert": _LiteRT, "executorch": _Xnnpack}[format_](
            graph, scheme, rules, is_static
        ).choose()
    return _weights_only(graph, format_, scheme, rules)


def _weights_only(graph: Graph, format_: Format, scheme: Scheme, rules: LayerRules) -> Choice:
    """Run-time ranges and weight-only files: products alone, each by itself."""
    choice = Choice(graph, _MOVES)
    wanted = {"linear", "addmm", "matmul"} if format_ != "executorch" else {"linear"}
    if format_ == "litert" or scheme.activations == "none":
        wanted |= CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS
    for index, operation in enumerate(graph.operations):
        if operation.weight is None or layer_is_exempt(operation.layer, rules.keep_float):
            continue
        if operation.operator in wanted:
            choice.weights.add(index)
            choice.int8.add(index)
            choice.float_outputs.add(index)
        elif _is_table(operation, format_):
            choice.weights.add(index)
    return choice


def _is_table(operation: Operation, format_: Format) -> bool:
    """Whether it is a look-up in a table that the format stores as int8 rows."""
    smallest = {"onnx": 4096, "litert": 0}.get(format_)
    return operation.operator == "embedding" and smallest is not None and operation.elements >= smallest


class _Chooser:
    """What the three have in common."""

    format: Format
    moves = _MOVES
    rescales = False

    def __init__(self, graph: Graph, scheme: Scheme, rules: LayerRules, is_static: bool) -> None:
        self.is_static = is_static
        self.operations = graph.operations
        self.scheme = scheme
        self.readers = graph.readers()
        self.results = graph.results
        self.choice = Choice(graph, self.moves, self.rescales)
        self.floats = graph.floats
        self.exempt = {i for i, o in enumerate(graph.operations) if layer_is_exempt(o.layer, rules.keep_float)}

    def choose(self) -> Choice:
        self.fold_normalizations()
        self.select()
        for index in self.choice.int8:
            if self.operations[index].weight is not None and index not in self.choice.fused:
                self.choice.weights.add(index)
        tables = {i for i, o in enumerate(self.operations) if o.weight and _is_table(o, self.format)}
        self.choice.weights |= tables - self.exempt
        self.choice.find_stored()
        return self.choice

    def select(self) -> None:
        raise NotImplementedError

    def fold_normalizations(self) -> None:
        for index, operation in enumerate(self.operations):
            if operation.operator in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS and operation.weight is not None:
                reader = self.only_reader(index)
                if reader is not None and self.operations[reader].operator == "batch_norm":
                    self.choice.tails[index] = reader
                    self.choice.fused.add(reader)
                    self.choice.normalizations[index] = self.operations[reader].layer

    def fold_clip(self, index: int) -> None:
        """Let the operation saturate in place of the clip that alone reads it."""
        reader = self.only_reader(self.choice.tails.get(index, index))
        if reader is not None and reader not in self.exempt and self.can_fold(index, reader):
            self.choice.tails[index] = reader
            self.choice.fused.add(reader)

    def can_fold(self, index: int, clip: int) -> bool:
        raise NotImplementedError

    def only_reader(self, index: int) -> int | None:
        outputs = self.operations[index].outputs
        readers = self.readers.get(outputs[0], []) if len(outputs) == 1 else []
        return readers[0] if len(readers) == 1 and outputs[0] not in self.results else None

    def result_readers(self, index: int) -> list[int]:
        outputs = self.operations[self.choice.tails.get(index, index)].outputs
        return [reader for value in outputs for reader in self.readers.get(value, [])]

    def activations(self, operation: Operation) -> Iterator[int]:
        return (value for value in operation.inputs if value is not None and value in self.floats)

    def is_real(self, operation: Operation) -> bool:
        return bool(operation.outputs) and all(value in self.floats for value in operation.outputs)


class _LiteRT(_Chooser):
    """ai-edge-quantizer: every operator that it knows, but for normalizations, attention and arithmetic around them."""

    format = "litert"
    moves = _MOVES | {"select"}
    _computing = (
        CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | PRODUCTS | CLIPS
        | {"batch_norm", "add", "sub", "mul", "div", "sigmoid", "hardsigmoid", "softmax", "gelu", "tanh", "avg_pool2d",
           "adaptive_avg_pool2d", "mean", "cat", "layer_norm"}
    )  # fmt: skip
    _fusing = CONVOLUTIONS | {"linear", "addmm", "add", "sub", "mul", "div"}
    _normalizing = frozenset({"layer_norm", "group_norm", "rms_norm", "rsqrt", "scaled_dot_product_attention"})
    _arithmetic = frozenset({"add", "sub", "mul", "div", "mean", "softmax", "gelu", "tanh", "sigmoid", "sqrt", "pow"})

    def select(self) -> None:
        delicate = self._delicate()
        for index, operation in enumerate(self.operations):
            if index in self.choice.fused or index in self.exempt or not self.is_real(operation) or index in delicate:
                continue
            if operation.operator in self._computing | self.moves and list(self.activations(operation)):
                self.choice.int8.add(index)
                self.fold_clip(index)

    def _delicate(self) -> set[int]:
        """What the exporter keeps float although there are int8 kernels, which are slow and coarse there."""
        producer = {value: index for index, operation in enumerate(self.operations) for value in operation.outputs}
        found = {index for index, operation in enumerate(self.operations) if self._is_seed(operation)}
        waiting = list(found)
        while waiting:
            operation = self.operations[waiting.pop()]
            near = {producer[value] for value in self.activations(operation) if value in producer}
            near |= {reader for value in operation.outputs for reader in self.readers.get(value, [])}
            new = {index for index in near - found if self.operations[index].operator in self._arithmetic}
            found |= new
            waiting.extend(new)
        return found

    def _is_seed(self, operation: Operation) -> bool:
        multiplies = operation.operator in PRODUCTS and operation.weight is None
        return operation.operator in self._normalizing or (multiplies and len(list(self.activations(operation))) > 1)

    def can_fold(self, index: int, clip: int) -> bool:
        return self.operations[index].operator in self._fusing and self.operations[clip].bounds in _LITERT_CLIPS


class _Xnnpack(_Chooser):
    """ExecuTorch's XNNPACK quantizer with our corrections; groups without a convolution or linear stay float."""

    format = "executorch"
    moves = frozenset({"view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "max_pool2d",
                       "slice", "getitem", "select", "dropout", "contiguous", "clone", "pad",
                       "constant_pad_nd"})  # fmt: skip
    _anchors = frozenset({"conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "linear"})

    def select(self) -> None:
        stored: set[int] = set()
        for index, operation in enumerate(self.operations):
            if index in self.choice.fused or index in self.exempt or not self.is_real(operation):
                continue
            if self._is_int8(operation, stored):
                self.choice.int8.add(index)
                self.fold_clip(index)
                stored.update(self.operations[self.choice.tails.get(index, index)].outputs)
        self._clear_islands()

    def _is_int8(self, operation: Operation, stored: set[int]) -> bool:
        if operation.operator in self._anchors:
            return operation.weight is not None
        if operation.operator in ("add", "mul", "cat") or operation.is_spatial_mean:
            return operation.operator != "mean" or operation.keeps_dims
        follows = any(value in stored for value in self.activations(operation))
        # A clip that is not fused keeps its producer's range, and so rounds nothing.
        return operation.operator in self.moves and follows

    def can_fold(self, index: int, clip: int) -> bool:
        clips = ("relu", "relu6", "hardtanh")
        return self.operations[index].operator in self._anchors | {"add"} and self.operations[clip].operator in clips

    def _clear_islands(self) -> None:
        neighbours: dict[int, set[int]] = {index: set() for index in self.choice.int8}
        for index in self.choice.int8:
            for reader in self.result_readers(index):
                if reader in neighbours:
                    neighbours[index].add(reader)
                    neighbours[reader].add(index)
        reached = {i for i in self.choice.int8 if self.operations[i].operator in self._anchors}
        waiting = list(reached)
        while waiting:
            new = neighbours[waiting.pop()] - reached
            reached |= new
            waiting.extend(new)
        for index in self.choice.int8 - reached:
            self.choice.int8.discard(index)
            if (tail := self.choice.tails.pop(index, None)) is not None:
                self.choice.fused.discard(tail)


class _Onnx(_Chooser):
    """The exporter's own rule: int8 spreads from convolutions and products to where int8 follows."""

    format = "onnx"
    rescales = True
    _joins = frozenset({"add", "mul", "sigmoid", "hardsigmoid", "leaky_relu", "softmax", "avg_pool2d"})

    def select(self) -> None:
        normalized, fused = dict(self.choice.tails), set(self.choice.fused)
        banned: set[int] = set()
        while True:
            self.choice.int8, self.choice.tails, self.choice.fused = set(), dict(normalized), set(fused)
            self._spread(banned)
            useless = {i for i in self.choice.int8 if not self._pays(i)}
            if not useless:
                break
            banned |= useless
        self.choice.float_outputs = {i for i in self.choice.int8 if self._gives_float(i)}

    def _spread(self, banned: set[int]) -> None:
        quantized: set[int] = set()
        anchors = (o for i, o in enumerate(self.operations) if self._is_anchor(o) and i not in self.exempt)
        readable = {o.inputs[0] for o in anchors}
        for index, operation in enumerate(self.operations):
            if index in banned or index in self.exempt or index in self.choice.fused or not self.is_real(operation):
                continue
            if not self._is_int8(operation, quantized, readable):
                continue
            self.choice.int8.add(index)
            if not self._is_product(operation):
                if operation.operator not in self.moves:
                    self.fold_clip(index)
                quantized.update(self.operations[self.choice.tails.get(index, index)].outputs)

    def _is_int8(self, operation: Operation, quantized: set[int], readable: set[int | None]) -> bool:
        if self._is_anchor(operation):
            return True
        values = list(self.activations(operation))
        if quantized.isdisjoint(values):
            return False
        if operation.operator == "cat":
            return True
        if not all(value in quantized or value in readable for value in values):
            return False
        if operation.operator in CLIPS:
            return operation.bounds is not None
        return operation.operator in self._joins | self.moves or operation.is_spatial_mean

    def _is_anchor(self, operation: Operation) -> bool:
        if operation.operator in CONVOLUTIONS | {"linear", "addmm"}:
            return operation.weight is not None
        return operation.operator == "matmul"

    def _is_product(self, operation: Operation) -> bool:
        """Whether it is a MatMul, whose result stays float.

        PyTorch's exporter writes a linear layer with a bias as a Gemm on rows, where it knows their number.
        """
        rows = operation.rank == 2 or (self.is_static and len(operation.inputs) > 2)
        return operation.operator == "matmul" or (operation.operator == "linear" and not rows)

    def can_fold(self, index: int, clip: int) -> bool:
        if self.scheme.activation_symmetric or self.operations[clip].bounds is None:
            return False
        operator = self.operations[index].operator
        return operator not in FORMATS["onnx"].fixed and operator not in CLIPS

    def _pays(self, index: int) -> bool:
        operation = self.operations[index]
        if self._is_anchor(operation):
            return True
        readers = [reader in self.choice.int8 for reader in self.result_readers(index)]
        if self.choice.only_rescales(operation):
            return bool(readers) and all(readers) and self.results.isdisjoint(operation.outputs)
        return any(readers)

    def _gives_float(self, index: int) -> bool:
        operation = self.operations[index]
        if self._is_product(operation):
            return True
        if operation.operator not in ("linear", "addmm"):
            return False
        return not any(reader in self.choice.int8 for reader in self.result_readers(index))
