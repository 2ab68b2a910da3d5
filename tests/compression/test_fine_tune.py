"""The pass around float training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.fine_tune import FineTuning
from edgeopt.datasets import open_dataset
from edgeopt.errors import UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, StepRecord, TensorSpec

SPECS = (TensorSpec("x", (1, 6), "float32"),)
VALUES = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
LABELLED = open_dataset([(row, int(row[0] + row[1] > 0)) for row in VALUES], SPECS, None)
UNLABELLED = open_dataset(list(VALUES), SPECS, None)
CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=1e-2)
TUNING = FineTuning(LABELLED, config=CONFIG)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).eval().requires_grad_(False)


def model(seed: int = 0) -> Model:
    return Model(
        "net", network(seed), None, SPECS, (TensorSpec("y", (1, 2), "float32"),), {"x": VALUES[:1]}, None, ("a", "b"),
        (StepRecord("prune"),), "0" * 64, {"0": (-1.0, 1.0)},
    )  # fmt: skip


def inputs() -> PassInputs:
    def samples() -> Iterator[Sample]:
        return iter(UNLABELLED)

    return PassInputs(Scheme("w8a8", "static"), samples, 48, 0, Silent(), EstimatorSpec(), LayerRules())


def state(result: Model) -> dict[str, Tensor]:
    assert result.module is not None
    return dict(result.module.state_dict())


def same(one: Model, other: Model) -> bool:
    return all(torch.equal(tensor, state(other)[name]) for name, tensor in state(one).items())


def test_trains_a_copy_and_records_one_step() -> None:
    source = model()
    tuned = run_pass(replace(TUNING, validation=LABELLED), source, inputs())
    assert same(source, model())
    assert not same(tuned, source)
    assert same(tuned, run_pass(replace(TUNING, validation=LABELLED), model(), inputs()))
    assert not tuned.input_ranges
    step = tuned.history[-1]
    assert step.step == "fine-tune"
    assert step.config["epochs_run"] == 2
    assert step.config["samples"] == 48
    assert step.config["data_sha256"] == LABELLED.fingerprint()


def test_is_taught_by_the_model_before_or_by_another() -> None:
    unlabelled = replace(TUNING, training=UNLABELLED, validation=UNLABELLED)
    assert same(run_pass(unlabelled, model(), inputs()), model())  # nothing beats being what one was
    taught = run_pass(replace(unlabelled, teacher=model(1)), model(), inputs())
    assert taught.history[-1].config["best_epoch"] == 2


class Zeros:
    def start(self, module: nn.Module) -> None:
        self._weight = next(module.parameters())

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, step: int, steps: int) -> None:
        del step, steps
        with torch.no_grad():
            self._weight[:, ::2] = 0

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        del state


def test_keeps_to_a_constraint_and_resumes(tmp_path: Path) -> None:
    tuning = replace(TUNING, constraint=Zeros(), checkpoint_dir=tmp_path)
    tuned = run_pass(tuning, model(), inputs())
    assert not state(tuned)["0.weight"][:, ::2].any()
    assert state(tuned)["0.weight"][:, 1::2].all()
    assert same(run_pass(tuning, model(), inputs()), tuned)
    with pytest.raises(UsageError, match="another model, data or settings"):
        run_pass(replace(tuning, constraint=None), model(), inputs())


def test_refuses_features() -> None:
    with pytest.raises(UsageError, match=r"features: layers of a teacher are matched in distillation only"):
        run_pass(replace(TUNING, teaching=Teaching(features=("0",))), model(), inputs())
    with pytest.raises(UsageError, match="attention"):
        run_pass(replace(TUNING, teaching=Teaching(attention=True)), model(), inputs())
