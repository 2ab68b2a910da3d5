"""Takes the shift out of what quantized layers put out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.expectations import expected_inputs, norm_statistics
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.layers import Call, Layer, find_layers, give_biases
from edgeopt.compression.lockstep import run_in_lockstep
from edgeopt.compression.simulation import (
    InputQuantizer,
    input_ranges,
    missing_mean,
    per_channel,
    quantized_weight,
    sample_arguments,
)
from edgeopt.errors import ConversionError
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Model, Scheme, StepRecord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class CorrectBias:
    """Add to each layer's bias what its output loses in the mean through quantization, per channel.

    With samples it is measured: layer after layer, the float network's output minus that of a network whose weights
    and activations are rounded as in the exported file, with all biases before corrected already (Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, appendix D, extended to
    activations). Without samples it follows from batch norms: E[(Q(W) - W) x] with the mean of x behind a batch norm
    and its clip (section 4.2 there). They are folded on the way, since the weights are only then what is quantized;
    where they were folded before, nothing is known, so this pass then takes the place of fold-batch-norm.

    Memory holds what `samples` samples keep alive between two layers in both networks.

    Attributes:
        samples: how many take part, evenly spread.
    """

    samples: int = 32
    name: ClassVar[str] = "correct-bias"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = False

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        if not scheme.is_quantized:
            return f"{scheme.precision} rounds no weights to integers"
        if model.module is not None and not find_layers(model, model.module):
            return "the model has no layers with weights of their own"
        return None

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        if model.module is None:
            raise ValueError("a pass takes a model with a torch module")
        if inputs.samples is None:
            corrected, count = _from_norms(model, inputs)
            return replace(corrected, history=(*model.history, StepRecord(self.name, {"layers": count})))
        module = copy.deepcopy(model.module)
        count = _from_samples(model, module, inputs, self.samples)
        step = StepRecord(self.name, {"layers": count, "samples": min(self.samples, inputs.count)})
        return replace(model, module=module, history=(*model.history, step))


def _from_samples(model: Model, module: torch.nn.Module, inputs: PassInputs, limit: int) -> int:
    """Correct the module in place; returns the number of layers."""
    layers = tuple(
        layer for layer in give_biases(model, module) if not layer_is_exempt(layer.path, inputs.rules.keep_float)
    )
    quantize_input = InputQuantizer(inputs, input_ranges(model, module, layers, inputs))
    runs = sample_arguments(model, inputs, limit)
    corrected: dict[str, torch.Tensor] = {}
    steps = iter(inputs.progress.track(layers, "Correcting biases", len(layers)))

    def handle(calls: Sequence[Call]) -> list[torch.Tensor]:
        next(steps)
        exact, rounded = calls[: len(runs)], calls[len(runs) :]
        layer, bias = exact[0].layer, exact[0].bias
        weight = quantized_weight(layer, exact[0].weight, inputs.scheme)
        wanted = [call.result(call.input) for call in exact]
        found = [call.result(quantize_input(layer, call.input), weight) for call in rounded]
        if bias is None or layer.bias is None:
            return [*wanted, *found]
        shift = missing_mean(layer, found, wanted)
        corrected[layer.bias] = bias + shift
        spread = per_channel(layer, shift)
        return [*wanted, *(output + spread for output in found)]

    run_in_lockstep(module, layers, [*runs, *runs], handle)
    next(steps, None)
    _set_biases(module, corrected)
    return len(corrected)


def _from_norms(model: Model, inputs: PassInputs) -> tuple[Model, int]:
    """The folded model with corrected biases, and the number of layers."""
    statistics = norm_statistics(model)
    if not statistics:
        raise ConversionError(
            "no batch norm that says what its layers read",
            where="pass 'correct-bias'",
            fix="give --calibration DATA, or run it instead of fold-batch-norm",
        )
    folded, _ = fold(model)
    module = copy.deepcopy(folded.module)
    assert module is not None
    layers = give_biases(folded, module)
    means = expected_inputs(replace(folded, module=module), statistics)
    corrected: dict[str, torch.Tensor] = {}
    for layer in layers:
        if layer.bias is None or layer.weight not in means or layer_is_exempt(layer.path, inputs.rules.keep_float):
            continue
        weight = module.get_parameter(layer.weight).detach()
        error = (quantized_weight(layer, weight, inputs.scheme) - weight).double()
        bias = module.get_parameter(layer.bias).detach()
        corrected[layer.bias] = bias - _response(layer, error, means[layer.weight]).float()
    _set_biases(module, corrected)
    return replace(folded, module=module), len(corrected)


def _response(layer: Layer, weight: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Mean output per channel for an input of this mean per channel, borders aside."""
    if layer.kind == "linear":
        return weight @ mean
    kernel = weight.flatten(2).sum(2)
    if layer.kind == "transposed convolution":
        # Every input position is spread over stride^n outputs, each of which sees that share of the kernel.
        stride = float(np.prod(layer.stride))
        grouped = kernel.reshape(layer.groups, -1, kernel.shape[1]) / stride
        response = grouped.mT @ mean.reshape(layer.groups, -1, 1)
    else:
        response = kernel.reshape(layer.groups, -1, kernel.shape[1]) @ mean.reshape(layer.groups, -1, 1)
    return response.reshape(-1)


def _set_biases(module: torch.nn.Module, biases: dict[str, torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, bias in biases.items():
            module.get_parameter(name).copy_(bias)
