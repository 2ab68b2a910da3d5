from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.calibration.weights import quantize_weight
from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.correct_bias import CorrectBias
from edgeopt.compression.expectations import Normal, expected_inputs, norm_statistics
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.layers import arguments_of, by_identity, find_layers, intercept
from edgeopt.compression.moments import MomentSums
from edgeopt.compression.round_adaptively import RoundAdaptively
from edgeopt.compression.simulation import InputQuantizer, input_ranges, quantized_weight
from edgeopt.errors import ConversionError
from edgeopt.progress import Silent
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, StepRecord, TensorSpec

STATIC = Scheme("w8a8", "static")
INT4 = Scheme("w4", "none")


def samples(shape: tuple[int, ...], count: int = 16) -> list[Sample]:
    generator = np.random.default_rng(1)
    # Channels that move together, as pictures' do: what compensation lives on.
    common = generator.normal(size=(count, 1, 1, *shape[2:]))
    values = (common + 0.3 * generator.normal(size=(count, *shape))).astype(np.float32)
    return [Sample({"x": value}, None, str(i)) for i, value in enumerate(values)]


def model_of(module: nn.Module, shape: tuple[int, ...]) -> Model:
    spec = TensorSpec("x", shape, "float32")
    arrays = samples(shape, 1)[0].inputs
    return Model("m", module.eval(), None, (spec,), (), arrays, None, (), (), "")


def inputs_of(model: Model, scheme: Scheme, *, rules: LayerRules | None = None, data: bool = True) -> PassInputs:
    items = samples(tuple(int(str(size)) for size in model.inputs[0].shape))
    stream = (lambda: iter(items)) if data else None
    return PassInputs(scheme, stream, len(items), 0, Silent(), EstimatorSpec(), rules or LayerRules())


def convnet() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, groups=16, padding="same", dilation=2),
        nn.ReLU6(),
        nn.Conv2d(16, 12, 1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 2, stride=2),
        nn.Flatten(1),
        nn.Linear(4 * 16 * 16, 10),
    )
    return model_of(net, (1, 3, 16, 16))


def simulated_db(model: Model, of: Model, scheme: Scheme) -> float:
    """SQNR of the model, quantized as exporters do, against the float outputs of the other one."""
    assert model.module is not None
    assert of.module is not None
    inputs = inputs_of(model, scheme)
    layers = find_layers(model, model.module)
    quantize = InputQuantizer(inputs, input_ranges(model, model.module, layers, inputs))
    signal = noise = 0.0
    assert inputs.samples is not None
    for sample in inputs.samples():
        arguments = arguments_of(model.inputs, sample.inputs)
        with torch.no_grad():
            exact = of.module(*arguments)
            with intercept(
                by_identity(model.module, layers),
                lambda call: call.result(
                    quantize(call.layer, call.input), quantized_weight(call.layer, call.weight, scheme)
                ),
            ):
                found = model.module(*arguments)
        signal += float((exact**2).sum())
        noise += float(((exact - found) ** 2).sum())
    return 10 * float(np.log10(signal / noise))


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize(
    ("scheme", "gain_db"),
    [
        # At 8 bits this small network's error is nearly all in its activations.
        (STATIC, -0.2),
        (replace(STATIC, weight_granularity="per-tensor"), -0.2),
        (INT4, 4.0),
        (replace(INT4, weight_granularity="per-group"), 4.0),
        (replace(INT4, weight_symmetric=False), 3.0),
        (replace(INT4, weight_estimator="mse", scale="power-of-two"), 4.0),
        (replace(INT4, weight_estimator="hqq"), 4.0),
        (replace(INT4, precision="8da4w", activations="dynamic"), 4.0),
    ],
)
def test_outputs_come_closer_and_weights_lie_on_the_exporters_grid(method: str, scheme: Scheme, gain_db: float) -> None:
    model = convnet()
    rounded = run_pass(RoundAdaptively(method=method), model, inputs_of(model, scheme))  # type: ignore[arg-type]
    assert simulated_db(rounded, model, scheme) > simulated_db(model, model, scheme) + gain_db
    assert rounded.module is not None
    for layer in find_layers(rounded, rounded.module):
        weight = rounded.module.get_parameter(layer.weight).detach().numpy()
        np.testing.assert_allclose(
            quantize_weight(weight, scheme, layer.axis).dequantize(),
            weight,
            atol=(1e-6 if layer.kind != "transposed convolution" else 1) * np.abs(weight).max(),
        )


