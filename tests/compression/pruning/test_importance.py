"""Scores of units, against values worked out by hand and against what must be worth nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import state_digest
from edgeopt.compression.pruning.groups import Prunable, PruningGroup, Slice
from edgeopt.compression.pruning.importance import DATA_DRIVEN, unit_scores
from edgeopt.compression.pruning.statistics import ScoringData
from edgeopt.compression.steps import Importance
from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.types import Model, Sample, TensorSpec

EVERY: tuple[Importance, ...] = get_args(Importance)
JUDGING = [name for name in EVERY if name != "random"]


@dataclass(frozen=True)
class Listed:
    """A data set of the samples given."""

    samples: Sequence[Sample]
    is_labelled: bool = True
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def fingerprint(self) -> str:
        return ""


def model_of(module: nn.Module, *shape: int) -> Model:
    example = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    spec = TensorSpec("x", shape, "float32")
    return Model("net", module.eval(), None, (spec,), (), {"x": example}, None, (), (), "")


def samples_of(arrays: np.ndarray, labels: Sequence[object] | None = None) -> list[Sample]:
    every: Sequence[object] = [None] * len(arrays) if labels is None else labels
    return [Sample({"x": array[None].astype(np.float32)}, label, str(i)) for i, (array, label) in
            enumerate(zip(arrays, every, strict=True))]  # fmt: skip


def unlabelled(*shape: int, count: int = 6, class_count: int | None = None) -> ScoringData:
    listed = samples_of(np.random.default_rng(1).standard_normal((count, *shape)))
    return ScoringData(lambda: iter(listed), count, class_count=class_count)


def scored(
    model: Model, prunable: Prunable, importance: Importance, data: ScoringData | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    return unit_scores(model, prunable, importance, data or ScoringData(), seed, Silent())


def slices(units: int, *sides: tuple[str, str], width: int = 1) -> tuple[Slice, ...]:
    indices = np.arange(units * width, dtype=np.int64).reshape(units, width)
    return tuple(Slice(layer, "out" if side == "out" else "in", indices) for layer, side in sides)


def one_group(name: str, units: int, *sides: tuple[str, str], width: int = 1) -> Prunable:
    return Prunable((PruningGroup(name, "channels", units, width, slices(units, *sides, width=width)),), ())


class Perceptron:
    """y = v . relu(W x), and all that can be said about it by hand."""

    def __init__(self) -> None:
        self.w = np.array([[1.0, 2.0], [-1.0, 0.5], [0.5, -3.0]])
        self.v = np.array([2.0, -1.0, 0.25])
        self.x = np.array([[1.0, 0.5], [-2.0, 1.0], [0.3, -0.7]])
        self.t = np.array([1.0, -1.0, 0.5])
        self.h = np.maximum(self.x @ self.w.T, 0)
        self.y = self.h @ self.v
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor(self.w))
            net[2].weight.copy_(torch.tensor(self.v)[None])
        self.model = model_of(net, 1, 2)
        self.prunable = one_group("0", 3, ("0", "out"), ("2", "in"))
        labels = [np.array([[t]], np.float32) for t in self.t]
        self.data = ScoringData(labelled=Listed(samples_of(self.x, labels)), loss="mse")


def even(values: np.ndarray) -> np.ndarray:
    return values / values.mean()


@pytest.mark.parametrize("importance", [name for name in JUDGING if name != "batch-norm-scale"])
def test_scores_are_those_of_the_formula(importance: Importance) -> None:
    net = Perceptron()
    slope = 2 * (net.y - net.t)[:, None]
    l1 = np.abs(net.w).sum(1) + np.abs(net.v)
    l2 = np.sqrt(np.square(net.w).sum(1) + np.square(net.v))
    expected = {
        "l1": even(l1),
        "l2": even(l2),
        "mean-abs": l1 / 3,
        "gradient": even(np.abs(slope * net.h).mean(0)),
        "taylor": np.abs(slope * net.h * net.v).mean(0),
        "hessian": 0.5 * np.square(slope * net.h * net.v).mean(0),
        "activation": even(net.h.mean(0) * np.abs(net.v)),
    }
    found = scored(net.model, net.prunable, importance, net.data)["0"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected[importance], rtol=1e-5)


def test_taylor_is_the_change_of_the_loss_where_that_is_linear(tmp_path: Path) -> None:
    (tmp_path / "total.py").write_text("def loss(outputs, labels):\n    return outputs.sum() + 0 * labels.sum()\n")
    net = Perceptron()
    data = ScoringData(labelled=Listed(samples_of(net.x[:1], [0])), loss=f"{tmp_path / 'total.py'}:loss")
    found = scored(net.model, net.prunable, "taylor", data)["0"]
    module = net.model.module
    assert isinstance(module, nn.Sequential)
    for unit in range(3):
        without = copy.deepcopy(module)
        with torch.no_grad():
            without[2].weight[:, unit] = 0
            changed = float(without(torch.tensor(net.x[:1], dtype=torch.float32)))
        assert found[unit] == pytest.approx(abs(float(net.y[0]) - changed), rel=1e-5)


class Convolutional(nn.Module):
    """Conv, norm, depthwise conv, norm, squeeze and excite, conv, classifier; channel 2 of the first one is dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze = nn.Conv2d(6, 4, 1)
        self.excite = nn.Conv2d(4, 6, 1)
        self.last = nn.Conv2d(6, 8, 1)
        self.classify = nn.Linear(8, 5)
        with torch.no_grad():
            for tensor in (self.norm.weight, self.norm.bias):
                tensor.uniform_(0.5, 1.5)
            for layer in (self.first, self.norm, self.depthwise, self.excite):
                layer.weight[2] = 0
                layer.bias[2] = 0
            for layer in (self.squeeze, self.last):
                layer.weight[:, 2] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.relu(self.norm(self.first(x))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.classify(torch.relu(self.last(x)).mean((2, 3)))


def convolutional() -> tuple[Model, Prunable]:
    wide = slices(
        6, ("first", "out"), ("norm", "out"), ("depthwise", "out"), ("squeeze", "in"), ("excite", "out"), ("last", "in")
    )
    return model_of(Convolutional(), 1, 3, 6, 6), Prunable(
        (
            PruningGroup("first", "channels", 6, 1, wide),
            PruningGroup("squeeze", "channels", 4, 1, slices(4, ("squeeze", "out"), ("excite", "in"))),
            PruningGroup("last", "channels", 8, 1, slices(8, ("last", "out"), ("classify", "in"))),
        ),
        (),
    )


@pytest.mark.parametrize("class_count", [5, None])
@pytest.mark.parametrize("importance", JUDGING)
def test_a_dead_channel_is_worth_nothing(importance: Importance, class_count: int | None) -> None:
    model, prunable = convolutional()
    scores = scored(model, prunable, importance, unlabelled(3, 6, 6, class_count=class_count))
    assert {name: values.shape for name, values in scores.items()} == {"first": (6,), "squeeze": (4,), "last": (8,)}
    assert scores["first"][2] == 0
    assert (np.delete(scores["first"], 2) > 0).all()


@pytest.mark.parametrize("importance", EVERY)
def test_the_model_stays_as_it_is_and_scores_repeat(importance: Importance) -> None:
    model, prunable = convolutional()
    assert model.module is not None
    model.module.requires_grad_(False)
    before = state_digest(model.module)
    data = unlabelled(3, 6, 6)
    first, second = (scored(model, prunable, importance, data) for _ in range(2))
    assert state_digest(model.module) == before
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


@pytest.mark.parametrize("importance", ["random", "taylor"])
def test_the_seed_matters(importance: Importance) -> None:
    model, prunable = convolutional()
    data = unlabelled(3, 6, 6, class_count=5)
    one, other = (scored(model, prunable, importance, data, seed)["last"] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_class_labels_are_taken_and_negative_ones_skipped() -> None:
    model, prunable = convolutional()
    arrays = np.random.default_rng(1).standard_normal((3, 3, 6, 6))
    labelled = Listed(samples_of(arrays, [4, 0, 1]))
    with_skipped = Listed(samples_of(np.concatenate([arrays, arrays[:1]]), [4, 0, 1, -1]))
    one, other = (
        scored(model, prunable, "taylor", ScoringData(labelled=data, class_count=5))
        for data in (labelled, with_skipped)
    )
    np.testing.assert_allclose(one["first"], other["first"])
    only_skipped = ScoringData(labelled=Listed(samples_of(arrays[:1], [-1])))
    with pytest.raises(
        UsageError, match="importance 'taylor': the loss has a value and a gradient for none of the samples"
    ):
        scored(model, prunable, "taylor", only_skipped)


def test_a_label_beyond_the_classes_is_told() -> None:
    model, prunable = convolutional()
    data = ScoringData(labelled=Listed(samples_of(np.zeros((1, 3, 6, 6)), [7])))
    with pytest.raises(DataError, match="has the label 7, and the model has 5 classes"):
        scored(model, prunable, "hessian", data)


def test_a_distillation_loss_leaves_the_targets_to_the_model() -> None:
    model, prunable = convolutional()
    arrays = np.random.default_rng(1).standard_normal((4, 3, 6, 6))
    labelled = ScoringData(labelled=Listed(samples_of(arrays, [0, 1, 2, 3])), loss="distillation", class_count=5)
    without = ScoringData(labelled=Listed(samples_of(arrays), is_labelled=False), class_count=5)
    scores = [scored(model, prunable, "taylor", data)["first"] for data in (labelled, without)]
    assert scores[0].max() > 0
    np.testing.assert_array_equal(*scores)


def test_targets_are_drawn_from_probabilities_as_from_scores() -> None:
    model, prunable = convolutional()
    assert model.module is not None
    ends_in_softmax = model_of(nn.Sequential(model.module, nn.Softmax(-1)), 1, 3, 6, 6)
    moved = Prunable(
        tuple(
            replace(group, slices=tuple(replace(part, layer=f"0.{part.layer}") for part in group.slices))
            for group in prunable.groups
        ),
        (),
    )
    data = unlabelled(3, 6, 6, class_count=5)
    np.testing.assert_allclose(
        scored(model, prunable, "taylor", data)["first"],
        scored(ends_in_softmax, moved, "taylor", data)["first"],
        rtol=1e-3,
    )


def test_only_the_first_samples_are_read() -> None:
    read: list[int] = []

    def stream() -> Iterator[Sample]:
        for i in range(100):
            read.append(i)
            yield Sample({"x": np.full((1, 2), i, np.float32)}, None, str(i))

    net = Perceptron()
    scored(net.model, net.prunable, "activation", ScoringData(stream, 100, limit=5))
    assert len(read) == 5


@pytest.mark.parametrize("importance", sorted(DATA_DRIVEN))
def test_a_criterion_without_samples_is_refused(importance: Importance) -> None:
    net = Perceptron()
    with pytest.raises(UsageError, match=f"pruning: the importance '{importance}' needs samples; give training"):
        scored(net.model, net.prunable, importance)


def test_a_network_that_fails_is_told_in_one_line() -> None:
    net = Perceptron()
    data = unlabelled(7)
    for importance in ("taylor", "activation"):
        with pytest.raises(ConversionError, match=f"importance '{importance}': the network can't be run"):
            scored(net.model, net.prunable, importance, data)


def test_weights_that_are_no_numbers_are_told() -> None:
    net = Perceptron()
    assert net.model.module is not None
    with torch.no_grad():
        net.model.module[0].weight[0, 0] = float("nan")
    with pytest.raises(ConversionError, match="layer '0': the importance 'l1' of its units is not finite"):
        scored(net.model, net.prunable, "l1")


def test_batch_norm_scales_are_the_scores_and_their_mean_that_of_other_groups() -> None:
    model, prunable = convolutional()
    scores = scored(model, prunable, "batch-norm-scale")
    assert isinstance(model.module, Convolutional)
    gamma = model.module.norm.weight.detach().numpy()
    np.testing.assert_allclose(scores["first"], gamma, rtol=1e-6)
    assert scores["last"].mean() == pytest.approx(gamma.mean(), rel=1e-5)


def test_batch_norm_scales_need_a_batch_normalization() -> None:
    net = Perceptron()
    with pytest.raises(UsageError, match="importance 'batch-norm-scale': no layer that may be pruned has a batch norm"):
        scored(net.model, net.prunable, "batch-norm-scale")


@pytest.mark.parametrize("importance", ["l1", "l2", "activation", "gradient"])
def test_the_average_unit_scores_its_channels(importance: Importance) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    heads = one_group("0", 2, ("0", "out"), ("2", "in"), width=4)
    scores = scored(model_of(net, 1, 3), heads, importance, unlabelled(3))
    assert scores["0"].mean() == pytest.approx(4)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(3, 4, 1, batch_first=True)
        self.out = nn.Linear(4, 2)
        with torch.no_grad():
            self.rnn.weight_hh_l0[:, 1] = 0
            gates = self.rnn.weight_hh_l0.shape[0] // 4
            self.rnn.weight_hh_l0[[1 + 4 * gate for gate in range(gates)]] = 0
            self.rnn.weight_ih_l0[[1 + 4 * gate for gate in range(gates)]] = 0
            self.out.weight[:, 1] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("importance", ["l1", "taylor", "hessian", "activation"])
def test_recurrent_units(kind: type[nn.RNNBase], importance: Importance) -> None:
    model = model_of(Recurrent(kind), 1, 5, 3)
    scores = scored(model, one_group("rnn", 4, ("rnn", "out"), ("out", "in")), importance, unlabelled(5, 3))["rnn"]
    assert scores[1] == 0
    assert (np.delete(scores, 1) > 0).all()


def test_readers_that_never_run_leave_the_weights() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x).sum(-1)

    model = model_of(Half(), 1, 2)
    prunable = one_group("used", 3, ("used", "out"), ("unused", "in"))
    by_activation, by_l2 = (scored(model, prunable, name, unlabelled(2)) for name in ("activation", "l2"))
    np.testing.assert_array_equal(by_activation["used"], by_l2["used"])


class Residual(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.strength = strength

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        # In place, as many networks do: the input must be seen as it came.
        return x.clone().mul_(1).add_(self.strength * self.two(torch.tanh(self.one(x)))), None


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weak, self.strong = Residual(0.01), Residual(1.0)
        self.out = nn.Linear(4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.strong(x=self.weak(x)[0])[0])


def blocks() -> Prunable:
    inner = [
        PruningGroup(f"{name}.one", "channels", 6, 1, slices(6, (f"{name}.one", "out"), (f"{name}.two", "in")))
        for name in ("weak", "strong")
    ]
    whole = [PruningGroup(name, "blocks", 1, 1, (), (), 2) for name in ("weak", "strong")]
    return Prunable((inner[0], whole[0], inner[1], whole[1]), ())


@pytest.mark.parametrize("importance", [name for name in JUDGING if name != "batch-norm-scale"])
def test_a_block_that_does_little_is_worth_little(importance: Importance) -> None:
    scores = scored(model_of(Blocks(), 1, 4), blocks(), importance, unlabelled(4))
    assert list(scores) == ["weak.one", "weak", "strong.one", "strong"]
    assert scores["weak"].shape == (1,)
    assert 0 < scores["weak"][0] < 0.1 * scores["strong"][0]


def test_blocks_are_on_the_scale_of_their_channels() -> None:
    scores = scored(model_of(Blocks(), 1, 4), blocks(), "l2")
    assert (scores["weak"] + scores["strong"])[0] == pytest.approx(2 * 6)


def test_taylor_of_a_block_is_its_first_order_change() -> None:
    model = model_of(Blocks(), 1, 4)
    assert model.module is not None
    x = np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32)
    data = ScoringData(labelled=Listed(samples_of(x, [np.zeros((1, 1), np.float32)] * 2)), loss="mse")
    found = scored(model, blocks(), "taylor", data)
    changes = []
    for row in torch.tensor(x)[:, None]:
        entered = model.module.weak(row)[0].detach()
        left = model.module.strong(entered)[0].detach().requires_grad_()
        model.module.out(left).square().mean().backward()
        assert left.grad is not None
        changes.append(abs(float((left.grad * (entered - left.detach())).sum())))
    model.module.zero_grad()
    assert found["strong"][0] == pytest.approx(np.mean(changes), rel=1e-4)
    hessian = scored(model, blocks(), "hessian", data)
    assert hessian["strong"][0] == pytest.approx(0.5 * np.mean(np.square(changes)), rel=1e-4)


def test_bare_parameters_and_matrices_stored_input_first_are_read() -> None:
    class Conv1D(nn.Module):
        """As in Hugging Face transformers."""

        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.nf, self.nx = outputs, inputs
            self.weight = nn.Parameter(torch.arange(1.0, inputs * outputs + 1).reshape(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Conv1D(3, 2), Conv1D(2, 3)
            self.scale = nn.Parameter(torch.ones(1, 1, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x) * self.scale)

    whole = slices(3, ("one", "out"), ("two", "in"))
    bare = Slice("", "out", np.arange(3, dtype=np.int64).reshape(3, 1), "scale")
    prunable = Prunable((PruningGroup("one", "channels", 3, 1, (*whole, bare)),), ())
    found = scored(model_of(Scaled(), 1, 2, 2), prunable, "l1")["one"]
    by_hand = np.array([1 + 4 + 1 + 2 + 1, 2 + 5 + 3 + 4 + 1, 3 + 6 + 5 + 6 + 1], np.float64)
    np.testing.assert_allclose(found, even(by_hand))
