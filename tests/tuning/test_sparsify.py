"""Rounds of sparsification: the goal, the floor, going on after a kill, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import PassInputs
from edgeopt.compression.sparsity.constraints import GrowingZeros
from edgeopt.compression.sparsity.pattern import is_two_of_four
from edgeopt.compression.steps import Sparsify
from edgeopt.config import config_of
from edgeopt.datasets import open_dataset
from edgeopt.errors import UsageError
from edgeopt.plan import plan_jobs
from edgeopt.progress import Silent
from edgeopt.sources.adapter import adapt
from edgeopt.training.config import TrainingConfig
from edgeopt.tuning.context import StepContext
from edgeopt.tuning.sparsify import sparsify
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec
from edgeopt.workbench import Workbench

SPECS = (TensorSpec("x", (1, 8), "float32"),)
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(96, 8)).astype(np.float32)
ITEMS = [(row, int(row[0] * row[1] > 0)) for row in VALUES]
T = TypeVar("T")


class KilledError(Exception):
    """Stands for a power cut."""


class Dies(Silent):
    """Dies when the training of a round begins."""

    def __init__(self, round_: int) -> None:
        self._left = round_

    def track(self, items: Iterable[T], title: str, total: int) -> Iterator[T]:
        if title.startswith("Training"):
            self._left -= 1
            if self._left == 0:
                raise KilledError
        return super().track(items, title, total)


class Titles(Silent):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def step(self, title: str) -> None:
        self.seen.append(title)


@cache
def network() -> nn.Module:
    """It knows its task."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = torch.from_numpy(VALUES), torch.tensor([label for _, label in ITEMS])
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def trained() -> Model:
    outputs = (TensorSpec("y", (1, 2), "float32"),)
    return Model("net", copy.deepcopy(network()), None, SPECS, outputs, {"x": VALUES[:1]}, None, (), (), "0" * 64)


def context(directory: Path, progress: Silent | None = None, *, training: bool = True) -> StepContext:
    data = open_dataset(ITEMS, SPECS, None)

    def samples() -> Iterator[Sample]:
        return iter(data)

    def bench(model: Model) -> Workbench:
        raise AssertionError(f"nothing of {model.name} is exported")

    (job,) = plan_jobs(config_of({"model": "net.py:build", "target": "android-int8", "calibration": "cal.npz"}))
    inputs = PassInputs(
        Scheme("w8a8", "static"), samples, len(data), 0, progress or Silent(), EstimatorSpec(), LayerRules()
    )
    return StepContext(
        job, trained(), data if training else None, data if training else None, inputs, bench, directory, 1
    )


def zeros(model: Model) -> float:
    assert model.module is not None
    weights = [p for p in model.module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def same(one: Model, other: Model) -> bool:
    assert one.module is not None
    assert other.module is not None
    state = other.module.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.module.state_dict().items())


TRAINING = TrainingConfig(epochs=2, batch_size=16, learning_rate=3e-3)
SETTINGS = Sparsify(to=0.75, rounds=3, training=TRAINING)


@pytest.mark.parametrize(
    ("change", "rounds"),
    [
        ({"schedule": "one-shot"}, 1),
        ({"schedule": "iterative", "scope": "per-layer"}, 3),
        ({"schedule": "cubic"}, 3),
        ({"schedule": "cubic", "method": "movement"}, 3),
        ({"schedule": "cubic", "training": replace(TRAINING, ema=0.9, weight_decay=0.1, epochs=1)}, 3),
    ],
)
def test_every_schedule_reaches_the_share_and_keeps_it_through_training(
    tmp_path: Path, change: dict[str, object], rounds: int
) -> None:
    result = sparsify(trained(), replace(SETTINGS, **change), context(tmp_path))
    assert zeros(result) == pytest.approx(0.75, abs=1e-9)
    assert [step.step for step in result.history] == ["sparsify"] * rounds
    shares = [step.config["zeros"] for step in result.history]
    assert shares == sorted(shares)
    assert shares[-1] == result.history[-1].config["to"] == 0.75
    assert not same(result, trained())
    assert not any(p._backward_hooks for p in result.module.parameters())


def test_two_of_four_holds_after_training(tmp_path: Path) -> None:
    result = sparsify(trained(), replace(SETTINGS, pattern="2:4"), context(tmp_path))
    assert result.module is not None
    assert all(is_two_of_four(p, 1) for p in result.module.parameters() if p.dim() > 1)
    assert zeros(result) == 0.5
    assert len(result.history) == 1