def test_the_same_run_gives_the_same_weights() -> None:
    model = convnet()
    first, second = (run_pass(RoundAdaptively(positions=20), model, inputs_of(model, INT4)) for _ in range(2))
    assert first.module is not None
    assert second.module is not None
    other = second.module.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.module.state_dict().items())
    assert first.history == second.history


def test_exempt_layers_stay_as_they_are() -> None:
    model = convnet()
    rounded = run_pass(RoundAdaptively(), model, inputs_of(model, INT4, rules=LayerRules(keep_float=("4", "8"))))
    assert model.module is not None
    assert rounded.module is not None
    old, new = model.module.state_dict(), rounded.module.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        "0.weight", "2.weight", "2.bias", "6.bias", "6.weight"
    } - ({"6.weight"} if torch.equal(old["6.weight"], new["6.weight"]) else set())  # fmt: skip


def test_batch_norms_must_be_folded_first() -> None:
    model = model_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), (1, 3, 4, 4))
    with pytest.raises(ConversionError, match="run fold-batch-norm before"):
        run_pass(RoundAdaptively(), model, inputs_of(model, INT4))


def test_not_applicable() -> None:
    assert "fp16" in str(RoundAdaptively().not_applicable(convnet(), Scheme("fp16", "none")))
    assert "k-means" in str(RoundAdaptively().not_applicable(convnet(), replace(INT4, weight_values="k-means")))
    assert "no layers" in str(RoundAdaptively().not_applicable(model_of(nn.ReLU(), (1, 3, 4, 4)), INT4))
    sparse = replace(convnet(), history=(StepRecord("sparsify"),))
    assert "away from zero" in str(RoundAdaptively().not_applicable(sparse, INT4))
    assert RoundAdaptively().not_applicable(convnet(), INT4) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        lambda: nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(2, 0)),
        lambda: nn.Conv2d(4, 4, (5, 3), padding="same", dilation=(1, 2)),
        lambda: nn.Conv3d(4, 2, 2),
        lambda: nn.Linear(6, 3),
    ],
)
def test_moments_are_those_of_what_the_kernel_covers(make: Callable[[], nn.Module]) -> None:
    """Weights times the input's moments must give the moments of the output."""
    torch.manual_seed(0)
    net = make()
    spatial = {3: 1, 4: 2, 5: 3}.get(net.weight.ndim, 1)  # type: ignore[union-attr,operator,arg-type]
    model = model_of(net, (1, 4, *[6] * spatial))
    (layer,) = find_layers(model, net)
    sums = MomentSums(layer, 10_000, torch.Generator().manual_seed(0))
    outputs = []
    for sample in islice(samples((1, 4, *[6] * spatial)), 3):
        x = torch.tensor(sample.inputs["x"])
        with torch.no_grad():
            outputs.append(net(x))
        sums.add(x, outputs[-1])
    moments = sums.moments(centered=True)
    weight = net.weight.detach().double().reshape(layer.groups, layer.shape[0] // layer.groups, -1)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(moments.output_covariance, weight @ moments.input_covariance, rtol=1e-4, atol=1e-5)
    bias = net.bias.detach().double().reshape(layer.groups, -1)  # type: ignore[union-attr,operator]
    mean = (weight @ moments.input_mean[:, :, None])[..., 0] + bias
    torch.testing.assert_close(moments.output_mean, mean, rtol=1e-4, atol=1e-5)


def test_bias_correction_from_samples_restores_the_means() -> None:
    model = convnet()
    corrected = run_pass(CorrectBias(), model, inputs_of(model, INT4))
    assert simulated_db(corrected, model, INT4) > simulated_db(model, model, INT4) + 3


def normed() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 2)
        norm.momentum = None
    net.train()
    with torch.no_grad():
        for sample in samples((1, 3, 16, 16)):
            net(torch.tensor(sample.inputs["x"]))
    return model_of(net, (1, 3, 16, 16))


