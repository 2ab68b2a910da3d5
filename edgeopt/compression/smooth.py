"""SmoothQuant: outliers of a transformer's activations move into the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeopt.calibration.weights import quantize_weight
from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.dataflow import Dataflow, Family, follow, ranges_without
from edgeopt.compression.observe import observe
from edgeopt.compression.surgery import Surgery
from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Array, LayerRules, Model, Scheme, StepRecord

if TYPE_CHECKING:
    import torch

#: Migration strengths that the search tries, beside leaving the channels as they are.
_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Activation rows that the search compares on: so many of each sample, and so many in all.
_ROWS_PER_SAMPLE, _ROWS = 16, 256
#: Another scaling must lower the error by this share before it is taken.
_MIN_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Smooth:
    """Rescale the channels between a normalization and the linear operators that read it.

    Xiao et al. 2023, *SmoothQuant*, equation 4: channel j's factor is s = max|x_j|^alpha / max|w_j|^(1 - alpha); the
    normalization's gain and shift are divided by s, the readers' weights multiplied. Channels between two linear
    operators (values and output of an attention, or across a ReLU) are treated alike where the scheme has no scale
    per weight tensor, which would suffer from it.

    Keeps a few hundred rows of each operator's input in memory.

    Attributes:
        alpha: how much of the difficulty moves to the weights, 0 to 1. None searches, for each activation, the
            strength (or none) at which its readers' quantized outputs on sample rows have the least squared error.
    """

    name: ClassVar[str] = "smooth"
    needs: ClassVar[Needs] = "samples"
    keeps_function: ClassVar[bool] = True

    alpha: float | None = None

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        if scheme.activation_bits == 32:
            return "activations are not quantized"
        try:
            found = _families(follow(model), scheme)
        except ConversionError as error:
            return error.problem
        return None if found else "no linear layer reads channels that can be rescaled"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        if model.module is None:
            raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
        flow = follow(model)
        families = [family for family in _families(flow, inputs.scheme) if not _is_float(flow, family, inputs.rules)]
        seen = _observe(model, inputs, flow, families)
        surgery = Surgery(model.module)
        factors = np.ones(flow.labels)
        smoothed = 0
        for family in inputs.progress.track(families, "Smoothing", len(families)):
            chosen = self._choose(flow, family, seen, surgery, inputs.scheme)
            factors[family.classes] = chosen
            smoothed += bool((chosen != 1).any())
        flow.rescale(surgery, factors)
        record = StepRecord(self.name, {"alpha": self.alpha, "activations": smoothed})
        ranges = ranges_without(model.input_ranges, flow.rescaled_inputs(factors))
        return replace(model, module=surgery.module, native=None, history=(*model.history, record), input_ranges=ranges)

    def _choose(
        self, flow: Dataflow, family: Family, seen: Mapping[str, _Seen], surgery: Surgery, scheme: Scheme
    ) -> Array:
        weights = {name: surgery.get(name) for name in family.consumers}
        ranges = _ranges(flow, family, seen, weights)
        if ranges is None:
            return np.ones(len(family.classes))
        activations, columns = ranges
        if self.alpha is not None:
            return _factors(activations, columns, self.alpha)
        best = np.ones(len(family.classes))
        least = (1 - _MIN_GAIN) * _error(flow, family, seen, weights, best, scheme)
        for alpha in _STRENGTHS:
            candidate = _factors(activations, columns, alpha)
            error = _error(flow, family, seen, weights, candidate, scheme)
            if error < least:
                best, least = candidate, error
        return best


class _Seen:
    """What an operator read: extremes per channel, and some rows."""

    def __init__(self, channels: int) -> None:
        self.low = np.zeros(channels)
        self.high = np.zeros(channels)
        self.kept: list[Array] = []
        self._count = 0

    def take(self, value: torch.Tensor, _: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])
        self.low = np.minimum(self.low, rows.amin(0).double().numpy())
        self.high = np.maximum(self.high, rows.amax(0).double().numpy())
        if self._count < _ROWS:
            some = rows[:: max(1, len(rows) // _ROWS_PER_SAMPLE)][: min(_ROWS_PER_SAMPLE, _ROWS - self._count)]
            self.kept.append(some.double().numpy().copy())
            self._count += len(some)


def _families(flow: Dataflow, scheme: Scheme) -> list[Family]:
    writers = ("affine",) if scheme.weight_granularity == "per-tensor" else ("affine", "linear")
    return [
        family
        for family in flow.families()
        if all(flow.operators[name].kind in writers for name in family.producers)
        and all(flow.operators[name].kind == "linear" for name in family.consumers)
    ]


def _is_float(flow: Dataflow, family: Family, rules: LayerRules) -> bool:
    return any(layer_is_exempt(flow.operators[name].layer, rules.keep_float) for name in family.consumers)


def _observe(model: Model, inputs: PassInputs, flow: Dataflow, families: list[Family]) -> dict[str, _Seen]:
    names = sorted({name for family in families for name in family.consumers})
    seen = {name: _Seen(flow.operators[name].in_channels) for name in names}
    if seen:
        observe(model, inputs, {name: one.take for name, one in seen.items()}, "Looking for activation outliers")
    # What torch runs as one fused kernel is never seen.
    return {name: one for name, one in seen.items() if one.kept}


def _ranges(
    flow: Dataflow, family: Family, seen: Mapping[str, _Seen], weights: Mapping[str, Array]
) -> tuple[Array, Array] | None:
    """Largest activation and largest weight of each class over all readers."""
    activations, columns = np.zeros(flow.labels), np.zeros(flow.labels)
    for name in family.consumers:
        if name not in seen:
            return None
        operator, reads = flow.operators[name], flow.reads[name]
        assert operator.in_index is not None
        across = tuple(axis for axis, size in enumerate(operator.in_index.shape) if size == 1)
        np.maximum.at(activations, reads, np.maximum(-seen[name].low, seen[name].high))
        np.maximum.at(columns, reads, np.abs(weights[name]).max(axis=across))
    return activations[family.classes], columns[family.classes]


def _factors(activations: Array, columns: Array, alpha: float) -> Array:
    factors = np.ones_like(activations)
    is_alive = (activations > 0) & (columns > 0)
    factors[is_alive] = activations[is_alive] ** alpha / columns[is_alive] ** (1 - alpha)
    if is_alive.any():
        # A factor that all channels share changes nothing but the numbers' size.
        factors[is_alive] /= np.exp(np.log(factors[is_alive]).mean())
    return factors


def _error(
    flow: Dataflow,
    family: Family,
    seen: Mapping[str, _Seen],
    weights: Mapping[str, Array],
    chosen: Array,
    scheme: Scheme,
) -> float:
    """Squared error of the readers' outputs, each relative to its signal, summed."""
    factors = np.ones(flow.labels)
    factors[family.classes] = chosen
    total = 0.0
    for name in family.consumers:
        operator, own = flow.operators[name], factors[flow.reads[name]]
        out_axis = 0 if operator.out_index.shape[1] == 1 else 1
        assert operator.in_index is not None
        rows = np.concatenate(seen[name].kept)
        axis = None if scheme.weight_granularity == "per-tensor" else out_axis
        scaled = (weights[name] * own[operator.in_index]).astype(np.float32)
        rounded = quantize_weight(scaled, scheme, axis).dequantize().astype(np.float64)
        low, high = seen[name].low / own, seen[name].high / own
        found = _rounded(rows / own, low.min(), high.max(), scheme) @ _as_columns(rounded, out_axis)
        wanted = rows @ _as_columns(weights[name], out_axis)
        total += float(((found - wanted) ** 2).sum() / max((wanted**2).sum(), 1e-30))
    return total


def _as_columns(weight: Array, out_axis: int) -> Array:
    """(input channels, output channels)."""
    return weight.T if out_axis == 0 else weight


def _rounded(rows: Array, low: float, high: float, scheme: Scheme) -> Array:
    """Rows as the scheme's activations: over one static range, or over that of each row."""
    lows: Array = np.minimum(rows.min(axis=1, keepdims=True), 0) if scheme.activations == "dynamic" else np.array(low)
    highs: Array = np.maximum(rows.max(axis=1, keepdims=True), 0) if scheme.activations == "dynamic" else np.array(high)
    if scheme.activation_symmetric:
        highs = np.maximum(-lows, highs)
        lows = -highs
    step = np.maximum((highs - lows) / (2**scheme.activation_bits - 1), 1e-30)
    rounded: Array = np.clip(np.rint(rows / step), np.rint(lows / step), np.rint(highs / step)) * step
    return rounded
