"""Training float networks: what is trained, what is kept, what constraints and features do."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.datasets import open_dataset
from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import Score, Teaching, TrainingConfig, TrainingResult
from edgeopt.training.fit import FitData, fit, score, score_of
from edgeopt.types import TensorSpec

SPECS = (TensorSpec("x", (1, 6), "float32"),)
VALUES = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
LABELS = [int(row[0] + row[1] > 0) for row in VALUES]
LABELLED = open_dataset(list(zip(VALUES, LABELS, strict=True)), SPECS, None)
UNLABELLED = open_dataset(list(VALUES), SPECS, None)
DATA = FitData(LABELLED, None, SPECS, 2)
JUDGED = replace(DATA, validation=LABELLED)
CONFIG = TrainingConfig(epochs=3, batch_size=8, learning_rate=1e-2)
BOTH = Teaching()
T = TypeVar("T")


class KilledError(Exception):
    """Stands for a power cut."""


class Dies(Silent):
    """Dies when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self._title = f"Training, epoch {epoch} "

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        if title.startswith(self._title):
            raise KilledError
        return super().track(items, title, total)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
    ).eval()  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def trained(
    module: nn.Module | None = None,
    teacher: nn.Module | None = None,
    data: FitData = DATA,
    config: TrainingConfig = CONFIG,
    teaching: Teaching = BOTH,
    **more: object,
) -> tuple[nn.Module, TrainingResult]:
    module = network() if module is None else module
    settings = {"seed": 0, "progress": Silent(), **more}
    return module, fit(module, teacher, data, teaching, config, **settings)


def test_trains_in_place_deterministically_and_leaves_all_else_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    module = network()
    teacher = copy.deepcopy(module)
    torch.manual_seed(5)
    first, result = trained(module, teacher)
    assert torch.equal(torch.rand(1), expected)
    assert first is module
    assert result == TrainingResult(3, None, None)
    assert not same(first, network())
    assert same(teacher, network())
    assert not any(part.training for part in first.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in first.parameters())
    assert same(first, trained(teacher=teacher)[0])
    assert not same(first, trained(teacher=teacher, seed=1)[0])


def test_recovers_what_was_lost_and_keeps_the_best_epoch() -> None:
    good = trained(data=JUDGED, config=replace(CONFIG, epochs=20))[0]
    hurt = copy.deepcopy(good)
    with torch.no_grad():
        hurt[0].weight[::2] = 0
    before = score(hurt, JUDGED, 16, Silent())
    result = trained(hurt, good, JUDGED, replace(CONFIG, epochs=30, patience=3))[1]
    assert result.score is not None
    assert result.score > before
    assert score(hurt, JUDGED, 16, Silent()) == result.score
    assert result.epochs == min(30, (result.best_epoch or 0) + 3)


def test_a_module_may_teach_itself() -> None:
    module = network()
    drifting = trained(module, module, replace(DATA, training=UNLABELLED))[0]
    assert same(drifting, trained(network(), network(), replace(DATA, training=UNLABELLED))[0])


def test_networks_loaded_for_inference_are_thawed_while_they_train() -> None:
    frozen = trained(network().requires_grad_(False))[0]
    assert same(frozen, trained()[0])
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_what_the_user_froze_stays() -> None:
    module = network()
    module[0].requires_grad_(False)
    trained(module)
    assert torch.equal(module[0].weight, network()[0].weight)
    assert not torch.equal(module[4].weight, network()[4].weight)
    assert not module[0].weight.requires_grad


def test_batch_norm_freezes() -> None:
    still = trained(config=replace(CONFIG, freeze_batch_norm_after=0.0))[0]
    assert torch.equal(still.state_dict()["1.running_mean"], network().state_dict()["1.running_mean"])
    moving = trained(config=replace(CONFIG, freeze_batch_norm_after=1.0))[0]
    assert not torch.equal(moving.state_dict()["1.running_mean"], network().state_dict()["1.running_mean"])


class FreeBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.reshaped(torch.relu(self.first(x))))
        return result

    def reshaped(self, x: Tensor) -> Tensor:
        return x


class FixedBatch(FreeBatch):
    def reshaped(self, x: Tensor) -> Tensor:
        return x.view(1, 8)


@pytest.mark.parametrize(("student", "teacher"), [(FixedBatch, FreeBatch), (FreeBatch, FixedBatch)])
def test_a_fixed_batch_size_makes_no_difference(student: type[nn.Module], teacher: type[nn.Module]) -> None:
    module = trained(student(), teacher(), JUDGED)[0]
    free = trained(FreeBatch(), FreeBatch(), JUDGED)[0]
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, free.state_dict()[name], atol=1e-5, rtol=1e-4)
    assert score(module, JUDGED, 16, Silent()) == score(free, JUDGED, 16, Silent())


def test_fewer_samples_than_a_batch() -> None:
    few = open_dataset(list(zip(VALUES[:3], LABELS[:3], strict=True)), SPECS, None)
    assert not same(trained(data=replace(DATA, training=few))[0], network())
    one = open_dataset([(VALUES[0], 1)], SPECS, None)
    assert not same(trained(FreeBatch(), data=replace(DATA, training=one))[0], FreeBatch())
    with pytest.raises(UsageError, match="one sample at a time"):
        trained(data=replace(DATA, training=one))