def test_the_first_round_below_the_floor_is_undone(tmp_path: Path) -> None:
    settings = replace(SETTINGS, to=0.99, schedule="iterative", rounds=3, max_drop=0.05)
    result = sparsify(trained(), settings, context(tmp_path))
    *kept, last = result.history
    assert last.step == "sparsify-undone"
    assert last.config["score"] < last.config["floor"] == pytest.approx(last.config["score_before"] - 0.05)
    assert zeros(result) == pytest.approx(kept[-1].config["zeros"] if kept else 0.0, abs=1e-6)
    assert last.config["to"] > zeros(result)
    # The end is remembered too: nothing is tried again.
    assert same(sparsify(trained(), settings, context(tmp_path, Dies(1))), result)


def test_a_floor_that_holds_changes_nothing(tmp_path: Path) -> None:
    free = sparsify(trained(), SETTINGS, context(tmp_path / "free"))
    held = sparsify(trained(), replace(SETTINGS, max_drop=1.0), context(tmp_path / "held"))
    assert same(free, held)


@pytest.mark.parametrize(("method", "epoch"), [("magnitude", 2), ("movement", 4)])
def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, method: str, epoch: int) -> None:
    settings = replace(SETTINGS, method=method)
    whole = sparsify(trained(), settings, context(tmp_path / "whole"))
    with pytest.raises(KilledError):
        sparsify(trained(), settings, context(tmp_path / "cut", Dies(epoch)))
    titles = Titles()
    resumed = sparsify(trained(), settings, context(tmp_path / "cut", titles))
    assert same(whole, resumed)
    assert whole.history == resumed.history
    assert not any(title.startswith("Round 1 ") for title in titles.seen)


def test_zeros_of_a_round_stay_zeros_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[float] = []

    class Watched(GrowingZeros):
        def start(self, module: nn.Module) -> None:
            super().start(module)
            masks = list(self.masks.values())
            began.append(1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))

    monkeypatch.setattr("edgeopt.compression.sparsity.constraints.GrowingZeros", Watched)
    result = sparsify(trained(), SETTINGS, context(tmp_path))
    assert began == pytest.approx([0.0, *(float(str(step.config["zeros"])) for step in result.history[:-1])])


def test_a_killed_run_of_an_adapted_network_goes_on(tmp_path: Path) -> None:
    model = trained()
    assert model.module is not None
    adapted = replace(model, module=adapt(model.module, ["x"], None))
    with pytest.raises(KilledError):
        sparsify(adapted, SETTINGS, context(tmp_path, Dies(2)))
    titles = Titles()
    assert zeros(sparsify(adapted, SETTINGS, context(tmp_path, titles))) == 0.75
    assert not any(title.startswith("Round 1 ") for title in titles.seen)


def test_what_can_not_be_read_is_done_again(tmp_path: Path) -> None:
    whole = sparsify(trained(), SETTINGS, context(tmp_path))
    (tmp_path / "finished-rounds" / "model.safetensors").write_bytes(b"nonsense")
    assert same(sparsify(trained(), SETTINGS, context(tmp_path)), whole)


def test_without_training_data_the_smallest_go_and_that_is_said(tmp_path: Path) -> None:
    titles = Titles()
    result = sparsify(trained(), SETTINGS, context(tmp_path, titles, training=False))
    assert zeros(result) == 0.75
    assert "nothing makes up for them" in titles.seen[0]
    assert result.history[-1].config["training"] is False


@pytest.mark.parametrize(
    ("change", "training", "line"),
    [
        ({"to": 1.0}, True, "to: 1.0 is no share"),
        ({"rounds": 0}, True, "rounds: 0 rounds are none"),
        ({"method": "movement", "schedule": "iterative"}, True, "take schedule 'cubic'"),
        ({"method": "movement", "pattern": "2:4"}, True, "pattern 'unstructured'"),
        ({"method": "movement"}, False, "has nothing to train on"),
        ({"max_drop": 0.1}, False, "give --validation DATA"),
        ({"protect": ("9",)}, True, "protect '9': matches no layer"),
        ({"protect": ("*",)}, True, "every layer with weights is protected"),
    ],
)
def test_what_can_not_work_is_refused(tmp_path: Path, change: dict[str, object], training: bool, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        sparsify(trained(), replace(SETTINGS, **change), context(tmp_path, training=training))
