"""The passes that edit float weights: what they keep, what they gain, and when they say that they don't apply."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeopt.calibration.weights import quantize_weight
from edgeopt.compression.absorb_high_bias import AbsorbHighBias
from edgeopt.compression.base import Pass, PassInputs, check_same_function, forward, run_pass
from edgeopt.compression.clip_outliers import ClipOutliers
from edgeopt.compression.equalize import Equalize
from edgeopt.compression.fold_batch_norm import FoldBatchNorm
from edgeopt.compression.round_adaptively import RoundAdaptively
from edgeopt.compression.smooth import Smooth
from edgeopt.errors import ConversionError
from edgeopt.progress import Silent
from edgeopt.types import Array, EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

INT8 = Scheme("w8a8", "static", "per-tensor")


def model_of(module: nn.Module, shape: tuple[int, ...] = (1, 3, 10, 10)) -> Model:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return Model("net", module.eval(), None, (TensorSpec("x", shape, "float32"),), (), {"x": values}, None, (), (), "")


def inputs_of(model: Model, scheme: Scheme = INT8, keep_float: tuple[str, ...] = ()) -> PassInputs:
    shape = model.example_inputs["x"].shape

    def samples() -> Iterator[Sample]:
        random = np.random.default_rng(3)
        for index in range(8):
            yield Sample({"x": random.standard_normal(shape).astype(np.float32)}, None, str(index))

    return PassInputs(scheme, samples, 8, 0, Silent(), EstimatorSpec(), LayerRules(keep_float))


def weights(model: Model) -> dict[str, torch.Tensor]:
    assert model.module is not None
    return model.module.state_dict()


def difference_db(model: Model, other: Model) -> float:
    (wanted,), (found,) = (forward(one, model.example_inputs) for one in (model, other))
    return 10 * float(torch.log10((wanted**2).sum() / ((wanted - found) ** 2).sum().clamp(min=1e-30)))


def trained(norm: nn.Module) -> nn.Module:
    """A batch normalization with statistics that matter."""
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2.0) if name != "bias" else tensor.data.normal_()
    return norm


# --- fold-batch-norm -------------------------------------------------------------------------------------------------


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = trained(nn.BatchNorm2d(3))
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = trained(nn.BatchNorm2d(8))
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.bn2 = trained(nn.BatchNorm2d(6, affine=False))
        self.frozen = nn.Conv2d(6, 4, 1)
        self.mean, self.var = nn.Buffer(torch.randn(4)), nn.Buffer(torch.rand(4) + 0.5)
        self.linear = nn.Linear(4, 5)
        self.bn3 = trained(nn.BatchNorm1d(5))
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.bn4 = trained(nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv(self.before(x))))
        x = functional.batch_norm(self.frozen(self.bn2(self.up(x))), self.mean, self.var)
        y = self.read_twice(x)
        return self.bn3(self.linear((y + self.bn4(y)).mean((2, 3))))


def test_fold_keeps_the_function_and_the_layer_names() -> None:
    model = model_of(Normalized())
    folded = run_pass(FoldBatchNorm(), model, inputs_of(model))
    assert folded.history[-1].config == {"folded": 4}
    assert isinstance(folded.module, Normalized)
    assert isinstance(folded.module.bn1, nn.Identity)
    assert isinstance(folded.module.bn4, nn.BatchNorm2d), "its input has another reader"
    assert isinstance(folded.module.before, nn.BatchNorm2d), "nothing comes before it"
    assert folded.module.conv.bias is not None
    torch.testing.assert_close(weights(folded)["var"], torch.ones(4), atol=1e-4, rtol=0), "functional: an identity"


def test_fold_keeps_the_module_where_the_code_around_asks_for_it() -> None:
    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), trained(nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x)) * self.bn.num_features

    model = model_of(Curious())
    folded = run_pass(FoldBatchNorm(), model, inputs_of(model))
    assert weights(folded)["bn.bias"].abs().max() == 0


def test_fold_leaves_shared_layers_alone() -> None:
    class SharedConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d(3)), trained(nn.BatchNorm2d(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    reason = FoldBatchNorm().not_applicable(model_of(SharedConv()), INT8)
    assert reason == "no batch normalization follows a layer that it can be folded into"


# --- equalize --------------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """An inverted residual with batch normalization and ReLU6: only the bottlenecks can be rescaled."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), trained(nn.BatchNorm2d(8))
        self.expand, self.depth = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project, self.head = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x))
        x = x + self.project(self.activation(self.depth(self.activation(self.expand(x)))))
        return self.head(x.mean((2, 3)))


