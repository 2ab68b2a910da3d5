"""Bytes of parameters on the chip and beside it, as `edgetpu_compiler` reports them.

The layout was found from 13 compiled files and reports of the compiler (`benchmarks/edge_tpu.py` lists them): every
output channel of a dense kernel takes its weights, rounded up to 4, and 10 bytes for bias and scale; channels come in
groups of 64. A depthwise kernel takes 4 bytes per weight and a fixed block. That gives all 13 totals within 1.5 %.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from edgeopt.accelerators.edge_tpu.graph import Graph
from edgeopt.accelerators.edge_tpu.work import LANES, Work, round_up

_WORD = 4
_CHANNEL_BYTES = 10
_DEPTHWISE_BYTES_PER_WEIGHT = 4
_DEPTHWISE_BLOCK = 2681
#: Instructions and the like: the 8 MiB are full at 7.7 MiB where there are next to no activations.
_RESERVED_BYTES = 3 * 2**20 // 10
#: Beside the activations of `activations_of`.
_BESIDE_BYTES = 50 * 2**10
#: What tiles of the large feature maps at the start take at most: a network of ResNet-50's size leaves 4.62 MiB at
#: 512x512 (github.com/mouad-zouhdi/sparta-edgetpu, which varies the input size only), and networks with depthwise
#: kernels leave 7.14 MiB even where an EfficientDet-Lite2 reads 448x448.
_TILES_BYTES = 34 * 2**20 // 10
_DEPTHWISE_TILES_BYTES = 86 * 2**20 // 100


@dataclass(frozen=True, slots=True)
class Activations:
    """Most bytes of activations at a time.

    Attributes:
        anywhere: over all operators.
        late: over those from the smallest feature map on. Before that point the compiler works tile by tile; behind it,
            in the decoder of a segmentation network, whole feature maps stay on the chip.
        depthwise: whether there are depthwise kernels, whose neighbours run in smaller tiles.
    """

    anywhere: int
    late: int
    depthwise: bool = False

    @property
    def reserved_bytes(self) -> int:
        """What they leave no room for parameters in."""
        tiles = _DEPTHWISE_TILES_BYTES if self.depthwise else _TILES_BYTES
        return max(_RESERVED_BYTES, self.late + _BESIDE_BYTES, min(self.anywhere + _BESIDE_BYTES, tiles))


@dataclass(frozen=True, slots=True)
class Parameters:
    """Where parameters are kept. `streamed` has the numbers of the operators whose weights cross the link each time."""

    onchip_bytes: int
    offchip_bytes: int
    streamed: frozenset[int]


def parameter_bytes(work: Work) -> int:
    """What the weights of one operator take in the compiled file. Weights that two operators share are stored twice."""
    if work.kind == "dense":
        return round_up(work.channels, LANES) * (round_up(work.taps * work.depth, _WORD) + _CHANNEL_BYTES)
    if work.kind == "depthwise":
        return round_up(work.channels, LANES) * work.taps * _DEPTHWISE_BYTES_PER_WEIGHT + _DEPTHWISE_BLOCK
    return 0


def place(works: Sequence[tuple[int, Work]], activations: Activations, cache_bytes: int) -> Parameters:
    """Fill the cache operator by operator, in order of execution; what does not fit is streamed.

    Args:
        works: (number of the operator, its work) of everything that is mapped.
        cache_bytes: on-chip memory, which activations share.
    """
    room = cache_bytes - activations.reserved_bytes
    onchip = offchip = 0
    streamed = set()
    for number, work in works:
        size = parameter_bytes(work)
        if onchip + size <= room:
            onchip += size
        elif size:
            offchip += size
            streamed.add(number)
    return Parameters(onchip, offchip, frozenset(streamed))


def activations_of(graph: Graph, numbers: Sequence[int]) -> Activations:
    """What is alive while these operators run in order.

    A kernel accumulates into the other operand of the ADD behind it: what it writes takes no room of its own, and the
    sum stays where that operand was. What nobody on the chip reads leaves as it is computed.
    """
    last = {i: step for step, n in enumerate(numbers) for i in graph.operators[n].inputs if i is not None}
    roomless = _accumulated(graph, numbers)
    alive: dict[int, int] = {}
    peaks = []
    for step, number in enumerate(numbers):
        operator = graph.operators[number]
        if operator.type == "ADD":
            alive = {i: size for i, size in alive.items() if last[i] > step}
        reads = (i for i in operator.inputs if i is not None and (operator.type != "ADD" or last[i] > step))
        for i in (*reads, *(i for i in operator.outputs if i in last)):
            if graph.tensors[i].content == "activation" and i not in roomless:
                alive[i] = graph.tensors[i].size
        peaks.append(sum(alive.values()))
        alive = {i: size for i, size in alive.items() if last[i] > step}
    turn = _smallest_map(graph, numbers)
    depthwise = any(graph.operators[n].type == "DEPTHWISE_CONV_2D" for n in numbers)
    return Activations(max(peaks, default=0), max(peaks[turn:], default=0), depthwise)


def _smallest_map(graph: Graph, numbers: Sequence[int]) -> int:
    """Where in the order the first of the smallest feature maps is written; the end where there are none."""
    sizes = {}
    for step, number in enumerate(numbers):
        for output in graph.outputs_of(graph.operators[number]):
            if len(output.shape) == 4 and output.shape[1] * output.shape[2] > 1:
                sizes[step] = output.shape[1] * output.shape[2]
    return min(sizes, key=lambda step: sizes[step], default=len(numbers))


def _accumulated(graph: Graph, numbers: Sequence[int]) -> set[int]:
    """Tensors that are only the operand of one ADD, and written after its other operand."""
    written = {i: step for step, n in enumerate(numbers) for i in graph.operators[n].outputs}
    readers = Counter(i for operator in graph.operators for i in operator.inputs if i is not None)
    found = set()
    for number in numbers:
        operands = [i for i in graph.operators[number].inputs if i is not None and i in written]
        if graph.operators[number].type == "ADD" and len(operands) == 2:
            later = max(operands, key=lambda i: written[i])
            if readers[later] == 1 and later not in graph.outputs:
                found.add(later)
    return found
