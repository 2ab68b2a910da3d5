"""Weights that stick out are clipped where that lowers the rounding error of all others by more than it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from edgeopt.calibration.weights import quantize_weight, rows_to_shape, to_rows
from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.dataflow import follow
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.graph import Operator
from edgeopt.compression.surgery import Surgery
from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Array, Model, Scheme, StepRecord

#: A scale's weights are clipped only when that takes this share off their squared error.
_MIN_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class ClipOutliers:
    """Clip the weights that share a scale to the range whose integers have the least squared error.

    Afterwards the scale that every exporter derives from the largest weight is that optimum. The search is that of
    the weight estimator "mse", on the scheme's own grid: bits, granularity, symmetry. It matters most with 4 bits and
    with one scale per tensor. Batch normalizations are folded first, since they would move the grid. Changes the
    float function.
    """

    name: ClassVar[str] = "clip-outliers"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = False

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        if not scheme.is_quantized:
            return "nothing is quantized"
        if scheme.weight_values != "linear":
            return f"{scheme.weight_values} weights have no range to clip to"
        if scheme.weight_estimator != "max":
            return f"the exporter's {scheme.weight_estimator} scales clip already"
        try:
            flow = follow(model)
        except ConversionError as error:
            return error.problem
        has_weights = any(operator.kind != "affine" for operator in flow.operators.values())
        return None if has_weights else "no layer has weights of its own"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        folded, _ = fold(model)
        if folded.module is None:
            raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
        surgery = Surgery(folded.module)
        operators = [operator for operator in follow(folded).operators.values() if operator.kind != "affine"]
        clipped = 0
        for operator in inputs.progress.track(operators, "Clipping weights", len(operators)):
            if layer_is_exempt(operator.layer, inputs.rules.keep_float):
                continue
            weight = surgery.get(operator.weight).astype(np.float32)
            narrowed = _clip(weight, inputs.scheme, _axis(operator, inputs.scheme))
            if not np.array_equal(narrowed, weight):
                surgery.set(operator.weight, narrowed)
                clipped += 1
        record = StepRecord(self.name, {"layers": clipped})
        return replace(model, module=surgery.module, native=None, history=(*model.history, record))


def _axis(operator: Operator, scheme: Scheme) -> int | None:
    """The weight's axis of output channels, None where the scale is the tensor's."""
    if scheme.weight_granularity == "per-tensor":
        return None
    # In a grouped transposed convolution the first axis tells the group, the last the channel within it.
    return max(axis for axis, size in enumerate(operator.out_index.shape) if size > 1 or axis == 0)


def _clip(weight: Array, scheme: Scheme, axis: int | None) -> Array:
    widest = quantize_weight(weight, scheme, axis)
    best = quantize_weight(weight, replace(scheme, weight_estimator="mse"), axis)
    rows = to_rows(weight, axis)
    size = best.group_size or max(rows.shape[1], 1)
    starts = np.arange(0, rows.shape[1], size)
    errors = [
        np.add.reduceat((to_rows(made.dequantize(), axis).astype(np.float64) - rows) ** 2, starts, axis=1)
        for made in (widest, best)
    ]
    is_better = errors[1] < (1 - _MIN_GAIN) * errors[0]
    limit = 2 ** (scheme.weight_bits - 1) - 1
    lowest = -limit if scheme.weight_symmetric else -limit - 1
    scale = best.scale.reshape(is_better.shape).astype(np.float64)
    zero_point = best.zero_point.reshape(is_better.shape).astype(np.float64)
    low = np.where(is_better, scale * (lowest - zero_point), -np.inf)
    high = np.where(is_better, scale * (limit - zero_point), np.inf)
    spread = [np.repeat(bound, size, axis=1)[:, : rows.shape[1]] for bound in (low, high)]
    return rows_to_shape(np.clip(rows, *spread).astype(np.float32), weight.shape, axis)