def rescaled(model: Model, factors: Array) -> Model:
    """The same function with other channel scales, edited by hand on a folded network."""
    assert isinstance(model.module, Inverted)
    f = torch.from_numpy(factors).float()
    net = model.module
    for layer in (net.stem, net.project):
        assert layer.bias is not None
        layer.weight.div_(f[:, None, None, None])
        layer.bias.div_(f)
    net.expand.weight.mul_(f[None, :, None, None])
    net.head.weight.mul_(f)
    return model


def rounding_db(model: Model) -> float:
    """SQNR of the model with per-tensor int8 weights."""
    import copy

    module = copy.deepcopy(model.module)
    assert module is not None
    for tensor in module.parameters():
        if tensor.dim() > 1:
            tensor.data = torch.from_numpy(quantize_weight(tensor.numpy(), INT8, None).dequantize())
    return difference_db(model, replace(model, module=module))


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish])
def test_equalize_undoes_any_rescaling_of_a_residual_stream(activation: type[nn.Module]) -> None:
    plain = run_pass(FoldBatchNorm(), model_of(Inverted(activation)), inputs_of(model_of(Inverted(activation))))
    wanted = run_pass(Equalize(), plain, inputs_of(plain))
    factors = np.exp(np.random.default_rng(0).uniform(-np.log(100), np.log(100), 8))
    bad = rescaled(plain, factors)
    assert rounding_db(bad) < 10
    good = run_pass(Equalize(), bad, inputs_of(bad))
    assert rounding_db(good) > 30
    for name, tensor in weights(wanted).items():
        torch.testing.assert_close(weights(good)[name], tensor, rtol=2e-3, atol=1e-5)


def test_equalize_balances_both_sides_and_folds_first() -> None:
    model = model_of(Inverted(nn.ReLU))
    done = weights(run_pass(Equalize(), model, inputs_of(model)))
    written, read = done["expand.weight"].abs().amax((1, 2, 3)), done["depth.weight"].abs().amax((1, 2, 3))
    torch.testing.assert_close(written, read, rtol=5e-3, atol=0.0)
    assert "bn.running_var" not in done


def test_equalize_survives_dead_channels() -> None:
    module = Inverted(nn.ReLU)
    module.expand.weight.data[3] = 0
    module.depth.weight.data[5] = 0
    module.expand.weight.data[7] = 0
    module.depth.weight.data[7] = 0
    model = model_of(module)
    done = run_pass(Equalize(), model, inputs_of(model))
    assert all(tensor.isfinite().all() for tensor in weights(done).values())


def test_layers_that_stay_float_count_for_nothing() -> None:
    model = run_pass(FoldBatchNorm(), model_of(Inverted()), inputs_of(model_of(Inverted())))
    done = run_pass(Equalize(), model, inputs_of(model, keep_float=("stem", "project")))
    assert all(torch.equal(weights(done)[name], tensor) for name, tensor in weights(model).items())


def test_equalize_says_when_there_is_nothing_to_do() -> None:
    model = model_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)))
    reason = "no two layers with weights have channels between them that can be rescaled"
    assert Equalize().not_applicable(model, INT8) == reason
    assert Equalize().not_applicable(model, Scheme("fp16", "none")) == "nothing is quantized"
    with pytest.raises(ConversionError, match="pass 'equalize': does not apply: no two layers"):
        run_pass(Equalize(), model, inputs_of(model))