def test_no_epochs_change_nothing() -> None:
    module, result = trained(data=JUDGED, config=replace(CONFIG, epochs=0), constraint=Masks(0.5))
    assert result == TrainingResult(0, 0, score(module, JUDGED, 16, Silent()))
    assert zeros(module) == pytest.approx(0.5, abs=0.02)  # but for what the constraint starts with


def test_mixed_precision_accumulation_and_averaging() -> None:
    config = replace(CONFIG, mixed_precision="bf16", gradient_accumulation=2, ema=0.9, optimizer="sgd")
    module = trained(teacher=network(), config=config)[0]
    assert not same(module, network())
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in module.state_dict().values())


def test_a_failed_run_leaves_the_module_usable() -> None:
    module = network().requires_grad_(False)
    with pytest.raises(ConversionError, match="loss became"):
        trained(module, config=replace(CONFIG, learning_rate=1e30, max_gradient_norm=1e30))
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


# --- constraints -----------------------------------------------------------------------------------------------------


class Masks:
    """Zeroes the smallest weights of the first layer: `shares` of them, one after another while the training runs."""

    def __init__(self, *shares: float) -> None:
        self._shares = shares
        self.steps: list[int] = []

    def start(self, module: nn.Module) -> None:
        assert isinstance(module, nn.Sequential)
        self._weight = module[0].weight
        self._mask = torch.ones_like(self._weight)
        self._grow(self._shares[0])

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, step: int, steps: int) -> None:
        self.steps.append(step)
        if step % (steps // len(self._shares)) == 0:
            self._grow(self._shares[min(step * len(self._shares) // steps, len(self._shares) - 1)])
        with torch.no_grad():
            self._weight.mul_(self._mask)

    def state(self) -> dict[str, Tensor]:
        return {"mask": self._mask}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._mask = state["mask"].clone()

    def _grow(self, share: float) -> None:
        with torch.no_grad():
            limit = torch.quantile(self._weight.abs(), share)
            self._mask = (self._weight.abs() > limit).float()
            self._weight.mul_(self._mask)


class Growing(Masks):
    def is_settled(self) -> bool:
        return float((self._mask == 0).float().mean()) >= self._shares[-1] - 0.05


def zeros(module: nn.Module) -> float:
    assert isinstance(module, nn.Sequential)
    return float((module[0].weight == 0).float().mean())


@pytest.mark.parametrize("ema", [None, 0.95])
@pytest.mark.parametrize("data", [DATA, JUDGED])
def test_masks_hold_in_every_kept_state(data: FitData, ema: float | None) -> None:
    module, result = trained(data=data, config=replace(CONFIG, ema=ema), constraint=Masks(0.5))
    assert zeros(module) == pytest.approx(0.5, abs=0.02)
    assert result.epochs == 3


@pytest.mark.parametrize("ema", [None, 0.95])
def test_masks_that_grow_hold_in_the_average(ema: float | None) -> None:
    masks = Masks(0.2, 0.5, 0.8)
    module = trained(config=replace(CONFIG, ema=ema), constraint=masks)[0]
    assert masks.steps == list(range(1, 19))
    assert zeros(module) == pytest.approx(0.8, abs=0.02)


def test_an_epoch_before_a_constraint_has_settled_is_never_the_best() -> None:
    good = trained(data=JUDGED, config=replace(CONFIG, epochs=20))[0]
    module, result = trained(copy.deepcopy(good), data=JUDGED, constraint=Growing(0.1, 0.5, 0.9))
    assert zeros(module) == pytest.approx(0.9, abs=0.02)
    assert result.best_epoch is not None
    assert result.best_epoch >= 2
    # The same without saying so: the dense start wins.
    assert zeros(trained(copy.deepcopy(good), data=JUDGED, constraint=Masks(0.1, 0.5, 0.9))[0]) < 0.5


def test_a_penalty_is_part_of_the_loss() -> None:
    class Decay(Masks):
        def penalty(self) -> Tensor:
            return 10 * self._weight.square().sum()

    plain, decayed = (trained(constraint=kind(0.0))[0].state_dict()["0.weight"] for kind in (Masks, Decay))
    assert float(decayed.norm()) < 0.7 * float(plain.norm())


def test_a_killed_run_resumes_with_its_constraint(tmp_path: Path) -> None:
    config = replace(CONFIG, ema=0.9)
    whole, result = trained(data=JUDGED, config=config, constraint=Masks(0.2, 0.8))
    with pytest.raises(KilledError):
        trained(data=JUDGED, config=config, constraint=Masks(0.2, 0.8), checkpoint_dir=tmp_path, progress=Dies(3))
    again = {"constraint": Masks(0.2, 0.8), "checkpoint_dir": tmp_path}
    resumed, same_result = trained(data=JUDGED, config=config, **again)
    assert same(whole, resumed)
    assert result == same_result
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0003"]
    finished = trained(data=JUDGED, config=config, progress=Dies(1), **again)[0]  # nothing is left to do
    assert same(whole, finished)
    with pytest.raises(UsageError, match="holds a checkpoint of an earlier run"):
        trained(data=JUDGED, config=config, resume=False, **again)
    for other in ({"fingerprint": "other masks"}, {"seed": 1}, {"teaching": Teaching(alpha=0.3)}):
        with pytest.raises(UsageError, match="another model, data or settings"):
            trained(data=JUDGED, config=config, **again, **other)


# --- features --------------------------------------------------------------------------------------------------------


class WithFeatures(nn.Module):
    """Scores, then what a layer gives."""

    def __init__(self, network: nn.Sequential, width: int) -> None:
        super().__init__()
        self.network = network
        self.projection = nn.Linear(16, width) if width != 16 else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden = self.network[0](x)
        return self.network[1:](hidden), [self.projection(hidden)]


def feature_distance(student: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        mine, theirs = (module.eval()(torch.from_numpy(VALUES))[1][0] for module in (student, teacher))
    return float((mine - theirs).square().mean() / theirs.var())


def test_features_are_matched_beside_the_outputs() -> None:
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 2)).eval()
    teacher = WithFeatures(wide, 16)  # 16: as it is
    config = replace(CONFIG, epochs=15)
    matched, free = WithFeatures(network(), 24), WithFeatures(network(), 24)
    trained(matched, teacher, JUDGED, config, Teaching(feature_weight=5.0), outputs=1)
    trained(free, teacher, JUDGED, config, Teaching(feature_weight=0.0), outputs=1)
    assert feature_distance(matched, teacher) < 0.5 * feature_distance(free, teacher)
    labels_alone = WithFeatures(network(), 24)
    trained(labels_alone, teacher, DATA, config, Teaching(alpha=1.0, feature_weight=5.0), outputs=1)
    assert feature_distance(labels_alone, teacher) < 0.5 * feature_distance(free, teacher)


def test_features_without_a_partner_are_refused() -> None:
    with pytest.raises(UsageError, match=r"teacher's features have shapes none, the model's \(8, 24\)"):
        trained(WithFeatures(network(), 24), network(), outputs=1)
    with pytest.raises(UsageError, match=r"teacher's outputs have shapes \(8, 3\), the model's \(8, 2\)"):
        trained(network(), nn.Linear(6, 3))


# --- teachers and scores ---------------------------------------------------------------------------------------------


def test_without_a_teacher_there_are_labels_alone() -> None:
    alone = trained(teaching=Teaching(alpha=0.2))[0]
    assert same(alone, trained(teacher=network(), teaching=Teaching(alpha=1.0))[0])
    for teaching, data in ((Teaching("distillation"), DATA), (Teaching(), replace(DATA, training=UNLABELLED))):
        with pytest.raises(UsageError, match="distillation needs a teacher"):
            trained(teaching=teaching, data=data)


def test_score_is_accuracy_where_there_are_classes() -> None:
    module = network()
    with torch.no_grad():
        right = module(torch.from_numpy(VALUES)).argmax(-1).tolist()
    labels = [1 - label if i < 12 else label for i, label in enumerate(right)]
    data = replace(DATA, validation=open_dataset(list(zip(VALUES, labels, strict=True)), SPECS, None))
    assert score(module, data, 7, Silent()) == 0.75
    assert score_of(module, data, 48, Silent(), network()) == Score(0.75, 48, is_accuracy=True)
    assert score_of(FixedBatch(), data, 48, Silent()).is_accuracy


def test_score_is_the_distance_to_the_teacher_elsewhere() -> None:
    data = replace(DATA, validation=UNLABELLED)
    assert score_of(network(), data, 16, Silent(), network()) == Score(pytest.approx(0, abs=1e-6), 48, False)
    far = trained(config=replace(CONFIG, epochs=10))[0]
    near = trained()[0]
    assert score(far, data, 16, Silent(), network()) < score(near, data, 16, Silent(), network()) < 0
    with pytest.raises(UsageError, match="no class indices to score"):
        score(network(), data, 16, Silent())
    with pytest.raises(DataError, match="no validation data"):
        score(network(), DATA, 16, Silent())


def test_unlabelled_validation_of_labelled_training_asks_the_teacher() -> None:
    data = replace(DATA, validation=UNLABELLED)
    module, result = trained(teacher=network(), data=data)
    assert same(module, network())  # nothing is nearer to it
    assert result.score == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="validation data: has no labels to judge the model by"):
        trained(data=data)


def test_refusals() -> None:
    graph = torch.export.export(nn.Linear(6, 2), (torch.randn(1, 6),)).module()
    with pytest.raises(ConversionError, match="can't be trained: NotImplementedError"):
        trained(graph)
    with pytest.raises(ConversionError, match="no parameters to train"):
        trained(nn.Flatten())
    with pytest.raises(DataError, match="lacks the input 'z'"):
        trained(data=replace(DATA, inputs=(TensorSpec("z", (1, 6), "float32"),)))
    with pytest.raises(UsageError, match="does not offer it"):
        trained(config=replace(CONFIG, gradient_checkpointing=True))
