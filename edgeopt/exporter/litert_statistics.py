"""Ranges in ai-edge-quantizer's form: the extremes of every tensor that shall have a scale of our choice.

It derives a scale from a tensor's extremes: (max - min) / 255 with a free zero point, max / 127 without. Given extremes
in place of the true ones decide the scale of an activation as well as of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.calibration.weights import QuantizedWeight, quantize_weight
from edgeopt.exporter.litert_plan import GROUPED, Graph
from edgeopt.types import Array, Scheme

Statistics = dict[str, dict[str, Array]]


def statistics(graphs: Sequence[Graph], ranges: Mapping[str, Range], scheme: Scheme) -> Statistics:
    """Extremes of all activations in `ranges`, and of weights whose scale isn't simply that of their largest value."""
    is_power_of_two = scheme.scale == "power-of-two"
    found: Statistics = {}
    for name, values in ranges.items():
        found[name] = _extremes(_snapped(values, scheme) if is_power_of_two else values)
    if is_power_of_two and scheme.activations == "static":
        found |= _operands(graphs, scheme)
    if is_power_of_two or scheme.weight_estimator != "max":
        for graph in graphs:
            for op, name in graph.weights():
                grouped = scheme.weight_granularity == "per-group"
                if name not in found and not (grouped and op.kind not in GROUPED):
                    found[name] = _weight_extremes(graph.constants[name], scheme, op.channel_axis)
    return found


def _extremes(values: Range) -> dict[str, Array]:
    # Scalars without dimensions: those it can give to a constant of any rank that shares an activation's scale.
    return {"min": np.array(values.min, np.float32), "max": np.array(values.max, np.float32)}


def _operands(graphs: Sequence[Graph], scheme: Scheme) -> Statistics:
    """Constants that are added, multiplied and so on have scales as well."""
    found = {}
    for graph in graphs:
        for op in graph.ops:
            for name in op.inputs if op.channel_axis is None else ():
                if name in graph.constants and graph.constants[name].size:
                    values = graph.constants[name]
                    reach = Range(min(float(values.min()), 0.0), max(float(values.max()), 0.0))
                    found[name] = _extremes(_snapped(reach, scheme))
    return found


def _snapped(values: Range, scheme: Scheme) -> Range:
    """The narrowest range around this one whose scale is a power of two and whose zero point is an integer."""
    bits = scheme.activation_bits
    high = 2 ** (bits - 1) - 1
    tiny = float(np.finfo(np.float32).tiny)
    if scheme.activation_symmetric or bits == 16:
        scale = 2.0 ** np.ceil(np.log2(max(-values.min, values.max, tiny) / high))
        return Range(-high * scale, high * scale)
    scale = 2.0 ** np.ceil(np.log2(max(values.max - values.min, tiny) / (2 * high + 1)))
    below, above = np.ceil(-values.min / scale), np.ceil(values.max / scale)
    if below + above > 2 * high + 1:  # Both ends were rounded up.
        scale *= 2
        below = np.ceil(-values.min / scale)
    return Range(float(-below * scale), float((2 * high + 1 - below) * scale))


def _weight_extremes(weight: Array, scheme: Scheme, axis: int | None) -> dict[str, Array]:
    found = quantize_weight(weight, scheme, axis)
    low, high = (_edge(found, edge).astype(np.float32) for edge in _edges(scheme))
    if found.group_size is None:
        shape = [1] * weight.ndim
        if found.axis is not None:
            shape[found.axis] = weight.shape[found.axis]
        low, high = low.reshape(shape), high.reshape(shape)
    return {"min": low, "max": high}


def _edges(scheme: Scheme) -> tuple[int, int]:
    high = 2 ** (scheme.weight_bits - 1) - 1
    return (-high if scheme.weight_symmetric else -high - 1), high


def _edge(weight: QuantizedWeight, integer: int) -> Array:
    real: Array = (integer - weight.zero_point.astype(np.float64)) * weight.scale.astype(np.float64)
    return real
