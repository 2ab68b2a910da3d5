"""Pruning in rounds on a small network; nothing is exported here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import PassInputs
from edgeopt.compression.cost import macs_of, parameters_of
from edgeopt.compression.steps import Goal, Prune
from edgeopt.device_profiles import load_device
from edgeopt.errors import ConversionError, UsageError
from edgeopt.plan import Job
from edgeopt.progress import Silent
from edgeopt.training.config import TrainingConfig
from edgeopt.tuning import prune as pruning
from edgeopt.tuning.context import StepContext
from edgeopt.tuning.prune import default_importance, prune, shares_left, target_share
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, StepRecord, TensorSpec

SIZE = 6


@dataclass
class Stripes:
    """Pictures with a bright column, whose place is the class."""

    count: int = 32
    labelled: bool = True
    class_names: tuple[str, ...] = ()

    @property
    def is_labelled(self) -> bool:
        return self.labelled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        picture = np.random.default_rng(index).normal(0, 0.3, (1, 1, SIZE, SIZE)).astype(np.float32)
        picture[..., index % 3] += 2
        return Sample({"x": picture}, index % 3 if self.labelled else None, str(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.count))

    def fingerprint(self) -> str:
        return f"{self.count}{self.labelled}"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * SIZE * SIZE, 3),
    ).eval()  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.body(x)
        return result


def stack_of_blocks(count: int) -> Model:
    torch.manual_seed(0)
    blocks = [Residual() for _ in range(count)]
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(4 * SIZE * SIZE, 3)).eval()
    return model_of(net)


@pytest.fixture
def model() -> Model:
    return model_of(network())


def model_of(net: nn.Module) -> Model:
    spec = TensorSpec("x", (1, 1, SIZE, SIZE), "float32", layout="NCHW")
    history = (StepRecord("loaded"),)
    example = {"x": Stripes()[0].inputs["x"]}
    return Model("net", net, None, (spec,), (TensorSpec("y", (1, 3), "float32"),), example, None, (), history, "0")


class Told(Silent):
    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, title: str) -> None:
        self.steps.append(title)


def context_of(
    model: Model, folder: Path, training: Stripes | None, validation: Stripes | None = None, samples: bool = True
) -> StepContext:
    scheme = Scheme("w8a8", "static")
    target = SimpleNamespace(name="t", format="litert", runtimes=("litert",), scheme=scheme)
    job = cast(
        Job, SimpleNamespace(target=target, device=load_device("pixel-6"), scheme=scheme, estimator=EstimatorSpec())
    )
    calibration = Stripes(8)
    stream = (lambda: iter(calibration)) if samples else None
    inputs = PassInputs(scheme, stream, 8 if samples else 0, 0, Told(), EstimatorSpec(), LayerRules())

    def bench(_: Model) -> None:
        raise AssertionError("nothing is exported for this goal")

    folder.mkdir(parents=True, exist_ok=True)
    return StepContext(job, model, training, validation, inputs, cast("object", bench), folder, 1)  # type: ignore[arg-type]


FAST = TrainingConfig(epochs=1, batch_size=16, learning_rate=1e-3)


def settings(**changes: object) -> Prune:
    made = Prune(to=Goal("macs", 0.5, is_share=True), multiple=4, rounds=2, training=FAST, remove=("channels",))
    return replace(made, **changes)  # type: ignore[arg-type]


def steps_of(model: Model) -> list[str]:
    return [record.step for record in model.history]


def macs(model: Model) -> float:
    return float(macs_of(model))


def test_rounds_prune_and_train_until_the_goal_is_met(model: Model, tmp_path: Path) -> None:
    out = prune(model, settings(), context_of(model, tmp_path, Stripes()))
    assert macs(out) <= 0.5 * macs(model)
    assert steps_of(out) == ["loaded", "prune", "fine-tune", "prune", "fine-tune"]
    first, last = (record.config for record in out.history if record.step == "prune")
    assert first["to"] == "macs 0.5x"
    assert (first["round"], last["round"], last["rounds"]) == (1, 2, 2)
    assert first["importance"] == "taylor"
    assert first["macs_before"] == macs(model)
    assert last["macs_after"] == macs(out)
    assert last["parameters_after"] == parameters_of(out)
    assert " -> " in str(first["removed"])
    rates = [record.config["learning_rate"] for record in out.history if record.step == "fine-tune"]
    assert rates == [FAST.learning_rate * pruning.RATE_ON_THE_WAY, FAST.learning_rate]
    assert all(conv.out_channels % 4 == 0 for conv in out.module.modules() if isinstance(conv, nn.Conv2d))  # type: ignore[union-attr]


def test_the_same_run_gives_the_same_weights(model: Model, tmp_path: Path) -> None:
    runs = [prune(model, settings(), context_of(model, tmp_path / name, Stripes())) for name in "ab"]
    states = [run.module.state_dict() for run in runs]  # type: ignore[union-attr]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert runs[0].history == runs[1].history


def test_without_training_data_there_is_one_round_and_it_is_said(model: Model, tmp_path: Path) -> None:
    context = context_of(model, tmp_path, None)
    out = prune(model, settings(), context)
    assert steps_of(out) == ["loaded", "prune"]
    assert out.history[-1].config["importance"] == "activation"
    assert out.history[-1].config["fine_tuned"] is False
    assert any("one round" in step for step in cast(Told, context.progress).steps)


def test_without_any_data_weights_decide(model: Model, tmp_path: Path) -> None:
    context = context_of(model, tmp_path, None, samples=False)
    assert default_importance(settings(), context) == "l2"
    assert prune(model, settings(), context).history[-1].config["importance"] == "l2"


@pytest.mark.parametrize(
    "goal", [Goal("ratio", 0.4), Goal("parameters", 0.6, True), Goal("parameters", 1500), Goal("macs", 60e3)]
)
def test_goals_that_are_counted(model: Model, tmp_path: Path, goal: Goal) -> None:
    out = prune(model, settings(to=goal), context_of(model, tmp_path, None))
    widths = [conv.out_channels for conv in out.module.modules() if isinstance(conv, nn.Conv2d)]  # type: ignore[union-attr]
    match goal.what:
        case "ratio":
            assert sum(widths) <= 0.6 * 40
        case "parameters":
            assert parameters_of(out) <= (0.6 * parameters_of(model) if goal.is_share else 1500)
        case _:
            assert macs(out) <= 60e3


def test_a_goal_that_is_met_already_changes_nothing(model: Model, tmp_path: Path) -> None:
    assert prune(model, settings(to=Goal("macs", 1e9)), context_of(model, tmp_path, None)) is model


def test_a_goal_out_of_reach_is_refused_before_any_training(model: Model, tmp_path: Path) -> None:
    context = context_of(model, tmp_path, Stripes())
    with pytest.raises(UsageError, match=r"out of reach: .*0\.\d\dx"):
        prune(model, settings(to=Goal("macs", 0.01, True), max_ratio=0.5), context)
    assert not any("raining" in step for step in cast(Told, context.progress).steps)


def test_a_round_that_went_further_than_it_had_to_leaves_the_last_its_training(model: Model, tmp_path: Path) -> None:
    # Widths of 16 and 24 step by 8: the first of three rounds to 0.85x goes beyond the last.
    out = prune(
        model, settings(to=Goal("macs", 0.85, True), multiple=8, rounds=3), context_of(model, tmp_path, Stripes())
    )
    assert steps_of(out) == ["loaded", "prune", "fine-tune", "fine-tune"]
    rates = [record.config["learning_rate"] for record in out.history if record.step == "fine-tune"]
    assert rates == [FAST.learning_rate * pruning.RATE_ON_THE_WAY, FAST.learning_rate]


def test_max_ratio_holds_over_all_rounds(model: Model, tmp_path: Path) -> None:
    out = prune(
        model, settings(to=Goal("macs", 0.35, True), max_ratio=0.5, rounds=3), context_of(model, tmp_path, Stripes())
    )
    widths = [conv.out_channels for conv in out.module.modules() if isinstance(conv, nn.Conv2d)]  # type: ignore[union-attr]
    assert widths[0] >= 8
    assert widths[1] >= 12


def test_a_round_that_costs_too_much_is_undone(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.9, 0.88, 0.5])
    monkeypatch.setattr("edgeopt.training.fit.score", lambda *_: next(scores))
    context = context_of(model, tmp_path, Stripes(), Stripes(12))
    out = prune(model, settings(max_drop=0.05, rounds=3), context)
    # The network of the first round, which had a short training only, gets that of the last round.
    assert steps_of(out) == ["loaded", "prune", "fine-tune", "prune-undone", "fine-tune"]
    undone, tuned = (record.config for record in out.history[-2:])
    assert tuned["learning_rate"] == FAST.learning_rate
    assert (undone["round"], undone["score"], undone["score_before"]) == (2, 0.5, 0.9)
    assert macs(out) == out.history[1].config["macs_after"]
    assert any("Undoing" in step for step in cast(Told, context.progress).steps)


def test_a_first_round_that_costs_too_much_leaves_the_model(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.1])
    monkeypatch.setattr("edgeopt.training.fit.score", lambda *_: next(scores))
    out = prune(model, settings(max_drop=0.05), context_of(model, tmp_path, Stripes(), Stripes(12)))
    assert steps_of(out) == ["loaded", "prune-undone"]
    assert macs(out) == macs(model)


class StopError(Exception):
    """An interruption."""


class Interrupted:
    """Counts trainings, and interrupts the second one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainings = 0
        self.searches = 0
        tuning, scores = pruning.FineTuning, pruning.unit_scores

        def counted(*arguments: object) -> object:
            self.searches += 1
            return scores(*arguments)  # type: ignore[arg-type]

        def train(**arguments: object) -> object:
            self.trainings += 1
            if self.trainings == 2:
                raise StopError
            return tuning(**arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(pruning, "unit_scores", counted)
        monkeypatch.setattr(pruning, "FineTuning", train)


@pytest.mark.parametrize("damage", [None, "weights", "record", "settings"])
def test_an_interrupted_run_goes_on_after_the_last_round(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    folder = tmp_path / "state"
    work = Interrupted(monkeypatch)
    with pytest.raises(StopError):
        prune(model, settings(), context_of(model, folder, Stripes()))
    assert (work.searches, work.trainings) == (2, 2)
    if damage == "weights":
        path = folder / "pruned.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "record":
        (folder / "pruned.json").write_text('{"number": 1}')
    changed = settings(scope="per-layer") if damage == "settings" else settings()
    out = prune(model, changed, context_of(model, folder, Stripes()))
    # A plan that was found is not searched again: the second one of an undamaged run.
    assert work.searches - 2 == (0 if damage is None else 2)
    assert work.trainings - 2 == (1 if damage is None else 2)
    if damage is None:
        whole = prune(model, settings(), context_of(model, tmp_path / "whole", Stripes()))
        assert out.history == whole.history
        states = [made.module.state_dict() for made in (out, whole)]  # type: ignore[union-attr]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("plan", ['{"number"', '{"0": [99]}', '{"other": [0]}'])
def test_a_plan_that_does_not_verify_is_found_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    work = Interrupted(monkeypatch)
    with pytest.raises(StopError):
        prune(model, settings(), context_of(model, tmp_path, Stripes()))
    path = tmp_path / "plan.json"
    kept = json.loads(path.read_text())
    try:
        path.write_text(json.dumps(kept | {"plan": json.loads(plan)}))
    except json.JSONDecodeError:
        path.write_text(plan)
    prune(model, settings(), context_of(model, tmp_path, Stripes()))
    assert work.searches == 3


def test_a_folder_that_cannot_be_written_is_told(model: Model, tmp_path: Path) -> None:
    (tmp_path / "plan.partial").mkdir()
    with pytest.raises(UsageError, match="can't be written: is a directory; give another --cache-dir"):
        prune(model, settings(), context_of(model, tmp_path, None))


def test_a_finished_run_is_taken_from_its_folder(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prune(model, settings(), context_of(model, tmp_path, None))
    monkeypatch.setattr(pruning, "unit_scores", lambda *_: pytest.fail("was done before"))
    again = prune(model, settings(), context_of(model, tmp_path, None))
    assert again.history == first.history


def test_the_penalty_is_on_between_rounds_only(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constraints: list[object] = []
    real = pruning.FineTuning

    def tuning(**arguments: object) -> object:
        constraints.append(arguments["constraint"])
        return real(**arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pruning, "FineTuning", tuning)
    prune(model, settings(group_lasso=0.1), context_of(model, tmp_path, Stripes()))
    assert [type(constraint).__name__ for constraint in constraints] == ["GroupLasso", "NoneType"]


def test_shares_of_schedules() -> None:
    assert shares_left("one-shot", 3, 0.5) == (0.5,)
    assert shares_left("iterative", 3, 0.125) == pytest.approx((0.5, 0.25, 0.125))
    assert shares_left("cubic", 2, 0.2) == pytest.approx((1 - 0.8 * 0.875, 0.2))
    assert shares_left("iterative", 1, 0.3) == (0.3,)


def test_targets_as_shares() -> None:
    assert target_share(Goal("ratio", 0.25), 40) == 0.75
    assert target_share(Goal("latency", 0.6, is_share=True), 3.0) == 0.6
    assert target_share(Goal("latency", 1.5), 3.0) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": Goal("macs", 1.5, is_share=True)}, "1.5 is no goal"),
        ({"to": Goal("ratio", 1.0)}, "1 is no goal"),
        ({"to": Goal("latency", 0.0)}, "to latency: 0 is no goal"),
        ({"rounds": 0}, "rounds: 0 rounds"),
        ({"max_drop": 0.01}, "max-drop: needs data"),
        ({"max_ratio": 1.0}, "max-ratio: 1 is no share"),
        ({"multiple": 0}, "multiple: 0 is no width"),
        ({"protect": ("3", "conv")}, "protect 'conv': matches no layer; did you mean"),
    ],
)
def test_settings_that_make_no_sense(model: Model, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prune(model, settings(**changes), context_of(model, tmp_path, Stripes()))


def test_measured_goals_want_one_process(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes"):
        prune(model, settings(to=Goal("latency", 0.5, True)), context_of(model, tmp_path, Stripes()))


def test_nothing_to_prune_names_a_layer_and_why(model: Model, tmp_path: Path) -> None:
    reason = r"net: has nothing that may be pruned \(0, 3: is protected; 6: no layer reads its channels"
    with pytest.raises(ConversionError, match=reason) as caught:
        prune(model, settings(protect=("*",)), context_of(model, tmp_path, None))
    assert caught.value.exit_code == 4


def test_what_keeps_its_width_is_recorded(model: Model, tmp_path: Path) -> None:
    out = prune(model, settings(to=Goal("macs", 0.9, True), protect=("3",)), context_of(model, tmp_path, None))
    assert "3: is protected" in str(out.history[-1].config["kept"])


def test_blocks_alone_can_go_and_max_ratio_bounds_them_over_all_rounds(tmp_path: Path) -> None:
    model = stack_of_blocks(8)
    only = {"remove": ("blocks",), "rounds": 3, "max_ratio": 0.5}
    out = prune(model, settings(to=Goal("ratio", 0.5), **only), context_of(model, tmp_path / "half", Stripes()))
    assert sum(isinstance(part, Residual) for part in out.module.modules()) == 4  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"0\.40x of the prunable channels .* is out of reach: .* 0\.50x"):
        prune(model, settings(to=Goal("ratio", 0.6), **only), context_of(model, tmp_path / "more", Stripes()))


def test_an_importance_that_is_no_loss_is_not_weighed_against_latency(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed: list[object] = []
    real = pruning.Search

    def search(*arguments: object, are_losses: bool) -> object:
        weighed.append(are_losses)
        return real(*arguments, are_losses=are_losses)  # type: ignore[arg-type]

    monkeypatch.setattr(pruning, "Search", search)
    for importance in ("taylor", "l2"):
        folder = tmp_path / importance
        prune(model, settings(importance=importance), context_of(model, folder, Stripes() if not weighed else None))
    assert weighed[-1] is False
    assert weighed[0] is True
