"""The integer arithmetic of an exported file, imitated in float: what a layer's input and weight are rounded to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.calibration.weights import quantize_weight
from edgeopt.compression.base import PassInputs
from edgeopt.compression.layers import Call, Layer, arguments_of, by_identity, intercept
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Model, Scheme

if TYPE_CHECKING:
    import torch


class InputQuantizer:
    """Rounds layers' inputs as the exported file will: with calibrated ranges, with run-time ranges, or not at all."""

    def __init__(self, inputs: PassInputs, ranges: Mapping[str, Range]) -> None:
        self._scheme = inputs.scheme
        self._int16 = inputs.rules.int16_activations
        self._ranges = ranges

    def __call__(self, layer: Layer, values: torch.Tensor) -> torch.Tensor:
        bits = self._scheme.activation_bits
        if bits == 32:
            return values
        if self._scheme.activations == "static":
            bound = self._ranges[layer.weight]
        else:
            bound = Range(min(float(values.min()), 0.0), max(float(values.max()), 0.0))
        return _rounded(
            values, bound, 16 if layer_is_exempt(layer.path, self._int16) else bits, self._scheme.activation_symmetric
        )


def _rounded(values: torch.Tensor, bound: Range, bits: int, symmetric: bool) -> torch.Tensor:
    import torch

    if symmetric:
        scale = max(-bound.min, bound.max) / (2 ** (bits - 1) - 1)
        lowest, zero_point = -(2 ** (bits - 1)), 0
    else:
        scale = (bound.max - bound.min) / (2**bits - 1)
        lowest, zero_point = 0, round(-bound.min / scale) if scale > 0 else 0
    if scale < float(np.finfo(np.float32).tiny):
        return values
    steps = torch.clamp(torch.round(values / scale) + zero_point, lowest, lowest + 2**bits - 1)
    real: torch.Tensor = (steps - zero_point) * scale
    return real


def quantized_weight(layer: Layer, weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The weight as the exporters round it."""
    import torch

    return torch.from_numpy(quantize_weight(weight.detach().numpy(), scheme, layer.axis).dequantize())


def input_ranges(
    model: Model, module: torch.nn.Module, layers: tuple[Layer, ...], inputs: PassInputs
) -> dict[str, Range]:
    """The range of each layer's input, by the layer's weight, over all samples of the float network.

    Empty where the scheme needs none. Ranges that the model was trained with win. Memory doesn't grow with the samples.
    """
    import torch

    scheme = inputs.scheme
    if scheme.activations != "static" or inputs.samples is None:
        return {}
    observed = ActivationRanges(
        inputs.estimator, symmetric=scheme.activation_symmetric, bits=scheme.activation_bits, total=inputs.count
    )

    def look(call: Call) -> torch.Tensor:
        observed.update(call.layer.weight, call.input.numpy())
        return call.result(call.input)

    identities = by_identity(module, layers)
    for sample in inputs.progress.track(inputs.samples(), "Observing inputs of layers", inputs.count):
        with torch.no_grad(), intercept(identities, look):
            module(*arguments_of(model.inputs, sample.inputs))
        observed.next_sample()
    trained = {
        layer.weight: Range(*model.input_ranges[layer.path]) for layer in layers if layer.path in model.input_ranges
    }
    return observed.ranges() | trained


def sample_arguments(model: Model, inputs: PassInputs, limit: int) -> list[tuple[torch.Tensor, ...]]:
    """The arguments of at most `limit` samples, spread evenly over all of them."""
    if inputs.samples is None:
        raise ValueError("needs samples")
    every = max(1, inputs.count // limit)
    chosen = islice(islice(inputs.samples(), 0, None, every), limit)
    return [arguments_of(model.inputs, sample.inputs) for sample in chosen]


def missing_mean(layer: Layer, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """By how much each output channel's mean falls short."""
    import torch

    channel = -1 if layer.kind == "linear" else 1 - (wanted[0].ndim < len(layer.shape))
    short = [(y - x).double().movedim(channel, 0).flatten(1) for x, y in zip(found, wanted, strict=True)]
    return torch.cat(short, dim=1).mean(1).float()


def per_channel(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """One value per output channel so that it broadcasts against the layer's output."""
    return values if layer.kind == "linear" else values.reshape(-1, *[1] * (len(layer.shape) - 2))