# --- absorb-high-bias ------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    def __init__(self, activation: nn.Module, padding: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 1)
        self.first.bias.data[:] = torch.tensor([30.0, 30.0, 0.0, 0.0, 0.0, 0.0])
        self.first.weight.data *= 0.2
        self.activation = activation
        self.second = nn.Conv2d(6, 4, 3, padding=padding, bias=False)
        self.head = nn.Linear(4 * 16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.activation(self.first(x)), 2)
        return self.head(functional.adaptive_avg_pool2d(self.second(x), 4).flatten(1))


def test_high_biases_move_on() -> None:
    model = model_of(Biased(nn.ReLU()))
    done = run_pass(AbsorbHighBias(), model, inputs_of(model))
    assert done.history[-1].config == {"channels": 2}
    assert weights(done)["first.bias"][:2].max() < 5
    assert difference_db(model, done) > 40
    assert isinstance(done.module, Biased)
    assert done.module.second.bias is not None


def test_clipped_channels_are_not_absorbed() -> None:
    model = model_of(Biased(nn.ReLU6()))
    done = run_pass(AbsorbHighBias(), model, inputs_of(model))
    assert done.history[-1].config == {"channels": 0}


def test_padding_cannot_absorb() -> None:
    model = model_of(Biased(nn.ReLU(), padding=1))
    reason = "no ReLU lies between two layers of which the second takes no padding"
    assert AbsorbHighBias().not_applicable(model, INT8) == reason
    assert AbsorbHighBias().not_applicable(model, Scheme("w8", "none")) == "activations are not quantized"


# --- smooth ----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm.weight.data[:2] = 60.0
        self.fc1.weight.data[:, :2] *= 0.02

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(functional.gelu(self.fc1(self.norm(x))))


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("scheme", [INT8, Scheme("w8a8", "static"), Scheme("w8a8", "dynamic")])
def test_activation_outliers_move_into_the_weights(alpha: float | None, scheme: Scheme) -> None:
    model = model_of(Encoder(), (1, 6, 32))
    done = run_pass(Smooth(alpha), model, inputs_of(model, scheme))
    assert done.history[-1].config == {"alpha": alpha, "activations": 1}
    gain = weights(done)["norm.weight"].abs()
    assert gain.max() / gain.median() < 20


def test_smooth_leaves_well_behaved_activations_alone() -> None:
    module = Encoder()
    module.norm.weight.data[:] = 1
    module.fc1.weight.data[:] = torch.where(torch.rand(64, 32) < 0.5, -0.1, 0.1)
    model = model_of(module, (1, 6, 32))
    done = run_pass(Smooth(), model, inputs_of(model, Scheme("w8a8", "static")))
    assert all(torch.allclose(weights(done)[name], tensor, rtol=0.5) for name, tensor in weights(model).items())


def test_smooth_sees_inside_multi_head_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="relu", batch_first=True, norm_first=True)
    model = model_of(layer, (1, 6, 16))
    layer.norm1.weight[0] = 80.0
    done = run_pass(Smooth(), model, inputs_of(model, Scheme("w8a8", "static")))
    assert weights(done)["norm1.weight"][0] < 40


def test_smooth_obeys_rules_and_schemes() -> None:
    model = model_of(Encoder(), (1, 6, 32))
    done = run_pass(Smooth(), model, inputs_of(model, keep_float=("fc1",)))
    assert all(torch.equal(weights(done)[name], tensor) for name, tensor in weights(model).items())
    assert Smooth().not_applicable(model, Scheme("w8", "none")) == "activations are not quantized"
    convolutional = model_of(Inverted())
    assert Smooth().not_applicable(convolutional, INT8) == "no linear layer reads channels that can be rescaled"


