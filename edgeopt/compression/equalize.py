"""Cross-layer equalization: channels of one layer get weights of one magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.dataflow import Dataflow, Family, follow, ranges_without
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.graph import Operator
from edgeopt.compression.surgery import Surgery
from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Array, LayerRules, Model, Scheme, StepRecord

#: Sweeps end when no factor changes by more than this, or after so many of them.
_CONVERGED = 1e-3
_MAX_SWEEPS = 100
#: An activation's size over the norm of the weights that write it, for inputs of about unit variance.
_DEVIATIONS = 3.0
#: A bias stands out from those of the other channels when it is so many times their median.
_OUTLYING = 4.0


@dataclass(frozen=True, slots=True)
class Equalize:
    """Rescale channels between layers until what writes a channel and what reads it have equally large weights.

    Nagel et al. 2019, *Data-Free Quantization Through Weight Equalization and Bias Correction*, section 4.1: a
    channel's factor is s = sqrt(r1 / r2), where r1 and r2 are the largest magnitudes of the weights that write and
    that read it; weights and bias of the writer are divided by s and the reader's multiplied. Swept over the network
    until nothing moves. Here r1 and r2 are geometric means over all writers and readers, so that the channels of a
    residual stream, which share one factor, are balanced over all its blocks.

    No factor makes a bias larger than it was where it would then stand out from the other channels' biases and from
    what the layer's weights put out: a channel whose weights training has all but removed would otherwise stretch the
    activations' range by its bias alone.

    A factor passes through ReLU, LeakyReLU, PReLU, pooling, additions, concatenations, reshapes and attention's
    weighted mean; not through ReLU6, hardswish, GELU or sigmoid, where the function would change. Batch
    normalizations are folded first. Layers that stay float are rescaled along, but their weights count for nothing.
    """

    name: ClassVar[str] = "equalize"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = True

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        if not scheme.is_quantized:
            return "nothing is quantized"
        try:
            flow = follow(fold(model)[0])
        except ConversionError as error:
            return error.problem
        return None if _families(flow) else "no two layers with weights have channels between them that can be rescaled"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        folded, _ = fold(model)
        if folded.module is None:
            raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
        flow = follow(folded)
        surgery = Surgery(folded.module)
        magnitudes = {name: _magnitudes(operator, surgery.get(name)) for name, operator in flow.operators.items()}
        factors = _balance(flow, magnitudes, _biases(flow, surgery), inputs.rules)
        flow.rescale(surgery, factors)
        moved = int(np.count_nonzero(np.abs(np.log(factors)) > _CONVERGED))
        record = StepRecord(self.name, {"channels": moved})
        ranges = ranges_without(model.input_ranges, flow.rescaled_inputs(factors))
        return replace(model, module=surgery.module, native=None, history=(*model.history, record), input_ranges=ranges)


def _families(flow: Dataflow) -> list[Family]:
    """Those whose channels go from weights to weights; a normalization's are `Smooth`'s to rescale."""
    return [
        family
        for family in flow.families()
        if all(flow.operators[name].kind != "affine" for name in (*family.producers, *family.consumers))
    ]


def _magnitudes(operator: Operator, weight: Array) -> Array:
    """Largest weight of each pair of channels: no factor tells a kernel's positions apart."""
    indices = [index for index in (operator.out_index, operator.in_index) if index is not None]
    inner = tuple(axis for axis in range(weight.ndim) if all(index.shape[axis] == 1 for index in indices))
    largest: Array = np.abs(weight).max(axis=inner, keepdims=True)
    return largest


def _biases(flow: Dataflow, surgery: Surgery) -> dict[str, Array]:
    """Their magnitudes per output channel, of the operators that have any."""
    return {
        name: np.abs(surgery.get(operator.bias)).reshape(-1)
        for name, operator in flow.operators.items()
        if operator.bias is not None
    }


def _balance(flow: Dataflow, magnitudes: Mapping[str, Array], biases: Mapping[str, Array], rules: LayerRules) -> Array:
    """The factor of each class."""
    factors = np.ones(flow.labels)
    families = _families(flow)
    for _ in range(_MAX_SWEEPS):
        largest_step = 0.0
        for family in families:
            written, read = (
                _mean_range(flow, names, side, family, magnitudes, factors, rules)
                for names, side in ((family.producers, flow.writes), (family.consumers, flow.reads))
            )
            before = factors[family.classes]
            factors[family.classes] = before * _step(written, read)
            factors[family.classes] = np.maximum(
                factors[family.classes], _floor(flow, family, magnitudes, biases, factors)
            )
            largest_step = max(largest_step, float(np.abs(np.log(factors[family.classes] / before)).max()))
        if largest_step < _CONVERGED:
            break
    return factors


def _mean_range(
    flow: Dataflow,
    names: tuple[str, ...],
    side: Mapping[str, Array],
    family: Family,
    magnitudes: Mapping[str, Array],
    factors: Array,
    rules: LayerRules,
) -> Array:
    """Per class, the geometric mean over the operators of their largest weight on that side; NaN for no weights,
    0 where one of them has only zeros."""
    logs = []
    for name in names:
        operator = flow.operators[name]
        if layer_is_exempt(operator.layer, rules.keep_float):
            continue
        index = operator.out_index if side is flow.writes else operator.in_index
        assert index is not None
        scaled = flow.scaled(name, magnitudes[name], factors)
        across = tuple(axis for axis, size in enumerate(index.shape) if size == 1)
        largest = np.zeros(flow.labels)
        np.maximum.at(largest, side[name][index].ravel(), scaled.max(axis=across, keepdims=True).ravel())
        with np.errstate(divide="ignore"):
            logs.append(np.log(largest[family.classes]))
    if not logs:
        return np.full(len(family.classes), np.nan)
    mean: Array = np.exp(np.mean(logs, axis=0))
    return mean


def _floor(
    flow: Dataflow, family: Family, magnitudes: Mapping[str, Array], biases: Mapping[str, Array], factors: Array
) -> Array:
    """Per class, the smallest factor at which no writer's bias grows until it stands out."""
    floor = np.zeros(flow.labels)
    for name in family.producers:
        if name not in biases:
            continue
        index = flow.operators[name].out_index
        across = tuple(axis for axis, size in enumerate(index.shape) if size == 1)
        norms = np.sqrt((flow.scaled(name, magnitudes[name], factors) ** 2).sum(axis=across))
        typical = np.median(biases[name] / factors[flow.writes[name]])
        limit = max(_DEVIATIONS * norms.max(), _OUTLYING * typical, float(np.finfo(np.float32).tiny))
        np.maximum.at(floor, flow.writes[name], np.minimum(biases[name] / limit, 1.0))
    smallest: Array = floor[family.classes]
    return smallest


def _step(written: Array, read: Array) -> Array:
    """What to multiply factors by. A channel that is never written, or never read, just moves to the others' level."""
    step = np.ones_like(written)
    is_alive = (written > 0) & (read > 0)
    step[is_alive] = np.sqrt(written[is_alive] / read[is_alive])
    if is_alive.any():
        level = np.exp(np.log(written[is_alive] * read[is_alive]).mean() / 2)
        only_written, only_read = (written > 0) & (read == 0), (read > 0) & (written == 0)
        step[only_written] = written[only_written] / level
        step[only_read] = level / read[only_read]
    return step
