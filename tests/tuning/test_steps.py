"""The steps of a recipe: refused early, done once, and taken from the cache the next time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.steps import Distil, Goal, Prune, Qat, Sparsify, Step
from edgeopt.config import RunConfig, config_of
from edgeopt.errors import UsageError
from edgeopt.plan import Job, plan_jobs
from edgeopt.progress import Silent
from edgeopt.tuning import steps
from edgeopt.tuning.context import StepData
from edgeopt.tuning.step_cache import StepCache
from edgeopt.tuning.steps import check_steps, run_steps
from edgeopt.types import LayerRules, Model, StepRecord, TensorSpec
from edgeopt.workbench import Workbench

HALF = Goal("latency", 0.5, is_share=True)


def a_model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    spec = TensorSpec("x", (1, 4), "float32"), TensorSpec("y", (1, 2), "float32")
    example = {"x": np.ones((1, 4), np.float32)}
    return Model("net", net, None, spec[:1], spec[1:], example, None, (), (StepRecord("load"),), "0" * 64)


def narrowed(model: Model) -> Model:
    """The model with half of its hidden units, as pruning leaves it."""
    assert isinstance(model.module, nn.Sequential)
    first, last = model.module[0], model.module[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    width = first.out_features // 2
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)).eval().requires_grad_(False)
    net[0].weight.copy_(first.weight[:width])
    net[0].bias.copy_(first.bias[:width])
    net[2].weight.copy_(last.weight[:, :width])
    net[2].bias.copy_(last.bias)
    record = StepRecord("prune", {"width": width})
    return replace(model, module=net, history=(*model.history, record), input_ranges={"0": (-1.0, 1.0)})


class Steps:
    """Stands for the steps' own code; counts what is really done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def do(self, step: Step, model: Model, *rest: object) -> Model:
        del rest
        self.done.append(steps.name_of(step))
        return narrowed(model)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Steps:
    fake = Steps()
    monkeypatch.setattr(steps, "_do", fake.do)
    return fake


def configured(tmp_path: Path, more: Mapping[str, object] | None = None) -> tuple[RunConfig, Job]:
    keys = {"model": "net.py:build", "target": "android-int8-dynamic", "output_dir": tmp_path / "dist", **(more or {})}
    config = config_of(keys)
    return config, plan_jobs(config)[0]


def run(recipe: tuple[Step, ...], tmp_path: Path, more: Mapping[str, object] | None = None) -> list[Model]:
    config, job = configured(tmp_path, more)
    bench = Workbench(a_model(), None, LayerRules(), 0, tmp_path, Silent())
    made, _ = run_steps(recipe, job, config, StepData(None, None, None), bench, Silent())
    return [one.model for one in made]


def test_a_finished_recipe_is_not_done_again(tmp_path: Path, work: Steps) -> None:
    recipe = (Prune(), Distil())
    first = run(recipe, tmp_path)
    assert work.done == ["prune", "distil"]
    again = run(recipe, tmp_path)
    assert work.done == ["prune", "distil"]
    x = torch.randn(3, 4)
    for one, other in zip(first, again, strict=True):
        assert one.module is not None
        assert other.module is not None
        assert torch.equal(one.module(x), other.module(x))
        assert (one.history, one.input_ranges) == (other.history, other.input_ranges)
    assert not list((tmp_path / "dist" / ".steps" / "net").glob("*.unfinished"))


def test_what_a_step_depends_on_makes_it_and_all_later_ones_anew(tmp_path: Path, work: Steps) -> None:
    run((Prune(), Distil()), tmp_path)
    run((Prune(), Distil(trials=3)), tmp_path)
    assert work.done == ["prune", "distil", "distil"]
    run((Prune(rounds=2), Distil()), tmp_path)
    assert work.done[3:] == ["prune"]  # the pruned model came out the same, and so did what is made of it
    run((Prune(), Distil()), tmp_path, {"seed": 1})
    assert work.done[4:] == ["prune", "distil"]