# --- clip-outliers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        INT8,
        Scheme("w4", "none"),
        Scheme("w4", "none", "per-group", group_size=16),
        Scheme("w4", "none", weight_symmetric=False),
    ],
)
def test_clipped_weights_round_as_the_mse_estimator_does(scheme: Scheme) -> None:
    module = nn.Sequential(nn.Linear(512, 256))
    module[0].weight.data = torch.from_numpy(np.random.default_rng(0).laplace(size=(256, 512))).float()
    model = model_of(module, (1, 512))
    done = run_pass(ClipOutliers(), model, inputs_of(model, scheme))
    axis = None if scheme.weight_granularity == "per-tensor" else 0
    wanted, clipped = weights(model)["0.weight"].numpy(), weights(done)["0.weight"].numpy()

    def error(values: Array, scheme: Scheme) -> float:
        return float(((quantize_weight(values, scheme, axis).dequantize() - wanted) ** 2).sum())

    assert error(clipped, scheme) < error(wanted, scheme)
    assert error(clipped, scheme) < 1.05 * error(wanted, replace(scheme, weight_estimator="mse"))
    assert 0 < np.count_nonzero(clipped != wanted) < wanted.size / 5


def test_nothing_is_clipped_without_gain() -> None:
    module = nn.Sequential(nn.Linear(16, 8))
    module[0].weight.data = torch.linspace(-1, 1, 128).reshape(8, 16)
    model = model_of(module, (1, 16))
    done = run_pass(ClipOutliers(), model, inputs_of(model))
    assert torch.equal(weights(done)["0.weight"], weights(model)["0.weight"])
    assert done.history[-1].config == {"layers": 0}


def test_clip_outliers_says_when_there_is_nothing_to_do() -> None:
    model = model_of(nn.Sequential(nn.Linear(16, 8)), (1, 16))
    mse = Scheme("w8", "none", weight_estimator="mse")
    assert ClipOutliers().not_applicable(model, mse) == "the exporter's mse scales clip already"
    palette = Scheme("w8", "none", weight_values="k-means")
    assert ClipOutliers().not_applicable(model, palette) == "k-means weights have no range to clip to"


@pytest.mark.parametrize("pass_", [FoldBatchNorm(), Equalize(), AbsorbHighBias(), Smooth(), ClipOutliers()])
def test_a_module_that_cannot_be_captured_is_not_applicable(pass_: Pass) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if x.sum() > 0 else x

    reason = pass_.not_applicable(model_of(Branching(), (2, 3)), INT8)
    assert reason is not None
    assert reason.startswith("torch.export can't follow the model: ")


# --- what all of them keep -------------------------------------------------------------------------------------------


def exported(module: nn.Module, shape: tuple[int, ...] = (1, 3, 10, 10)) -> Model:
    model = model_of(module, shape)
    graph = torch.export.export(module, (torch.tensor(model.example_inputs["x"]),)).module()
    return replace(model, module=graph)


def bare() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1, bias=False)
    norms = trained(nn.BatchNorm2d(8)), trained(nn.BatchNorm2d(4, affine=False))
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1])


def test_an_exported_graph_gets_the_biases_that_its_batch_norms_become() -> None:
    model = exported(bare())
    folded = run_pass(FoldBatchNorm(), model, inputs_of(model))
    assert folded.history[-1].config == {"folded": 2}
    assert isinstance(folded.module, torch.fx.GraphModule)
    assert not any("batch_norm" in str(node.target) for node in folded.module.graph.nodes)
    equalized = run_pass(Equalize(), model, inputs_of(model))
    written, read = weights(equalized)["0.weight"].abs().amax((1, 2, 3)), weights(equalized)["3.weight"].abs()
    torch.testing.assert_close(written, read.amax((0, 2, 3)), rtol=5e-3, atol=0.0)
    rounded = run_pass(RoundAdaptively(), folded, inputs_of(folded))
    assert difference_db(model, rounded) > 30


