"""Layers as two smaller ones: what that keeps, what it leaves alone, and how ranks are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeopt.compression.base import PassInputs, forward, run_pass
from edgeopt.compression.cost import macs_of, parameters_of
from edgeopt.compression.low_rank.decompose import Factors
from edgeopt.compression.low_rank.low_rank import LowRank, factorize
from edgeopt.compression.low_rank.sites import factorizable
from edgeopt.compression.low_rank.statistics import split_all
from edgeopt.compression.steps import Goal
from edgeopt.errors import ConversionError, UsageError
from edgeopt.progress import Silent
from edgeopt.sources.adapter import adapt
from edgeopt.sources.structure import load_model, save_model
from edgeopt.types import Array, EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

SCHEME = Scheme("w8a8", "static")
PICTURE, ROWS, TOKENS = (1, 3, 16, 16), (4, 24), (1, 6, 16)


def model_of(module: nn.Module, shape: tuple[int, ...]) -> Model:
    example = {"x": data(shape, 99)}
    return Model("net", module.eval(), None, (TensorSpec("x", shape, "float32"),), (), example, None, (), (), "")


def data(shape: tuple[int, ...], seed: int) -> Array:
    """Correlated along the last dimension, with channels of different strength and a mean, like real features."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((shape[-1], shape[-1]))
    mixing *= np.exp(-np.arange(shape[-1]) / 3)[:, None]
    return (random.standard_normal(shape) @ mixing + 0.7).astype(np.float32)


def inputs_of(model: Model, count: int = 24) -> PassInputs:
    shape = model.example_inputs["x"].shape

    def samples() -> Iterator[Sample]:
        for index in range(count):
            yield Sample({"x": data(shape, index)}, None, str(index))

    return PassInputs(SCHEME, samples, count, 0, Silent(), EstimatorSpec(), LayerRules())


class Net(nn.Module):
    """Convolutions of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1))
        self.depthwise = nn.Conv2d(24, 24, 3, padding="same", groups=24)
        self.point = nn.Conv2d(24, 32, 1)
        self.same = nn.Conv2d(32, 16, 3, padding="same", padding_mode="reflect")
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.head = nn.Linear(16, 20)
        self.gate = nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = self.up(
            functional.relu(self.same(functional.relu(self.point(self.depthwise(functional.relu(self.wide(x)))))))
        )
        x = self.head(x.mean((2, 3)))
        return x * self.gate(x).sigmoid()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24, bias=False), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x + self.down(functional.gelu(self.up(x))))
        return result


def net() -> Model:
    torch.manual_seed(0)
    return model_of(Net(), PICTURE)


def mlp() -> Model:
    torch.manual_seed(0)
    return model_of(Mlp(), ROWS)


def relative_error(model: Model, other: Model) -> float:
    error = power = 0.0
    for seed in range(100, 110):
        (wanted,), (found,) = (
            forward(one, {"x": data(model.example_inputs["x"].shape, seed)}) for one in (model, other)
        )
        error, power = error + float((wanted - found).square().sum()), power + float(wanted.square().sum())
    return error / power


def full_ranks(factors: dict[str, Factors]) -> dict[str, int]:
    return {path: len(one.energies) for path, one in factors.items()}


@pytest.mark.parametrize("make", [net, mlp])
@pytest.mark.parametrize("aware", [False, True])
def test_full_rank_keeps_the_function(make: object, aware: bool) -> None:
    model = net() if make is net else mlp()
    factors = split_all(model, factorizable(model).sites, inputs_of(model) if aware else None)
    assert relative_error(model, factorize(model, full_ranks(factors), factors)) < 1e-9


@pytest.mark.parametrize("form", ["channels", "separable"])
def test_both_ways_to_split_a_convolution_are_exact_at_full_rank(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.compression.low_rank.statistics.forms_of", lambda _: (form,))
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Conv2d(3, 7, (3, 5), (2, 1), (1, 2), (1, 2))), PICTURE)
    factors = split_all(model, factorizable(model).sites, inputs_of(model))
    assert factors["0"].form == form
    assert relative_error(model, factorize(model, full_ranks(factors), factors)) < 1e-9


def test_separable_kernels_are_found() -> None:
    """Products of a column and a row, which no small number of channels can hold."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 16, 5, padding=2)
    with torch.no_grad():
        columns, rows = torch.randn(2, 3, 5, 1), torch.randn(16, 2, 1, 5)
        layer.weight.copy_(torch.einsum("rcij,orjk->ocik", columns, rows))
    model = model_of(nn.Sequential(layer), PICTURE)
    for inputs in (None, inputs_of(model)):
        factors = split_all(model, factorizable(model).sites, inputs)
        assert factors["0"].form == "separable"
        assert relative_error(model, factorize(model, {"0": 2}, factors)) < 1e-9


