"""Which nodes of a float ONNX graph should compute in int8, so that the file is fast in ONNX Runtime.

ONNX Runtime turns `DequantizeLinear -> op -> QuantizeLinear` into one integer kernel for some operators; around any
other the pair only costs time and accuracy. So int8 spreads from the operators where it pays:

- anchors (convolutions, matrix products) always compute in int8;
- joins (Add, Mul, pooling, Sigmoid...) do when their inputs come out of int8 kernels and an int8 kernel follows;
- moves (Reshape, MaxPool...) pass quantized values on with unchanged parameters, under the same condition;
- Relu and Clip disappear into the output range of the kernel before them;
- a product with a positive constant only changes the scale.

Everything else, and everything exempted, stays float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from typing import TYPE_CHECKING

from edgeopt.exporter.onnx_rewrite import attributes, captured_names, constants_of, number
from edgeopt.formats.onnx import tensor_types
from edgeopt.types import Scheme

if TYPE_CHECKING:
    import onnx

UNARY_JOINS = frozenset({"Sigmoid", "HardSigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool"})
BINARY_JOINS = frozenset({"Add", "Mul"})
CLIPS = frozenset({"Relu", "Clip"})
MOVES = frozenset(
    {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "MaxPool", "DepthToSpace", "Expand"}
)
#: Outputs of these lie in [0, 1] whatever the input, so nothing needs to be observed.
#: A tensor of these derives from values, not from positions: pictures come as bytes.
_REAL = frozenset({"float32", "uint8", "int8"})
UNIT_RANGE = frozenset({"Sigmoid", "HardSigmoid", "Softmax"})


class Role(Enum):
    """How an int8 node is written (see the module's text)."""

    CONV = auto()
    GEMM = auto()
    MATMUL = auto()  # its output stays float: biases, softmax and layer norm, which follow, have no better use
    JOIN = auto()
    MOVE = auto()
    PAD = auto()
    RESCALE = auto()
    FOLDED = auto()  # a Relu or Clip that the kernel before it does by saturating


class Plan:
    """The plan for one graph.

    Args:
        proto: float graph with unique node names, rewritten by `onnx_rewrite.for_int8`.
        exempt: whether a node must stay float.
        scheme: decides whether float graph inputs and outputs become integers as well; whether ranges may start at
            zero, so that they can do the work of a Relu; and whether scales can take over any factor.

    Attributes:
        nodes: of the graph, in order.
        roles: name of an int8 node -> its role; nodes that are absent stay float.
        folded: output of an int8 kernel -> output of the Relu or Clip that it absorbs.
        stored: tensors that exist only quantized (outputs of int8 kernels); float readers dequantize them.
        interface: float graph inputs and outputs that become integers.
        observed: tensors whose ranges calibration has to find, in graph order.
        read_by_anchors: tensors that convolutions and matrix products read.
    """

    def __init__(self, proto: onnx.ModelProto, exempt: Callable[[onnx.NodeProto], bool], scheme: Scheme) -> None:
        graph = proto.graph
        self.nodes: tuple[onnx.NodeProto, ...] = tuple(graph.node)
        self._scheme = scheme
        self._constants = constants_of(graph)
        self._types = tensor_types(proto)
        self._exempt = exempt
        self._inputs = [i.name for i in graph.input if i.name not in self._constants]
        self._outputs = frozenset(o.name for o in graph.output)
        self._captured = frozenset(captured_names(self.nodes))
        self._positions = self._find_positions()
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        ends = (*self._inputs, *(o.name for o in graph.output)) if scheme.io == "int8" else ()
        self.interface: frozenset[str] = frozenset(n for n in ends if self._types.get(n) == "float32")
        self.roles: Mapping[str, Role] = {}
        self.folded: Mapping[str, str] = {}
        anchors = [n for n in self.nodes if self._anchor(n) is not None and not exempt(n)]
        self.read_by_anchors = tuple(dict.fromkeys(n.input[0] for n in anchors if n.input[0] not in self._constants))
        self._solve()
        self.stored: frozenset[str] = frozenset(self._stored())
        self.observed = tuple(dict.fromkeys(self._observed()))

    def _solve(self) -> None:
        """Let int8 spread forward, take it back where nothing int8 follows, until that changes nothing."""
        banned: set[str] = set()
        while True:
            self._spread(banned)
            useless = {n.name for n in self.nodes if n.name in self.roles and not self._pays(n)}
            if not useless:
                return
            banned |= useless

    def _spread(self, banned: set[str]) -> None:
        roles: dict[str, Role] = {}
        folded: dict[str, str] = {}
        quantized = set(self.interface.intersection(self._inputs))
        kernels: set[str] = set()  # outputs whose kernel could saturate in a Relu's place
        # What an anchor reads is quantized for it, so that a join may read it too (a residual from the graph's input).
        readable = set(self.read_by_anchors)
        # What saturation leaves over is clipped on the integers, for which ONNX Runtime has no 16-bit kernel.
        folds = self._scheme.activation_bits == 8 and not self._scheme.activation_symmetric
        for node in self.nodes:
            if node.name in banned or self._captured.intersection(node.output) or self._exempt(node):
                continue
            role = self._role(node, quantized, readable)
            if role is None:
                continue
            source = node.input[0]
            if folds and node.op_type in CLIPS and source in kernels and self._read_once(source):
                role = Role.FOLDED
                folded[source] = node.output[0]
            roles[node.name] = role
            if role is not Role.MATMUL:
                quantized.update(node.output)
            if role in (Role.CONV, Role.GEMM, Role.JOIN) and node.op_type not in UNIT_RANGE:
                kernels.update(node.output)
        self.roles, self.folded = roles, folded

    def _role(self, node: onnx.NodeProto, quantized: set[str], readable: set[str]) -> Role | None:
        activations = [name for name in node.input if name and name not in self._constants]
        if not activations or node.domain not in ("", "ai.onnx") or not all(self._is_real(o) for o in node.output):
            return None
        anchor = self._anchor(node)
        if anchor is not None:
            return anchor
        if quantized.isdisjoint(activations) or any(name not in self._types for name in activations):
            return None
        if node.op_type == "Concat":
            return Role.JOIN
        if not all(n in quantized or n in readable for n in activations if self._types[n] == "float32"):
            return None
        if self.factor(node) is not None:
            return Role.RESCALE
        if node.op_type == "HardSigmoid" and not self._is_scale(number(node, "alpha", 0.2)):
            return None  # its slope becomes a factor of a scale
        if node.op_type == "AveragePool" and number(node, "ceil_mode", 0):
            return None  # the int8 kernel divides by the whole window where that hangs over the edge
        if node.op_type in UNARY_JOINS | BINARY_JOINS:
            return Role.JOIN
        if node.op_type in CLIPS:
            return Role.JOIN if all(name in self._constants for name in node.input[1:] if name) else None
        nearest = node.op_type == "Resize" and attributes(node).get("mode", b"nearest") == b"nearest"
        if node.op_type in MOVES or nearest:
            return Role.MOVE
        return Role.PAD if node.op_type == "Pad" and self._pads_with_zero(node) else None

    def _anchor(self, node: onnx.NodeProto) -> Role | None:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or not self._is_real(node.input[0]):
            return None
        weight = self._constants.get(node.input[1])
        if node.op_type == "MatMul":
            return Role.MATMUL if (self._is_real(node.input[1]) if weight is None else weight.ndim >= 2) else None
        bias = node.input[2] if len(node.input) > 2 else ""
        if weight is None or (bias and bias not in self._constants):
            return None
        if node.op_type == "Conv":
            return Role.CONV
        plain = not number(node, "transA", 0) and number(node, "alpha", 1) == 1 and number(node, "beta", 1) == 1
        columns = weight.shape[0 if number(node, "transB", 0) else 1]
        return Role.GEMM if plain and (not bias or self._constants[bias].shape == (columns,)) else None

    def factor(self, node: onnx.NodeProto) -> float | None:
        """c where the node is x * c with a positive scalar constant c that comes second; None otherwise."""
        if node.op_type not in ("Mul", "Div") or node.input[1] not in self._constants:
            return None
        constant = self._constants[node.input[1]]
        if constant.size != 1 or constant.ndim > 1 or node.input[0] in self._constants:
            return None
        value = float(constant.reshape(-1)[0])
        if not self._is_scale(value):
            return None
        return value if node.op_type == "Mul" else 1 / value

    def _is_scale(self, factor: float) -> bool:
        """Whether a scale times this is still one."""
        return factor > 0 and (self._scheme.scale == "any" or math.frexp(factor)[0] == 0.5)

    def origin(self, name: str) -> tuple[str, float]:
        """The tensor whose parameters `name` has got through moves, and the factor between their scales."""
        factor = 1.0
        makers = {output: node for node in self.nodes for output in node.output}
        while (maker := makers.get(name)) is not None:
            role = self.roles.get(maker.name)
            if role not in (Role.MOVE, Role.PAD, Role.RESCALE):
                break
            factor *= (self.factor(maker) or 1.0) if role is Role.RESCALE else 1.0
            name = maker.input[0]
        return name, factor

    def clip_bounds(self, node: onnx.NodeProto) -> tuple[float, float]:
        """Between which a Relu, or a Clip with constant bounds, keeps its output."""
        if node.op_type == "Relu":
            return 0.0, math.inf
        given = [float(self._constants[n].reshape(-1)[0]) if n else None for n in (*node.input[1:], "", "")]
        return (-math.inf if given[0] is None else given[0]), (math.inf if given[1] is None else given[1])

    def _pads_with_zero(self, node: onnx.NodeProto) -> bool:
        if attributes(node).get("mode", b"constant") != b"constant":
            return False
        value = node.input[2] if len(node.input) > 2 else ""
        return not value or (value in self._constants and not self._constants[value].any())

    def _pays(self, node: onnx.NodeProto) -> bool:
        """Whether int8 is of use here: for joins and moves only if what they give is read by int8 kernels."""
        role = self.roles[node.name]
        if role in (Role.CONV, Role.GEMM, Role.MATMUL, Role.FOLDED):
            return True
        results = [self.folded.get(name, name) for name in node.output]
        readers = [reader.name in self.roles for name in results for reader in self._readers.get(name, ())]
        if role is Role.RESCALE:
            return bool(readers) and all(readers) and not self._outputs.intersection(results)
        return any(readers) or bool(self.interface.intersection(results))

    def _stored(self) -> Iterator[str]:
        for node in self.nodes:
            role = self.roles.get(node.name)
            if role is None or role is Role.MATMUL:
                continue
            if role is Role.GEMM:
                # The kernel can return float as well, which is better for logits.
                output = node.output[0]
                readers = [reader.name in self.roles for reader in self._readers.get(output, ())]
                if not any(readers) and output not in self.interface:
                    continue
            yield from node.output

    def _observed(self) -> Iterator[str]:
        own_range = (Role.CONV, Role.GEMM, Role.JOIN)
        for node in self.nodes:
            role = self.roles.get(node.name)
            if role is None or role is Role.FOLDED:
                continue
            yield from (n for n in self.activations(node) if n not in self.stored)
            if role in own_range and node.op_type not in UNIT_RANGE:
                yield from (self.folded.get(name, name) for name in node.output if name in self.stored)
        yield from (name for name in sorted(self.interface) if name not in self.stored)

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """A node's float inputs that are not constants."""
        return [n for n in node.input if n and n not in self._constants and self._types.get(n) == "float32"]

    def _read_once(self, name: str) -> bool:
        return len(self._readers.get(name, ())) == 1 and name not in self._outputs

    def _is_real(self, name: str) -> bool:
        return self._types.get(name) == "float32" and name not in self._positions

    def _find_positions(self) -> frozenset[str]:
        """Float tensors that derive from integers only (positions, masks): eight bits can't tell 300 from 301.

        Bytes are no positions: pictures come as such.
        """
        found: set[str] = set()
        for node in self.nodes:
            inputs = [name for name in node.input if name]
            if node.op_type in ("Cast", "Range", "ConstantOfShape"):
                derived = all(self._types.get(name) not in _REAL or name in found for name in inputs)
            else:
                varying = [name for name in inputs if name not in self._constants]
                real = [name for name in varying if self._types.get(name) == "float32"]
                derived = bool(real) and all(name in found for name in real)
            if derived:
                found.update(node.output)
        return frozenset(found)
