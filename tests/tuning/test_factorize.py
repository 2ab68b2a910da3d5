"""Factorization as a step: what an interrupted run has measured is not measured again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import PassInputs
from edgeopt.compression.steps import Factorize
from edgeopt.config import config_of
from edgeopt.plan import plan_jobs
from edgeopt.progress import Silent
from edgeopt.tuning import factorize as step
from edgeopt.tuning.context import StepContext
from edgeopt.types import LayerRules, Model, StepRecord, TensorSpec
from edgeopt.workbench import Workbench


def a_model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)).eval().requires_grad_(False)
    spec = TensorSpec("x", (1, 32), "float32"), TensorSpec("y", (1, 2), "float32")
    example = {"x": np.ones((1, 32), np.float32)}
    return Model("net", net, None, spec[:1], spec[1:], example, None, (), (StepRecord("load"),), "0" * 64)


def surroundings(model: Model, state: Path) -> StepContext:
    job = plan_jobs(config_of({"model": "net.py:build", "target": "android-int8-dynamic"}))[0]
    inputs = PassInputs(job.scheme, None, 0, 0, Silent(), job.estimator, LayerRules())
    bench = Workbench(model, None, LayerRules(), 0, state, Silent())
    return StepContext(job, model, None, None, inputs, bench.variant, state, 1)


def ranks(model: Model) -> list[tuple[int, ...]]:
    assert model.module is not None
    return [tuple(p.shape) for p in model.module.parameters()]


def test_an_interrupted_step_keeps_the_ranks_that_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model()
    first = step.factorize(model, Factorize(energy=0.3, multiple=1), surroundings(model, tmp_path))
    assert ranks(first) != ranks(model)

    def again(*rest: object) -> Model:
        raise AssertionError(f"measured again: {rest}")

    monkeypatch.setattr(step, "run_pass", again)
    resumed = step.factorize(model, Factorize(energy=0.3, multiple=1), surroundings(model, tmp_path))
    assert ranks(resumed) == ranks(first)
    assert resumed.history == first.history
    monkeypatch.undo()
    other = surroundings(model, tmp_path / "other")
    assert ranks(step.factorize(model, Factorize(energy=0.9, multiple=1), other)) != ranks(first)
