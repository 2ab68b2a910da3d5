"""Rounds each weight so that its layer's output comes closest to that of the float network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeopt.calibration.weights import quantize_weight
from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.layers import Call, Layer, find_layers, give_biases
from edgeopt.compression.lockstep import run_in_lockstep
from edgeopt.compression.moments import Moments, MomentSums
from edgeopt.compression.rounding import Grid, aim, compensate, descend
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
class RoundAdaptively:
    """Learned rounding, layer after layer, with the bias fitted along.

    Every layer is rounded for the input that it will have in the exported file, from layers that are rounded already
    and with activations rounded too, against the output that it has in the float network; so it makes up for errors
    before it as well. The result are float weights that lie exactly on the grid that exporters derive from them, so
    every format takes the same integers. Batch norms should be folded before: a layer that still feeds one is left
    alone, and so are those that `rules` keep in float, those with shared weights and transposed convolutions (whose
    bias is fitted all the same).

    Memory holds what `samples` pictures keep alive between two layers in the float and the rounded network, and the
    layer's covariances (columns^2 per group).

    Attributes:
        method: "gptq" rounds column by column and lets later columns make up for the error (`compensate`); "adaround"
            then decides between up and down against the float network's output (`descend`). None takes gptq at eight
            bits, where the second does nothing but learn the samples by heart, and adaround below.
        samples: how many samples take part, evenly spread.
        positions: of each sample's output positions (pixels, tokens), how many count in a layer, chosen at random.
        max_columns: layers with more weights per output than this only have their bias fitted.
    """

    method: Literal["gptq", "adaround"] | None = None
    samples: int = 32
    positions: int = 256
    max_columns: int = 8192
    name: ClassVar[str] = "round-adaptively"
    needs: ClassVar[Needs] = "samples"
    keeps_function: ClassVar[bool] = False

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        if not scheme.is_quantized:
            return f"{scheme.precision} rounds no weights to integers"
        if scheme.weight_values != "linear":
            return f"{scheme.weight_values} weights have no even grid"
        if any(step.step == "sparsify" for step in model.history):
            return "it would round some of the sparsified weights away from zero"
        if model.module is not None and not find_layers(model, model.module):
            return "the model has no layers with weights of their own"
        return None

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        import torch

        if model.module is None:
            raise ValueError("a pass takes a model with a torch module")
        module = copy.deepcopy(model.module)
        layers = tuple(
            layer for layer in give_biases(model, module) if not layer_is_exempt(layer.path, inputs.rules.keep_float)
        )
        if not any(not layer.feeds_norm for layer in layers):
            raise ConversionError(
                "every layer feeds a batch norm, which exporters fold into the weights",
                fix="run fold-batch-norm before",
            )
        quantize_input = InputQuantizer(inputs, input_ranges(model, module, layers, inputs))
        runs = sample_arguments(model, inputs, self.samples)
        generator = torch.Generator().manual_seed(inputs.seed)
        fitted: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        steps = iter(inputs.progress.track(layers, "Rounding weights", len(layers)))

        def handle(calls: Sequence[Call]) -> list[torch.Tensor]:
            next(steps)
            exact, rounded = calls[: len(runs)], calls[len(runs) :]
            layer = exact[0].layer
            outputs = [call.result(call.input) for call in exact]
            received = [quantize_input(layer, call.input) for call in rounded]
            weight, bias = exact[0].weight, exact[0].bias
            if layer.feeds_norm:
                weight = quantized_weight(layer, weight, inputs.scheme)
            else:
                weight, bias = self._fit(exact[0], received, outputs, inputs.scheme, generator)
                fitted[layer.weight] = (weight, bias if layer.bias is not None else None)
            results = (call.result(x, weight, bias) for call, x in zip(rounded, received, strict=True))
            return [*outputs, *results]

        run_in_lockstep(module, layers, [*runs, *runs], handle)
        next(steps, None)
        by_weight = {layer.weight: layer for layer in layers}
        with torch.no_grad():
            for name, (weight, bias) in fitted.items():
                module.get_parameter(name).copy_(weight)
                if bias is not None and (bias_name := by_weight[name].bias) is not None:
                    module.get_parameter(bias_name).copy_(bias)
        method = self.method or _best_method(inputs.scheme)
        step = StepRecord(
            self.name, {"method": method, "samples": len(runs), "positions": self.positions, "seed": inputs.seed}
        )
        return replace(model, module=module, history=(*model.history, step))

    def _fit(
        self,
        call: Call,
        received: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor],
        scheme: Scheme,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's weight on the grid, and its bias."""
        layer, bias = call.layer, call.bias
        columns = call.weight[0].numel()
        if layer.kind == "transposed convolution" or columns > self.max_columns:
            weight = quantized_weight(layer, call.weight, scheme)
            if bias is None or layer.bias is None:
                return weight, bias
            return weight, bias + missing_mean(layer, [call.result(x, weight) for x in received], wanted)
        sums = MomentSums(layer, self.positions, generator)
        # A bias that is no parameter stays what it is, and is no part of what the weight must put out.
        fixed = per_channel(layer, bias) if bias is not None and layer.bias is None else 0.0
        for x, y in zip(received, wanted, strict=True):
            sums.add(x, y - fixed)
        moments = sums.moments(centered=layer.bias is not None)
        try:
            weight = self._rounded(layer, call.weight, moments, scheme)
        except ArithmeticError as error:
            raise _unsolvable(layer, "reads samples whose covariance has no inverse") from error
        if not weight.isfinite().all():
            raise _unsolvable(layer, "reads or puts out values that are not finite")
        if bias is None or layer.bias is None:
            return weight, bias
        rows = weight.double().reshape(layer.groups, -1, columns)
        mean = moments.output_mean - (rows @ moments.input_mean[:, :, None])[..., 0]
        return weight, mean.reshape(-1).float()

    def _rounded(self, layer: Layer, weight: torch.Tensor, moments: Moments, scheme: Scheme) -> torch.Tensor:
        if scheme.weight_estimator == "hqq":
            # Its fit may leave the outermost integers unused, and exporters would then find another grid.
            scheme = replace(scheme, weight_estimator="mse")
        grid = Grid(quantize_weight(weight.numpy(), scheme, layer.axis), scheme, layer.groups)
        rows = aim(weight.double().reshape(grid.scale.shape), grid, moments)
        values = compensate(rows, grid, moments)
        if (self.method or _best_method(scheme)) == "adaround":
            values = descend(rows, grid, moments, values)
        # In float32, as exporters multiply: the weight must be what they decode.
        return ((values - grid.zero_point).float() * grid.scale.float()).reshape(weight.shape)


def _unsolvable(layer: Layer, problem: str) -> ConversionError:
    return ConversionError(problem, where=f"layer {layer.path!r}", fix=f"keep it in float (--keep-float {layer.path})")


def _best_method(scheme: Scheme) -> Literal["gptq", "adaround"]:
    return "gptq" if scheme.weight_bits == 8 else "adaround"