def test_linear_energies_are_what_the_output_loses() -> None:
    """By the Eckart-Young theorem, for samples like those that were seen."""
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(24, 16)), ROWS)
    inputs = inputs_of(model, 300)
    factors = split_all(model, factorizable(model).sites, inputs)
    assert inputs.samples is not None
    rows = torch.from_numpy(np.concatenate([sample.inputs["x"] for sample in inputs.samples()]))
    for rank in (1, 4, 9):
        found = factorize(model, {"0": rank}, factors)
        assert model.module is not None
        assert found.module is not None
        with torch.no_grad():
            error = (model.module(rows) - found.module(rows)).double()
        lost, energies = float(error.square().sum(1).mean()), factors["0"].energies
        assert lost == pytest.approx(float(energies[rank:].sum()), abs=5e-3 * float(energies.sum()))
        assert float(error.mean().abs()) < 1e-5  # the bias makes up for what the mean loses


def test_few_samples_are_not_taken_for_all_there_is() -> None:
    """Eight rows span eight directions, on which a layer could be exact while it forgets everything else."""
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(64, 64)), (1, 64))

    def samples() -> Iterator[Sample]:
        for index in range(8):
            yield Sample({"x": np.random.default_rng(index).standard_normal((1, 64)).astype(np.float32)}, None, "")

    inputs = replace(inputs_of(model), samples=samples, count=8)
    sites = factorizable(model).sites
    aware, plain = (split_all(model, sites, one)["0"] for one in (inputs, None))
    assert float(aware.energies[8:].sum()) > 0.5 * float(aware.energies.sum())
    rows = torch.randn(500, 64)
    errors = [nn.functional.mse_loss(one.pair(model.module[0], 20)(rows), model.module(rows)) for one in (aware, plain)]
    assert float(errors[0].detach()) < 1.3 * float(errors[1].detach())


