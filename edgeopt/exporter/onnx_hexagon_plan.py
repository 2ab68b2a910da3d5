"""Which tensors of a float ONNX graph get which integers, so that Qualcomm's HTP takes all of it.

Other than a CPU, HTP gains nothing by float islands: every operator that it has in integers computes in integers, and
every float tensor that such an operator reads or writes is quantized, with the width of its maker. A reader of another
width gets it converted. What only moves values keeps its input's parameters. A Relu or Clip disappears into the range
of the operator before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from edgeopt.exporter.onnx_plan import UNIT_RANGE
from edgeopt.exporter.onnx_rewrite import attributes, captured_names, constants_of, number
from edgeopt.formats.onnx import tensor_types
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    import onnx

#: Keep their input's scale and zero point: they move or pick values.
MOVES = frozenset(
    {
        "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "MaxPool", "GlobalMaxPool",
        "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Gather", "GatherElements", "GatherND", "ReduceMax",
        "ReduceMin",
    }
)  # fmt: skip
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
#: Have a scale and a bias per channel beside their data.
NORMS = frozenset({"LayerNormalization", "InstanceNormalization"})
#: HTP's other operators in integers (measured on QNN 2.51). What is not named stays float.
ARITHMETIC = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu", "Where", "Concat", "Relu", "Clip", "LeakyRelu", "Elu",
        "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softmax", "LogSoftmax", "Gelu", "Sqrt", "Exp", "Log", "Abs",
        "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Pow", "Softplus", "Reciprocal", "Einsum", "LRN",
        "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "Resize", "Pad", "LpNormalization", "Equal",
        "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ArgMax", "ArgMin",
    }
)  # fmt: skip
#: Inputs from this position on are settings, not data.
SETTINGS_FROM = {"Clip": 1, "Pad": 1, "Resize": 1}
CLIPS = frozenset({"Relu", "Clip"})
#: What computes with an own output range that a Clip can end.
_SATURATING = PRODUCTS | NORMS | {"Add", "Sub", "Mul", "Div", "Concat", "AveragePool", "GlobalAveragePool"}

#: Whether a node is concerned by a rule.
Concerned = Callable[["onnx.NodeProto"], bool]


class HtpPlan:
    """The plan for one graph.

    Args:
        proto: float graph with unique node names, prepared by `onnx_hexagon_prepare.for_htp`.
        exempt: whether a node must stay float.
        wide: whether a node's activations have 16 bits whatever the scheme says.
        scheme: the width of the others, and whether inputs and outputs of the graph become integers.

    Attributes:
        nodes: of the graph, in order; constants: its constants, by tensor.
        folded: output of an operator -> output of the Clip that its range replaces.
        observed: (tensor, bits) whose range calibration has to find, in graph order.
        interface: float graph inputs and outputs that become integers.
    """

    def __init__(self, proto: onnx.ModelProto, exempt: Concerned, wide: Concerned, scheme: Scheme) -> None:
        graph = proto.graph
        self.nodes: tuple[onnx.NodeProto, ...] = tuple(n for n in graph.node if n.op_type != "Constant")
        self.constants: Mapping[str, Array] = constants_of(graph)
        self._scheme = scheme
        self._types = tensor_types(proto)
        self._wide = wide
        self._outputs = frozenset(o.name for o in graph.output)
        self._makers = {output: node for node in self.nodes for output in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        captured = frozenset(captured_names(self.nodes))
        self._quantized = {
            n.name for n in self.nodes if not exempt(n) and captured.isdisjoint(n.output) and self._has_integers(n)
        }
        ends = (*(i.name for i in graph.input), *self._outputs) if scheme.io == "int8" else ()
        self.interface = frozenset(name for name in ends if self.is_real(name))
        self.folded: Mapping[str, str] = dict(self._folds())
        self._absorbed = frozenset(self.folded.values())
        self.observed = tuple(dict.fromkeys(self._observed()))

    def computes_integers(self, node: onnx.NodeProto) -> bool:
        return node.name in self._quantized

    def is_absorbed(self, node: onnx.NodeProto) -> bool:
        """Whether the node is a Clip that a range replaces."""
        return node.output[0] in self._absorbed

    def is_real(self, name: str) -> bool:
        """Whether a tensor is a float activation."""
        return self._types.get(name) == "float32" and name not in self.constants

    def bits_of_node(self, node: onnx.NodeProto) -> int:
        if node.op_type == "Gather" and node.input[0] in self.constants:
            return self._scheme.weight_bits  # a table of weights
        ended = self._ended_by(node)
        wide = self._wide(node) or (ended is not None and self._wide(ended))
        return 16 if wide else self._scheme.activation_bits

    def bits(self, name: str) -> int:
        """Width of a tensor as it is first quantized."""
        maker = self._makers.get(name)
        if maker is not None and self.computes_integers(maker):
            return self.bits_of_node(maker)
        if name in self.interface:
            return self._scheme.activation_bits
        readers = (self.bits_of_node(n) for n in self._readers.get(name, ()) if self.computes_integers(n))
        return max(readers, default=self._scheme.activation_bits)

    def data(self, node: onnx.NodeProto) -> list[str]:
        """A node's float inputs that are data, constant or not."""
        return [
            name
            for name in node.input[: SETTINGS_FROM.get(node.op_type, len(node.input))]
            if name and self._types.get(name) == "float32"
        ]

    def origin(self, name: str) -> str:
        """The tensor (or constant table) whose range `name` has."""
        while (maker := self._makers.get(name)) is not None and self.computes_integers(maker):
            if maker.op_type not in MOVES and not self._only_moves(maker):
                break
            name = maker.input[0]
        return name

    def unit(self, name: str) -> str | None:
        """ "sigmoid" for a tensor in [0, 1], "tanh" for one in [-1, 1], by its maker; None for others."""
        maker = self._makers.get(name)
        if maker is None or not self.computes_integers(maker):
            return None
        return "sigmoid" if maker.op_type in UNIT_RANGE else "tanh" if maker.op_type == "Tanh" else None

    def weight_axis(self, node: onnx.NodeProto) -> int | None:
        """Axis of the output channels in a product's constant weights; None where HTP takes one scale for all."""
        weight = self.constants[node.input[1]]
        match node.op_type:
            case "Conv":
                return 0
            case "ConvTranspose":
                return 1 if number(node, "group", 1) == 1 else None
            case "Gemm":
                return 0 if number(node, "transB", 0) else 1
        return 1 if weight.ndim == 2 else None

    def _has_integers(self, node: onnx.NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or not any(self.is_real(name) for name in (*node.input, *node.output)):
            return False
        kind = node.op_type
        if kind in PRODUCTS:
            return self._is_plain_product(node)
        if kind in NORMS:
            return all(name in self.constants for name in node.input[1:] if name)
        if kind == "Resize" and not self._only_moves(node):
            return False  # QNN takes integers only where input and output share their parameters
        if kind in MOVES or kind in ARITHMETIC:
            settings = node.input[SETTINGS_FROM.get(kind, len(node.input)) :]
            return all(name in self.constants for name in settings if name)
        return False

    def _is_plain_product(self, node: onnx.NodeProto) -> bool:
        constant = node.input[1] in self.constants
        if node.op_type == "MatMul":
            return not constant or self.constants[node.input[1]].ndim >= 2
        bias = node.input[2] if len(node.input) > 2 else ""
        if not constant or (bias and bias not in self.constants):
            return False
        if node.op_type != "Gemm":
            return True
        plain = not number(node, "transA", 0) and number(node, "alpha", 1) == 1 and number(node, "beta", 1) == 1
        columns = self.constants[node.input[1]].shape[0 if number(node, "transB", 0) else 1]
        return plain and (not bias or self.constants[bias].shape == (columns,))

    def _only_moves(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Resize":
            return attributes(node).get("mode", b"nearest") in (b"nearest", b"linear")
        if node.op_type != "Pad":
            return False
        value = node.input[2] if len(node.input) > 2 else ""
        constant = attributes(node).get("mode", b"constant") == b"constant"
        return not constant or not value or not self.constants[value].any()

    def _ended_by(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The operator whose output range a Clip can end. It has that operator's width, whichever layer it belongs to
        (a functional relu is in the parent): narrowed in front of it, half of the steps would be for what it cuts."""
        maker = self._makers.get(node.input[0]) if node.op_type in CLIPS and node.input else None
        return maker if maker is not None and maker.op_type in _SATURATING and self.computes_integers(maker) else None

    def _folds(self) -> Iterator[tuple[str, str]]:
        if self._scheme.activation_symmetric:
            return  # the range would reach below zero again
        for node in self.nodes:
            maker = self._ended_by(node)
            if maker is None or not self.computes_integers(node):
                continue
            source = node.input[0]
            alone = len(self._readers[source]) == 1 and source not in self._outputs
            if alone and self.bits_of_node(node) == self.bits_of_node(maker) and self._holds_zero(node):
                yield source, node.output[0]

    def _holds_zero(self, node: onnx.NodeProto) -> bool:
        """Whether a Clip lets zero pass, as every range must hold it."""
        if node.op_type == "Relu":
            return True
        given = [float(self.constants[n].reshape(-1)[0]) if n else None for n in (*node.input[1:], "", "")]
        low = -math.inf if given[0] is None else given[0]
        high = math.inf if given[1] is None else given[1]
        return low <= 0 <= high

    def _observed(self) -> Iterator[tuple[str, int]]:
        for node in self.nodes:
            if not self.computes_integers(node) or self.is_absorbed(node):
                continue
            read = [name for name in self.data(node) if self.is_real(name)]
            written = [self.folded.get(name, name) for name in node.output if self.is_real(name)]
            for name in (*read, *written):
                origin = self.origin(name)
                if self.is_real(origin) and self.unit(origin) is None:
                    yield origin, self.bits(origin)
        for name in sorted(self.interface):
            origin = self.origin(name)
            if self.is_real(origin) and self.unit(origin) is None:
                yield origin, self.bits(origin)