@pytest.mark.parametrize("damage", ["weights", "record", "gone"])
def test_a_cache_entry_that_does_not_verify_is_made_anew(tmp_path: Path, work: Steps, damage: str) -> None:
    (first,) = run((Prune(),), tmp_path)
    (folder,) = (tmp_path / "dist" / ".steps" / "net").iterdir()
    if damage == "weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    elif damage == "record":
        (folder / "record.json").write_text("{")
    else:
        (folder / "model.safetensors").unlink()
    (again,) = run((Prune(),), tmp_path)
    assert work.done == ["prune", "prune"]
    assert first.history == again.history


def test_targets_share_what_does_not_depend_on_them(tmp_path: Path, work: Steps) -> None:
    run((Prune(),), tmp_path)
    run((Prune(),), tmp_path, {"target": "android-onnx-int8-dynamic"})
    assert work.done == ["prune"]
    # Widths follow the precision's kernels, zeros do not.
    run((Sparsify(),), tmp_path)
    run((Sparsify(),), tmp_path, {"target": "android-fp32"})
    assert work.done == ["prune", "sparsify"]
    measured = Prune(to=HALF)
    run((measured,), tmp_path)
    run((measured,), tmp_path, {"target": "android-onnx-int8-dynamic"})
    assert work.done[2:] == ["prune"] * 2


def test_a_goal_that_was_not_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def undone(step: Step, model: Model, *rest: object) -> Model:
        del step, rest
        record = StepRecord("prune-undone", {"to": "0.5x macs", "score": 0.8123, "score_before": 0.93})
        return replace(narrowed(model), history=(*model.history, record))

    monkeypatch.setattr(steps, "_do", undone)
    config, job = configured(tmp_path)
    for _ in range(2):  # made, and taken from the cache
        bench = Workbench(a_model(), None, LayerRules(), 0, tmp_path, Silent())
        _, findings = run_steps((Prune(),), job, config, StepData(None, None, None), bench, Silent())
        (told,) = (finding.message for finding in findings if finding.code == "goal-not-reached")
        assert told == "the round to 0.5x macs was undone: on the validation data the score fell from 0.93 to 0.8123"


def test_the_cache_may_lie_elsewhere(tmp_path: Path, work: Steps) -> None:
    run((Prune(),), tmp_path, {"cache_dir": tmp_path / "kept"})
    assert work.done == ["prune"]
    assert (tmp_path / "kept" / "net").is_dir()
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ((), {"train": "t.npz"}, "train: is of no use without a step"),
        ((), {"save_weights": "w.safetensors"}, "save-weights: is of no use without a step"),
        ((Distil(),), {}, "distil: has nothing to train on"),
        ((Qat(),), {}, "qat: has nothing to train on"),
        ((Sparsify(method="movement"),), {}, "sparsify: has nothing to train on"),
        ((Prune(importance="taylor"),), {}, "'taylor' is judged by data"),
        ((Prune(importance="activation"),), {}, "'activation' is judged by data"),
        ((Distil(student="search", to=HALF),), {"train": "t.npz"}, "needs data to judge the students"),
        ((Prune(),), {"model": "net.onnx", "save_weights": "w.safetensors"}, "this model comes as a graph"),
        ((Prune(),), {"save_weights": f"{__file__}/w.safetensors"}, "can't be written"),
        ((Prune(max_drop=0.01),), {"train": "t.npz"}, "needs data to judge the rounds"),
        ((Qat(), Prune()), {"train": "t.npz"}, "qat: must be the last step"),
        ((Qat(),), {"train": "t.npz", "target": "android-fp32"}, "is not quantized"),
        ((Qat(),), {"train": "t.npz", "recipe": ["equalize"]}, "would undo what training fits"),
    ],
)
def test_what_can_not_be_done_is_refused_early(
    tmp_path: Path, recipe: tuple[Step, ...], more: dict[str, object], message: str
) -> None:
    config, job = configured(tmp_path, more)
    with pytest.raises(UsageError, match=message):
        check_steps(replace(config, step=recipe), (job,))