@pytest.mark.parametrize("aware", [False, True])
def test_errors_count_as_they_do_behind_a_batch_norm(aware: bool) -> None:
    """Half of the channels are a thousand times smaller before it, and as large as the others behind it."""
    torch.manual_seed(0)
    layer, norm = nn.Linear(24, 32, bias=False), nn.BatchNorm1d(32, eps=1e-12)
    with torch.no_grad():
        layer.weight[16:] *= 1e-3
        norm.running_var = layer.weight.square().sum(1)
    model = model_of(nn.Sequential(layer, norm), (16, 24))

    def samples() -> Iterator[Sample]:
        for index in range(20):
            yield Sample({"x": np.random.default_rng(index).standard_normal((16, 24)).astype(np.float32)}, None, "")

    inputs = replace(inputs_of(model), samples=samples, count=20) if aware else None
    (site,) = factorizable(model).sites
    assert site.norm == "1"
    rows = torch.randn(500, 24)
    errors = []
    for one in (site, replace(site, norm=None)):
        result = factorize(model, {"0": 13}, split_all(model, [one], inputs))
        assert model.module is not None
        assert result.module is not None
        errors.append(float(nn.functional.mse_loss(result.module(rows), model.module(rows)).detach()))
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("make", [net, mlp])
def test_activations_tell_more_than_weights_alone(make: object) -> None:
    model = net() if make is net else mlp()
    sites = factorizable(model).sites
    plain, aware = (split_all(model, sites, inputs) for inputs in (None, inputs_of(model)))
    ranks = {path: max(1, len(one.energies) // 3) for path, one in aware.items() if one.form == plain[path].form}
    assert len(ranks) >= 3
    errors = [relative_error(model, factorize(model, ranks, factors)) for factors in (plain, aware)]
    assert errors[1] < 0.6 * errors[0]


def test_only_layers_that_can_be_split_are() -> None:
    found = factorizable(net(), ["point"])
    assert [site.path for site in found.sites] == ["stem", "wide", "same", "head"]
    assert {one.layer: one.reason for one in found.kept} == {
        "depthwise": "it is a grouped convolution",
        "point": "it is protected",
        "up": "it is a transposed convolution",
        "gate": "no rank of it would save anything",
    }


def test_layers_that_others_read_directly_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.read, self.fine, self.tied = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.tied_too = nn.Linear(16, 16)
            self.tied_too.weight = self.tied.weight
            self.scaled = Scaled(16, 16)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
            self.unused = nn.Linear(16, 16)
            self.half = nn.Linear(16, 16).half()

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(x + self.attention(x, x, x, need_weights=False)[0])
            x = self.fine(input=x) * self.read.weight.sum() + self.read(x)
            result: Tensor = self.normed(self.scaled(self.tied_too(self.tied(x))))
            return result

    class Scaled(nn.Linear):
        def forward(self, *args: Tensor) -> Tensor:
            return 2 * super().forward(*args)

    torch.manual_seed(0)
    model = model_of(Odd(), TOKENS)
    found = factorizable(model)
    assert [site.path for site in found.sites] == ["fine"]
    reasons = {one.layer: one.reason for one in found.kept}
    assert "without calling it" in reasons["attention.out_proj"]
    assert "asks for its weights" in reasons["encoder.linear1"]
    assert "asks for its weights" in reasons["read"]
    assert "share" in reasons["tied"]
    assert "share" in reasons["tied_too"]
    assert "more than its operator" in reasons["scaled"]
    assert "computed from other" in reasons["normed"]
    assert "without calling it" in reasons["unused"]
    assert "float16" in reasons["half"]


def test_subclasses_that_change_nothing_are_split() -> None:
    class Padded(nn.Conv2d):
        def forward(self, *args: Tensor) -> Tensor:
            return functional.conv2d(args[0], self.weight, self.bias, self.stride, self.padding)

    model = model_of(nn.Sequential(Padded(3, 16, 3)), PICTURE)
    assert [site.path for site in factorizable(model).sites] == ["0"]


def test_one_dimension_and_three() -> None:
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep = (
                nn.Conv1d(3, 16, 5, stride=2, padding_mode="circular", padding=2),
                nn.Conv3d(1, 12, 3),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.flat(x.flatten(2)), self.deep(x[:, None])

    model = model_of(Volumes(), PICTURE)
    factors = split_all(model, factorizable(model).sites, inputs_of(model))
    assert set(factors) == {"flat", "deep"}
    result = factorize(model, full_ranks(factors), factors)
    for one, other in zip(forward(model, model.example_inputs), forward(result, model.example_inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_transposed_linear_layers_of_gpt2() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = model_of(nn.Sequential(Conv1D(40, 24)), ROWS)
    nn.init.normal_(model.module[0].weight)
    factors = split_all(model, factorizable(model).sites, inputs_of(model))
    assert relative_error(model, factorize(model, full_ranks(factors), factors)) < 1e-9


def test_a_layer_that_is_called_twice_is_split_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(24, 24)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.other(torch.tanh(self.one(x)))
            return result

    torch.manual_seed(0)
    model = model_of(Twice(), ROWS)
    result = run_pass(LowRank(Goal("macs", 0.5, is_share=True)), model, inputs_of(model))
    assert result.module is not None
    assert result.module.get_submodule("one") is result.module.get_submodule("other")
    assert macs_of(result) <= 0.5 * macs_of(model)


@pytest.mark.parametrize("what", ["macs", "parameters"])
@pytest.mark.parametrize("make", [net, mlp])
def test_budgets_are_met_and_used(what: str, make: object) -> None:
    model = net() if make is net else mlp()
    cost = macs_of if what == "macs" else parameters_of
    result = run_pass(LowRank(Goal("macs" if what == "macs" else "parameters", 0.7, True)), model, inputs_of(model))
    assert 0.6 * cost(model) < cost(result) <= 0.7 * cost(model)
    config = result.history[-1].config
    assert config["goal"] == f"{what} 0.7x"
    assert config["layers"] == len([key for key in config if key.startswith("rank of ")])


def test_measured_goals_ask_for_the_cost_of_models() -> None:
    model = mlp()
    asked: list[Model] = []

    def cost(candidate: Model) -> float:
        asked.append(candidate)
        return float(parameters_of(candidate)) / 1000

    result = run_pass(LowRank(Goal("size", 2.0), cost=cost), model, inputs_of(model))
    assert cost(result) <= 2.0
    assert len(asked) < 16


def test_goals_out_of_reach() -> None:
    model = mlp()
    with pytest.raises(UsageError, match="even at the lowest ranks"):
        run_pass(LowRank(Goal("macs", 10)), model, inputs_of(model))
    with pytest.raises(UsageError, match="ratio"):
        run_pass(LowRank(Goal("ratio", 0.5)), model, inputs_of(model))


def test_energy_rules_every_layer() -> None:
    model = mlp()
    result = run_pass(LowRank(energy=0.9, multiple=4), model, inputs_of(model))
    ranks = {key: value for key, value in result.history[-1].config.items() if key.startswith("rank of ")}
    assert ranks
    assert all(isinstance(rank, int) and rank % 4 == 0 for rank in ranks.values())
    assert macs_of(result) < macs_of(model)
    assert relative_error(model, result) < 0.1


def test_same_samples_same_network() -> None:
    states = []
    for _ in range(2):
        torch.rand(3)
        module = run_pass(LowRank(energy=0.9), net(), inputs_of(net())).module
        assert module is not None
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_random_numbers_are_left_alone() -> None:
    model = mlp()
    torch.manual_seed(5)
    run_pass(LowRank(energy=0.9), model, inputs_of(model))
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_without_samples() -> None:
    model = mlp()
    nothing = PassInputs(SCHEME, None, 0, 0, Silent(), EstimatorSpec(), LayerRules())
    with pytest.raises(ConversionError, match="activation_aware = false"):
        run_pass(LowRank(), model, nothing)
    result = run_pass(LowRank(Goal("macs", 0.5, True), activation_aware=False), model, nothing)
    assert macs_of(result) <= 0.5 * macs_of(model)


def test_several_passes_over_the_samples_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    wanted = run_pass(LowRank(energy=0.9), model, inputs_of(model))
    monkeypatch.setattr("edgeopt.compression.low_rank.statistics.MAX_BYTES", 1000)
    found = run_pass(LowRank(energy=0.9), model, inputs_of(model))
    assert relative_error(wanted, found) == 0
    # Layers too large for a covariance go by their weights.
    monkeypatch.setattr("edgeopt.compression.low_rank.statistics.MAX_CHANNELS", 8)
    found = run_pass(LowRank(energy=0.9), model, inputs_of(model))
    assert relative_error(model, found) < 0.5


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.broken = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.broken(self.fine(x) / (x > 1e9))
            return result.nan_to_num()

    model = model_of(Overflow(), ROWS)
    with pytest.raises(ConversionError, match="'broken'"):
        split_all(model, factorizable(model).sites, inputs_of(model))


def test_dead_layers_do_no_harm() -> None:
    model = mlp()
    assert model.module is not None
    nn.init.zeros_(model.module.get_parameter("down.weight"))
    result = run_pass(LowRank(energy=0.99), model, inputs_of(model))
    assert relative_error(model, result) < 0.05


def test_paths_are_those_of_the_users_module() -> None:
    plain = mlp()
    assert plain.module is not None
    model = replace(plain, module=adapt(plain.module, ["x"], None), input_ranges={"up": (0.0, 1.0), "odd": (0.0, 1.0)})
    assert [site.path for site in factorizable(model, ["up"]).sites] == ["down", "head"]
    result = run_pass(LowRank(Goal("macs", 0.5, True)), model, inputs_of(model))
    assert "rank of up" in result.history[-1].config
    assert set(result.input_ranges) == {"odd"}


def test_nothing_to_split() -> None:
    model = model_of(nn.Sequential(nn.Tanh()), ROWS)
    with pytest.raises(ConversionError, match="no layer can be split"):
        run_pass(LowRank(), model, inputs_of(model))


@pytest.mark.parametrize("make", [net, mlp])
def test_result_survives_a_weights_file(make: object, tmp_path: Path) -> None:
    model = net() if make is net else mlp()
    result = run_pass(LowRank(Goal("macs", 0.6, True)), model, inputs_of(model))
    assert result.module is not None
    assert model.module is not None
    save_model(result.module, model.module, tmp_path / "w.safetensors")
    torch.manual_seed(7)
    loaded = load_model(Net() if make is net else Mlp(), tmp_path / "w.safetensors").eval()
    x = torch.from_numpy(data(model.example_inputs["x"].shape, 5))
    assert torch.equal(loaded(x), result.module(x))


def test_a_pattern_that_protects_nothing_is_refused() -> None:
    model = model_of(nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 8)), ROWS)
    with pytest.raises(UsageError, match=r"protect 'fc': matches no layer"):
        factorizable(model, ("fc",))
