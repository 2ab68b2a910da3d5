"""Where to look inside a graph, whatever its format: which tensors are the results of layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto


class Role(Enum):
    """What an operator means to someone who compares layers."""

    KERNEL = auto()  # a matrix product, a convolution, an embedding: always a point
    COMPUTES = auto()  # changes values: a point where it ends a layer
    ACTIVATION = auto()  # Relu, Clip: runtimes fuse it into the operator before it
    BIAS = auto()  # adds a constant per channel: likewise, and part of the kernel's own layer
    PASSIVE = auto()  # moves or re-encodes values
    IGNORED = auto()  # constants, shapes, indices


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of a graph; tensors go by any unique text.

    Attributes:
        layer: path of its source layer; "" when unknown.
        inputs: those that aren't constant.
        bare: it gives integers whose scale is applied by operators of their own (ONNX's MatMulInteger).
    """

    layer: str
    type: str
    role: Role
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """`tensor` is the result of `operator`, after what is fused into it; `inputs` are indices of other points."""

    operator: Operator
    tensor: str
    inputs: tuple[int, ...]


def find_points(operators: Sequence[Operator], outputs: Collection[str]) -> list[Found]:
    """The points of a graph in execution order.

    A kernel is one wherever it stands. Any other operator is one if it computes what leaves its layer: a LayerNorm is
    one operator in some formats and a dozen in others, what comes out of it is the same.

    Args:
        operators: in execution order.
        outputs: tensors that the graph gives out.
    """
    graph = _Graph(operators, outputs)
    chains = {i: graph.follow(i) for i, op in enumerate(operators) if op.role is Role.KERNEL}
    inside = {i for start, chain in chains.items() for i in chain.operators if i != start}
    for i, op in enumerate(operators):
        if op.role in (Role.COMPUTES, Role.ACTIVATION) and op.layer and i not in inside and graph.leaves_layer(i):
            chains[i] = graph.follow(i)
            inside.update(j for j in chains[i].operators if j != i)
    starts = sorted(i for i in chains if i not in inside)
    return [
        Found(operators[start], chains[start].tensor, upstream)
        for start, upstream in zip(starts, _upstream(operators, [chains[i] for i in starts], starts), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Chain:
    """Operators that make one result together, and the tensor that holds it."""

    operators: tuple[int, ...]
    tensor: str


class _Graph:
    def __init__(self, operators: Sequence[Operator], outputs: Collection[str]) -> None:
        self._operators = operators
        self._outputs = outputs
        self._readers: dict[str, list[int]] = defaultdict(list)
        self._writer = {name: i for i, op in enumerate(operators) for name in op.outputs}
        for i, op in enumerate(operators):
            for name in dict.fromkeys(op.inputs):
                self._readers[name].append(i)

    def follow(self, start: int) -> _Chain:
        """From an operator to the value after its scale, its bias and its fused activation."""
        first = self._operators[start]
        chain, tensor = [start], first.outputs[0]
        pending: list[int] = []
        bare = first.bare
        while (reader := self._only_reader(pending, tensor)) is not None:
            op = self._operators[reader]
            if op.role is Role.ACTIVATION or (op.role is Role.BIAS and self._is_bias_of(first, op)):
                chain += [*pending, reader]
                tensor, pending = op.outputs[0], []
            elif bare and op.role in (Role.PASSIVE, Role.COMPUTES):  # a cast, then the product with the scale
                chain += [reader, *self._scale_makers(op, chain)]
                tensor = op.outputs[0]
                bare = op.role is Role.PASSIVE
            elif op.role is Role.PASSIVE:
                pending.append(reader)  # part of it only if an activation follows
            else:
                break
        return _Chain(tuple(chain), tensor)

    def _only_reader(self, pending: Sequence[int], tensor: str) -> int | None:
        if pending:
            tensor = self._operators[pending[-1]].outputs[0]
        readers = self._readers[tensor]
        return readers[0] if len(readers) == 1 and tensor not in self._outputs else None

    def _is_bias_of(self, kernel: Operator, addition: Operator) -> bool:
        return kernel.role is Role.KERNEL and (addition.layer == kernel.layer or not addition.layer)

    def _scale_makers(self, rescale: Operator, chain: Collection[int]) -> Iterable[int]:
        """Operators that look up or compute the scale, which is no result of the layer's."""
        makers = (self._writer[name] for name in rescale.inputs if name in self._writer)
        return [i for i in makers if i not in chain]

    def leaves_layer(self, index: int) -> bool:
        """Whether another layer, or the graph's outside, reads what the operator makes."""
        layer, waiting, seen = self._operators[index].layer, list(self._operators[index].outputs), set()
        while waiting:
            tensor = waiting.pop()
            if tensor in self._outputs:
                return True
            for reader in self._readers[tensor]:
                op = self._operators[reader]
                if op.role is not Role.PASSIVE and op.layer != layer:
                    return True
                if op.role is Role.PASSIVE and reader not in seen:
                    seen.add(reader)
                    waiting += op.outputs
        return False


def _upstream(operators: Sequence[Operator], chains: Sequence[_Chain], starts: Sequence[int]) -> list[tuple[int, ...]]:
    """For every point the nearest points before it."""
    owner = {i: number for number, chain in enumerate(chains) for i in chain.operators}
    behind: dict[str, frozenset[int]] = {}
    found: dict[int, frozenset[int]] = {start: frozenset() for start in starts}
    for i, op in enumerate(operators):
        sources = frozenset().union(*(behind.get(name, frozenset()) for name in op.inputs))
        if i in owner:
            start = starts[owner[i]]
            found[start] |= sources - {owner[i]}
            sources = frozenset({owner[i]})
        for name in op.outputs:
            behind[name] = sources
    return [tuple(sorted(found[start])) for start in starts]
