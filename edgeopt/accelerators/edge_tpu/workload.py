"""Operator of a graph -> its work: shapes read the way each operator type means them."""

from __future__ import annotations

import math

from edgeopt.accelerators.edge_tpu.graph import Graph, Operator, Tensor
from edgeopt.accelerators.edge_tpu.work import Work

#: An LSTM's four gates are one matrix product over input and previous output.
_GATES = 4


def work_of(graph: Graph, operator: Operator) -> Work:
    """What the operator computes, reads and writes."""
    outputs = graph.outputs_of(operator)
    reads = [t for t in graph.inputs_of(operator) if t is not None and t.content == "activation"]
    bytes_in, bytes_out = sum(t.size for t in reads), sum(t.size for t in outputs)
    inputs = graph.inputs_of(operator)
    kernel = inputs[1] if len(inputs) > 1 else None
    shaped = _SHAPES.get(operator.type)
    # A shape that no such operator can have is left to the rules to refuse.
    if shaped is None or kernel is None or len(kernel.shape) != shaped[0] or not (kernel.elements and outputs):
        return Work("other", 0, 0, 0, 0, bytes_in, bytes_out)
    return shaped[1](kernel, reads, outputs[0], bytes_in, bytes_out)


def _convolution(kernel: Tensor, _: list[Tensor], output: Tensor, bytes_in: int, bytes_out: int) -> Work:
    channels, height, width, depth = kernel.shape
    return Work("dense", output.elements // channels, channels, height * width, depth, bytes_in, bytes_out)


def _depthwise(kernel: Tensor, _: list[Tensor], output: Tensor, bytes_in: int, bytes_out: int) -> Work:
    taps, channels = math.prod(kernel.shape[1:3]), kernel.shape[3]
    return Work("depthwise", output.elements // channels, channels, taps, 1, bytes_in, bytes_out)


def _transposed(kernel: Tensor, reads: list[Tensor], output: Tensor, bytes_in: int, bytes_out: int) -> Work:
    channels, height, width, depth = kernel.shape
    positions = reads[-1].elements // depth if reads else output.elements // channels
    return Work("dense", positions, channels, height * width, depth, bytes_in, bytes_out)


def _fully_connected(kernel: Tensor, _: list[Tensor], output: Tensor, bytes_in: int, bytes_out: int) -> Work:
    channels, depth = kernel.shape
    return Work("dense", output.elements // channels, channels, 1, depth, bytes_in, bytes_out)


def _lstm(kernel: Tensor, reads: list[Tensor], output: Tensor, bytes_in: int, bytes_out: int) -> Work:
    units, depth = kernel.shape
    steps = reads[0].elements // depth if reads else 1
    return Work("dense", steps, _GATES * units, 1, depth + math.prod(output.shape[-1:]), bytes_in, bytes_out)


#: Operator type -> rank of its weights, and how to read them.
_SHAPES = {
    "CONV_2D": (4, _convolution),
    "DEPTHWISE_CONV_2D": (4, _depthwise),
    "TRANSPOSE_CONV": (4, _transposed),
    "FULLY_CONNECTED": (2, _fully_connected),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (2, _lstm),
    "LSTM": (2, _lstm),
}