def test_bias_correction_without_samples_goes_by_batch_norms() -> None:
    model = normed()
    corrected = run_pass(CorrectBias(), model, inputs_of(model, INT4, data=False))
    assert corrected.history[-1].config["layers"] == 2
    assert simulated_db(corrected, model, INT4) > simulated_db(model, model, INT4) + 1


def test_without_samples_or_batch_norms_there_is_nothing_to_go_by() -> None:
    with pytest.raises(ConversionError, match="give --calibration DATA"):
        run_pass(CorrectBias(), convnet(), inputs_of(convnet(), INT4, data=False))


def test_the_mean_of_a_clipped_normal() -> None:
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    mean, deviation = torch.tensor([-1.0, 0.5, 5.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    values = mean[:, None] + deviation[:, None] * draws
    normal = Normal(mean, deviation)
    for lowest, highest in ((0.0, 6.0), (0.0, float("inf")), (-1.0, 1.0), (-float("inf"), 2.0)):
        expected = values.clamp(lowest, highest).mean(1)
        torch.testing.assert_close(normal.clipped(lowest, highest).expectation(), expected, rtol=0, atol=0.02)


def test_distributions_are_followed_through_clips_only() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.a(x))
            x = self.b(torch.clamp(x, min=0, max=3))
            y = self.c(torch.sigmoid(x))
            out: torch.Tensor = self.d(x.add_(y))
            return out

    model = model_of(Net(), (1, 4, 3, 3))
    statistics = norm_statistics(model)
    assert list(statistics) == ["a.weight"]
    found = expected_inputs(fold(model)[0], {**statistics, "b.weight": statistics["a.weight"]})
    assert list(found) == ["b.weight"]


def test_a_bias_that_is_no_parameter_stays() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight, torch.full((4,), 50.0))

    model = model_of(Shifted(), (1, 3, 8, 8))
    rounded = run_pass(RoundAdaptively(method="adaround"), model, inputs_of(model, INT4))
    assert simulated_db(rounded, model, INT4) >= simulated_db(model, model, INT4)


@pytest.mark.parametrize("constant", [2026.0, 1.01325e5])
def test_a_feature_that_never_varies_is_no_obstacle(constant: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    values = np.random.default_rng(0).normal(size=(16, 1, 8)).astype(np.float32)
    values[:, 0, 0] = constant
    model = model_of(net, (1, 8))
    stream = [Sample({"x": value}, None, "") for value in values]
    inputs = PassInputs(STATIC, lambda: iter(stream), len(stream), 0, Silent(), EstimatorSpec(), LayerRules())
    rounded = run_pass(RoundAdaptively(), model, inputs)
    assert rounded.module is not None
    assert all(value.isfinite().all() for value in rounded.module.state_dict().values())


def test_moments_do_not_cancel_under_a_large_mean() -> None:
    net = nn.Linear(3, 2)
    (layer,) = find_layers(model_of(net, (1, 3)), net)
    sums = MomentSums(layer, 100, torch.Generator().manual_seed(0))
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)) * 0.01 + torch.tensor([2026.0, 1e5, 0.0])
    x[:, 1] = 1e5
    for part in x.split(8):
        sums.add(part, part[:, :2])
    moments = sums.moments(centered=True)
    exact = torch.cov(x.double().mT, correction=0)
    torch.testing.assert_close(moments.input_covariance[0], exact, rtol=1e-3, atol=1e-9)
    raw = sums.moments(centered=False).input_covariance[0]
    torch.testing.assert_close(raw, x.double().mT @ x.double() / 64, rtol=1e-6, atol=1e-9)


def test_values_that_are_not_finite_are_reported_with_their_layer() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model = model_of(net, (1, 8))
    bad = np.full((1, 8), np.inf, np.float32)
    inputs = PassInputs(
        INT4, lambda: iter([Sample({"x": bad}, None, "")]), 1, 0, Silent(), EstimatorSpec(), LayerRules()
    )
    with pytest.raises(ConversionError, match="layer '0': reads"):
        run_pass(RoundAdaptively(), model, inputs)
