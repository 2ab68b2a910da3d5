"""Costs of pruned models, with a runtime that is made up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.pruning.analysis import analyse
from edgeopt.tuning import pruning_costs
from edgeopt.tuning.pruning_costs import TIMINGS, cost_for
from edgeopt.tuning.timing import Timed
from edgeopt.types import Model, OpTiming, Scheme, TensorSpec


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 3)).eval()
    spec = TensorSpec("x", (1, 1, 6, 6), "float32")
    example = {"x": np.zeros((1, 1, 6, 6), np.float32)}
    return Model("net", module, None, (spec,), (TensorSpec("y", (1, 3), "float32"),), example, None, (), (), "")


class Bench:
    """Exports nothing; a file is as large as four times its model's parameters, plus a header."""

    def __init__(self, model: Model) -> None:
        assert model.module is not None
        self.size = 1000 + sum(parameter.numel() for parameter in model.module.parameters())
        self.cleared = False

    def quantized_artifact(self, *_: object) -> tuple[Any, tuple[()]]:
        return SimpleNamespace(size_bytes=self.size, path=Path("f"), signature=None), ()

    def clear(self) -> None:
        self.cleared = True


class Session:
    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to free."""

    def profile(self, *_: object) -> tuple[OpTiming, ...]:
        return (OpTiming("a", "CONV", 0.6), OpTiming("b", "ADD", 0.4))


def context_of(folder: Path) -> Any:
    scheme = Scheme("w8a8", "static")
    target = SimpleNamespace(format="litert", runtimes=("litert",))
    return SimpleNamespace(
        job=SimpleNamespace(target=target, scheme=scheme, estimator=None),
        bench=Bench,
        inputs=SimpleNamespace(samples=None),
        progress=SimpleNamespace(step=lambda _: None),
        threads=1,
        state_dir=folder / "step",
    )


def test_a_size_is_predicted_by_the_weights_and_measured_by_the_file(model: Model, tmp_path: Path) -> None:
    prunable = analyse(model, ("channels",), ())
    cost = cost_for("size", model, prunable, 4, 0.9, context_of(tmp_path))
    plan = {prunable.groups[0].name: tuple(range(8))}
    saving = cost.saving(model, prunable)(plan)
    # Eight filters with biases, and what reads them: one byte each.
    assert saving == pytest.approx((8 * 10 + 8 * 8 * 9) / cost.before)
    assert cost.measure(model, 0.5) == 1.0
    assert not cost.is_exact


@pytest.mark.parametrize("what", ["macs", "parameters", "ratio"])
def test_counts_are_exact(model: Model, tmp_path: Path, what: Any) -> None:
    from edgeopt.compression.pruning.removal import remove_units

    prunable = analyse(model, ("channels",), ())
    cost = cost_for(what, model, prunable, 4, 0.9, context_of(tmp_path))
    plan = {prunable.groups[0].name: tuple(range(8))}
    predicted = 1 - cost.saving(model, prunable)(plan)
    assert cost.measure(remove_units(model, prunable, plan), predicted) == pytest.approx(predicted)
    assert cost.is_exact


def test_a_busy_machine_is_timed_again(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steady, busy = (1.0, 1.05), (1.0, 3.0)
    rounds: Iterator[tuple[float, tuple[float, float]]]

    def together(files: list[object], *_: object) -> tuple[Timed, ...]:
        ratio, spread = next(rounds) if len(files) > 1 else (1.0, steady)
        return tuple(Timed(1.0, ratio, spread) for _ in files)

    monkeypatch.setattr(pruning_costs, "time_together", together)
    runtime = SimpleNamespace(open=lambda *_: Session())
    monkeypatch.setattr(pruning_costs, "load_runtime", lambda _: runtime)
    cost = cost_for("latency", model, analyse(model, ("channels",), ()), 4, 0.9, context_of(tmp_path))
    rounds = iter([(0.7, steady)])
    assert cost.measure(model, 0.5) == 0.7
    rounds = iter([(0.1, busy), (0.7, busy), (0.8, steady)])
    assert cost.measure(model, 0.5) == 0.7
    rounds = iter([(share, busy) for share in (0.1, 0.7, 0.9, 0.6, 0.72)])
    assert cost.measure(model, 0.5) == 0.7
    assert next(rounds, None) is None
    assert TIMINGS == 5


def test_savings_are_shares_of_what_the_profiler_sees(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning_costs, "time_together", lambda *_: (Timed(40.0, 1.0, (1.0, 90.0)),))
    monkeypatch.setattr(pruning_costs, "load_runtime", lambda _: SimpleNamespace(open=lambda *_: Session()))
    table = SimpleNamespace(saving=lambda *_: 0.25)
    monkeypatch.setattr(pruning_costs, "measure_table", lambda *_: table)
    prunable = analyse(model, ("channels",), ())
    cost = cost_for("latency", model, prunable, 4, 0.9, context_of(tmp_path))
    assert cost.before == 40.0
    assert cost.saving(model, prunable)({}) == pytest.approx(0.25)
