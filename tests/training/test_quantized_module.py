"""What is rounded where, and that training leaves the network's own code alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from edgeopt.errors import ConversionError
from edgeopt.training.fake_quant import ActivationQuantizer
from edgeopt.training.quantized_module import QuantizedModule
from edgeopt.types import EstimatorSpec, Format, LayerRules, Scheme

STATIC = Scheme("w8a8", "static")
FORMATS: tuple[Format, ...] = ("onnx", "litert", "executorch")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3), keepdim=True).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed


class Twice(nn.Module):
    """One layer, two activations of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = self.layer(x).relu()
        again: Tensor = self.layer(torch.cat([once, once * 100], -1)[..., 6:])
        return again


def quantized(
    network: nn.Module,
    shape: tuple[int, ...],
    format_: Format = "onnx",
    scheme: Scheme = STATIC,
    rules: LayerRules | None = None,
    learned: bool = False,
) -> QuantizedModule:
    torch.manual_seed(0)
    samples = [torch.randn(shape) for _ in range(8)]
    module = QuantizedModule(network.eval(), samples[:1], format_, scheme, rules or LayerRules(), learned=learned)

    def batches() -> Iterator[tuple[Tensor]]:
        return ((sample,) for sample in samples)

    module.calibrate(batches, 8, EstimatorSpec(), keep_learned=False)
    return module


def test_computes_in_float_until_it_is_calibrated() -> None:
    network, sample = Residual().eval(), torch.randn(1, 3, 8, 8)
    module = QuantizedModule(network, [sample], "onnx", STATIC, LayerRules())
    torch.testing.assert_close(module(sample), network(sample))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_fused_activation_is_rounded_once(format_: Format) -> None:
    module = quantized(Residual(), (1, 3, 8, 8), format_)
    outputs = {(site.layer, site.operator) for site, planned in module.plan.sites.items() if planned.output}
    assert ("first.2", "hardtanh") in outputs
    assert ("second.1", "batch_norm") in outputs
    assert ("", "relu") in outputs
    assert not {("first.0", "conv2d"), ("first.1", "batch_norm"), ("second.0", "conv2d"), ("", "add")} & outputs


def test_batches_are_rounded_like_single_samples() -> None:
    module = quantized(Residual(), (1, 3, 8, 8))
    batch = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(module(batch), torch.cat([module(sample[None]) for sample in batch]))


def test_exempt_layers_stay_float() -> None:
    module = quantized(Residual(), (1, 3, 8, 8), rules=LayerRules(keep_float=("first",)))
    layers = {planned.layer for planned in module.plan.weights.values()}
    assert layers == {"second.0", "head"}
    assert not any(site.layer.startswith("first") and plan.output for site, plan in module.plan.sites.items())


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ConversionError, match="nothing in the network"):
        quantized(Residual(), (1, 3, 8, 8), rules=LayerRules(keep_float=("*",)))


@pytest.mark.parametrize("format_", FORMATS)
def test_layers_inside_multi_head_attention_are_seen(format_: Format) -> None:
    module = quantized(Attention(), (1, 5, 8), format_)
    assert {p.parameter for p in module.plan.weights.values()} == {
        "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip


def test_a_shared_layer_has_a_range_for_each_call() -> None:
    module = quantized(Twice(), (1, 6), "litert", learned=True)
    quantizers = [q for q in module.activations.children() if isinstance(q, ActivationQuantizer)]
    ranges = [quantizer.range().max for quantizer in quantizers]
    assert max(ranges) > 20 * min(ranges)
    assert len(module.plan.weights) == 1
    # One name can't tell the exporter two ranges.
    assert module.learned_ranges() == {}


def test_gradients_reach_every_parameter() -> None:
    module = quantized(Residual(), (1, 3, 8, 8), learned=True)
    module.train()
    module(torch.randn(4, 3, 8, 8) * 3).square().sum().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None and not name.endswith("low")]
    assert missing == []


def test_frozen_statistics_stay_while_the_rest_trains() -> None:
    module = quantized(Residual(), (1, 3, 8, 8))
    before = module.network.get_buffer("first.1.running_mean").clone()
    module.frozen_statistics = True
    module.train()
    assert module.network.training
    module(torch.randn(4, 3, 8, 8) + 5)
    torch.testing.assert_close(module.network.get_buffer("first.1.running_mean"), before)


def test_the_original_is_untouched_and_learned_weights_lie_on_the_grid() -> None:
    network = Residual().eval()
    before = network.head.weight.detach().clone()
    module = quantized(network, (1, 3, 8, 8), learned=True)
    with torch.no_grad():
        module.network.get_parameter("head.weight").add_(0.1)
        for quantizer in module.weights.children():
            quantizer.get_parameter("scale").mul_(0.8)
    result = module.trained(network)
    torch.testing.assert_close(network.head.weight, before)
    weight = result.get_parameter("head.weight").detach()
    steps = weight / (weight.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert not any(module._forward_pre_hooks for module in result.modules())


def test_learned_ranges_are_named_by_the_layer_that_reads_them() -> None:
    module = quantized(Residual(), (1, 3, 8, 8), learned=True)
    ranges = module.learned_ranges()
    assert set(ranges) == {"first.0", "second.0", "head"}
    assert ranges["second.0"][0] == 0.0
    assert 0 < ranges["second.0"][1] <= 6.0
    assert quantized(Residual(), (1, 3, 8, 8)).learned_ranges() == {}


def test_one_scale_per_tensor_is_that_of_the_folded_weight() -> None:
    network = Residual().eval()
    with torch.no_grad():
        network.first[1].weight.copy_(torch.logspace(-1, 1, 8))
    module = quantized(network, (1, 3, 8, 8), scheme=Scheme("w8a8", "static", weight_granularity="per-tensor"))
    weight = network.first[0].weight.detach()
    factor = (network.first[1].weight / (network.first[1].running_var + network.first[1].eps).sqrt()).detach()
    folded = weight * factor.view(-1, 1, 1, 1)
    scale = folded.abs().max() / 127
    expected = (folded / scale).round() * scale / factor.view(-1, 1, 1, 1)
    torch.testing.assert_close(module.round_weight("weight_first/0/weight", weight), expected)


@pytest.mark.parametrize("scheme", [Scheme("w8a8", "dynamic"), Scheme("w8", "none")])
def test_schemes_without_calibrated_ranges_have_no_activations_to_learn(scheme: Scheme) -> None:
    module = QuantizedModule(Twice().eval(), [torch.randn(1, 6)], "litert", scheme, LayerRules())
    assert not module.plan.activations
    sample = torch.randn(3, 6)
    assert not torch.equal(module(sample), module.network(sample))
    torch.testing.assert_close(module(sample), module.network(sample), atol=0.5, rtol=0.1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_tied_weights_keep_their_learned_grid_under_every_name() -> None:
    original = Tied()
    module = quantized(original, (1, 6), learned=True)
    with torch.no_grad():
        module.quantization_parameters()[-1].mul_(0.6)  # the weight's scale
    trained = module.trained(original)
    expected = module.round_weight(next(iter(module.plan.weights)), module.network.get_parameter("first.weight"))
    assert not torch.equal(expected, original.first.weight)
    assert torch.equal(trained.get_parameter("first.weight"), expected)
    assert trained.get_parameter("second.weight") is trained.get_parameter("first.weight")