def test_a_result_that_can_not_be_kept_is_told_and_used(
    tmp_path: Path, work: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: StepCache, key: str, model: Model, base: Model) -> None:
        del self, key, model, base
        raise UsageError("can't be written: no space left on device", where="cache")

    monkeypatch.setattr(StepCache, "save", full)
    config, job = configured(tmp_path)
    bench = Workbench(a_model(), None, LayerRules(), 0, tmp_path, Silent())
    made, findings = run_steps((Prune(),), job, config, StepData(None, None, None), bench, Silent())
    assert work.done == ["prune"]
    assert made[0].model.history[-1].step == "prune"
    assert [(f.code, f.message) for f in findings] == [
        ("step-not-cached", "can't be kept for a next run: can't be written: no space left on device")
    ]


def test_a_place_that_can_hold_no_cache_is_refused_before_any_work(tmp_path: Path, work: Steps) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a directory; give another --cache-dir"):
        run((Prune(),), tmp_path, {"cache_dir": tmp_path / "file"})
    assert work.done == []


def test_several_processes_do_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, job = configured(tmp_path, {"train": "t.npz"})
    check_steps(replace(config, step=(Qat(),)), (job,))
    with pytest.raises(UsageError, match="several processes can do one step only"):
        check_steps(replace(config, step=(Prune(), Qat())), (job,))
    with pytest.raises(UsageError, match="several processes would measure differently"):
        check_steps(replace(config, step=(Prune(to=HALF),)), (job,))


def test_what_progress_alone_would_say_is_told_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spinner's lines are gone when the run is over."""

    def nothing(step: Step, model: Model, *rest: object) -> Model:
        del step, rest
        return model

    def untrained(step: Step, model: Model, *rest: object) -> Model:
        del step, rest
        record = StepRecord("prune", {"fine_tuned": False, "kept": "head: is protected"})
        return replace(narrowed(model), history=(*model.history, record))

    config, job = configured(tmp_path)
    for do, codes in ((nothing, ["goal-already-met"]), (untrained, ["not-trained", "kept-width"])):
        monkeypatch.setattr(steps, "_do", do)
        folder = tmp_path / do.__name__
        folder.mkdir()
        bench = Workbench(a_model(), None, LayerRules(), 0, folder, Silent())
        own = replace(config, cache_dir=folder)
        _, findings = run_steps((Prune(),), job, own, StepData(None, None, None), bench, Silent())
        assert [finding.code for finding in findings] == codes


STUDENT = """
from torch import nn
def build():
    return nn.Sequential(nn.Linear(4, {width}), nn.ReLU(), nn.Linear({width}, 2))
"""


def test_a_student_of_its_own_takes_the_models_place_and_is_found_again(tmp_path: Path, work: Steps) -> None:
    code = tmp_path / "small.py"
    code.write_text(STUDENT.format(width=6))
    step = Distil(student=f"{code}:build")
    (first,) = run((step,), tmp_path)
    assert isinstance(first.module, nn.Sequential)
    assert isinstance(first.module[0], nn.Linear)
    assert first.name == "net"
    assert [record.step for record in first.history] == ["load", "student", "prune"]
    (again,) = run((step,), tmp_path)
    assert work.done == ["distil"]
    x = torch.randn(3, 4)
    assert again.module is not None
    assert torch.equal(first.module(x), again.module(x))


def test_a_student_whose_code_changed_is_another(tmp_path: Path, work: Steps) -> None:
    for width in (6, 8):
        code = tmp_path / f"small{width}.py"
        code.write_text(STUDENT.format(width=width))
        run((Distil(student=f"{code}:build"),), tmp_path)
    assert work.done == ["distil", "distil"]


def test_where_the_student_lies_decides_nothing(tmp_path: Path) -> None:
    config, job = configured(tmp_path)
    data = StepData(None, None, None)
    one, other = (
        steps.identity_of(Distil(student=f"{folder}/small.py:build"), job, config, data, a_model())
        for folder in ("here", "there")
    )
    assert one == other