def test_fold_says_when_a_layer_takes_no_bias() -> None:
    class Deaf(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, self.weight)

    model = model_of(nn.Sequential(Deaf(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    reason = "the code of layer '0' takes no bias, which its batch normalization would become"
    assert FoldBatchNorm().not_applicable(model, INT8) == reason


def test_equalize_does_not_blow_up_the_bias_of_a_channel_without_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net[1].weight.data[0], net[1].bias.data[0] = 1e-6, 0.5
    model = model_of(net)
    done = run_pass(Equalize(), model, inputs_of(model))
    assert isinstance(done.module, nn.Sequential)
    x = torch.tensor(model.example_inputs["x"])
    assert done.module[:3](x).max() < 2 * net[:3](x).max()


def test_ranges_of_moved_inputs_are_forgotten() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    net[0].bias.data += 9
    learned = {"0": (-1.0, 1.0), "2": (0.0, 9.0)}
    for pass_ in (Equalize(), AbsorbHighBias()):
        model = replace(model_of(net), input_ranges=learned)
        assert run_pass(pass_, model, inputs_of(model)).input_ranges == {"0": (-1.0, 1.0)}
    model = replace(model_of(Encoder(), (1, 6, 32)), input_ranges={"fc1": (-9.0, 9.0), "fc2": (-1.0, 1.0)})
    smoothed = run_pass(Smooth(alpha=0.5), model, inputs_of(model, Scheme("w8a8", "static", "per-tensor")))
    assert smoothed.input_ranges == {"fc2": (-1.0, 1.0)}


class Pooled(nn.Module):
    def __init__(self, divisor: int | None) -> None:
        super().__init__()
        self.first, self.second, self.divisor = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), divisor
        nn.init.constant_(self.first.bias, 9.0)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = functional.avg_pool2d(torch.relu(self.first(x)), 2, divisor_override=self.divisor)
        return self.second(pooled)


def test_pooling_with_a_divisor_of_its_own_cannot_absorb() -> None:
    assert AbsorbHighBias().not_applicable(model_of(Pooled(None)), INT8) is None
    assert AbsorbHighBias().not_applicable(model_of(Pooled(1)), INT8) is not None


def test_a_layer_that_no_sample_reaches_absorbs_nothing() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.a(x) if x.shape[0] == 1 else self.b(x)))

    model = model_of(Branching(), (1, 3, 4, 4))
    stream = [Sample({"x": np.ones((2, 3, 4, 4), np.float32)}, None, "")]
    inputs = PassInputs(INT8, lambda: iter(stream), 1, 0, Silent(), EstimatorSpec(), LayerRules())
    done = run_pass(AbsorbHighBias(), model, inputs)
    assert done.history[-1].config == {"channels": 0}
    assert all(tensor.isfinite().all() for tensor in weights(done).values())


class Scaled(nn.Module):
    def __init__(self, factor: float, threshold: float = 0.0) -> None:
        super().__init__()
        self.factor, self.threshold = factor, threshold

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 1e5, x * self.factor, (x > self.threshold).long()


def test_every_output_must_stay_the_same() -> None:
    model = model_of(Scaled(1.0))
    check_same_function(model, replace(model, module=Scaled(1.00001)), [model.example_inputs], "here")
    with pytest.raises(ConversionError, match=r"\(output 1\): 0 dB"):
        check_same_function(model, replace(model, module=Scaled(0.0)), [model.example_inputs], "here")
    with pytest.raises(ConversionError, match=r"\(output 2\): \d+ of 300 integers differ"):
        check_same_function(model, replace(model, module=Scaled(1.0, 0.1)), [model.example_inputs], "here")


def test_modules_with_state_that_is_no_tensor_are_taken() -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: object) -> None:
            del state

    model = model_of(Extra(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    assert run_pass(Equalize(), model, inputs_of(model)).history
