"""The distillation step: where the teacher comes from, how students are made, and what goes wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs
from edgeopt.compression.cost import macs_of
from edgeopt.compression.steps import Distil, Goal
from edgeopt.config import config_of
from edgeopt.datasets import open_dataset
from edgeopt.datasets.base import Dataset
from edgeopt.errors import UsageError
from edgeopt.plan import plan_jobs
from edgeopt.progress import Silent
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.tuning.context import StepContext
from edgeopt.tuning.distil import distil
from edgeopt.tuning.students import Shape, family_of
from edgeopt.types import LayerRules, Model, Sample, TensorSpec
from edgeopt.workbench import Workbench

SPECS = (TensorSpec("x", (1, 1, 8, 8), "float32", "NCHW"),)
CONFIG = TrainingConfig(epochs=3, batch_size=32, learning_rate=1e-2)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(32) for _ in range(4)))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return result


def digits(held_out: bool) -> Dataset:
    """Every other one, to be quick."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = ((np.arange(len(data.target)) % 5 == 0) == held_out) & (np.arange(len(data.target)) % 2 == 0)
    pictures = (data.images[chosen] / 8 - 1).astype(np.float32)[:, np.newaxis]
    return open_dataset(list(zip(pictures, map(int, data.target[chosen]), strict=True)), SPECS, None)


def model_of(module: nn.Module) -> Model:
    return Model(
        "digits", module.eval().requires_grad_(False), None, SPECS, (TensorSpec("y", (1, 10), "float32"),),
        {"x": np.zeros((1, 1, 8, 8), np.float32)}, None, tuple("0123456789"), (), "0" * 64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    module = Residual().train()
    data = digits(held_out=False)
    pictures = torch.from_numpy(np.concatenate([sample.inputs["x"] for sample in data]))
    labels = torch.tensor([sample.label for sample in data])
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for _ in range(6):
        for chosen in torch.randperm(len(pictures)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(pictures[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model_of(module)


def context_of(
    model: Model, folder: Path, training: Dataset | None, validation: Dataset | None, target: str = "android-onnx-int8"
) -> StepContext:
    (job,) = plan_jobs(config_of({"model": "net.py:build", "target": target, "calibration": "data.npz"}))
    inputs = PassInputs(job.scheme, None, 0, 0, Silent(), job.estimator, LayerRules())
    if training is not None:

        def samples() -> Iterator[Sample]:
            return (training[index] for index in range(32))

        inputs = replace(inputs, samples=samples, count=32)

    def bench(changed: Model) -> Workbench:
        raise AssertionError(f"{changed.name} needs no files")

    return StepContext(job, model, training, validation, inputs, bench, folder, 1)


def accuracy(model: Model, data: Dataset) -> float:
    assert model.module is not None
    pictures = torch.from_numpy(np.concatenate([sample.inputs["x"] for sample in data]))
    labels = torch.tensor([sample.label for sample in data])
    with torch.no_grad():
        return float((model.module(pictures).argmax(-1) == labels).float().mean())


def forgetful(model: Model) -> Model:
    """The same architecture with the weights of its birth."""
    module = copy.deepcopy(model.module)
    assert module is not None
    torch.manual_seed(1)
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return replace(model, module=module)


def test_a_derived_student_is_smaller_and_starts_with_what_the_model_knew(model: Model, tmp_path: Path) -> None:
    held_out = digits(True)
    context = context_of(model, tmp_path, digits(False), held_out)
    settings = Distil(student="derived", width=0.5, depth=0.5, training=replace(CONFIG, epochs=2))
    student = distil(model, settings, context)
    untaught = family_of(model, context, depth=True).student(Shape(0.5, 0.5))
    assert macs_of(student) == macs_of(untaught) < 0.3 * macs_of(model)
    made, learned = student.history
    assert (made.step, made.config["width"], made.config["depth"]) == ("prune", 0.5, 0.5)
    assert (learned.step, learned.config["teacher"]) == ("distil", "digits")
    plain = replace(settings, student="model", width=1.0, depth=1.0)
    other = distil(forgetful(untaught), plain, replace(context, state_dir=tmp_path / "other"))
    scores = [accuracy(some, held_out) for some in (model, untaught, other, student)]
    print("model {:.3f}, untaught {:.3f}, taught from scratch {:.3f}, taught {:.3f}".format(*scores))
    assert scores[3] > scores[2] + 0.05
    assert scores[3] > 0.6


def test_a_searched_student_keeps_the_budget(model: Model, tmp_path: Path) -> None:
    held_out = digits(True)
    context = context_of(model, tmp_path, digits(False), held_out)
    goal = Goal("macs", 0.3, is_share=True)
    student = distil(model, Distil(student="search", to=goal, trials=2, training=CONFIG), context)
    assert macs_of(student) <= 0.3 * macs_of(model)
    tried = str(student.history[0].config["tried"]).split("; ")
    assert len(tried) == 2
    assert all("cost" in line and "score" in line for line in tried)
    assert accuracy(student, held_out) > 0.5


TEACHER = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, {outputs}))
"""


def test_a_teacher_is_loaded_as_a_model_is(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "teacher.py"
    file.write_text(TEACHER.format(outputs=10), encoding="utf-8")
    context = context_of(model, tmp_path / "state", digits(False), None)
    settings = Distil(teacher=f"{file}:build", training=replace(CONFIG, epochs=1))
    student = distil(model, settings, context)
    assert student.history[-1].config["teacher_sha256"] not in (None, model.source_sha256)


@pytest.mark.parametrize(
    ("settings", "validation", "problem"),
    [
        (Distil(student="search", to=Goal("macs", 0.5, is_share=True)), False, "student 'search': needs data to judge"),
        (Distil(student="search", to=Goal("ratio", 0.5)), True, "needs a budget in macs, parameters, size or latency"),
        (Distil(teacher_weights=Path("x.safetensors")), True, "teacher-weights: goes with a teacher"),
        (Distil(sequence_level=True), True, "sequence-level: digits: is no generator"),
        (Distil(teaching=Teaching(features=("stem=root",))), True, "the teacher has no layer 'root'"),
        (Distil(teaching=Teaching(attention=True)), True, "the student computes no attention maps"),
        (Distil(student="derived", width=0.9), True, "the model can't be made smaller"),
    ],
)
def test_what_does_not_fit_is_told(
    model: Model, tmp_path: Path, settings: Distil, validation: bool, problem: str
) -> None:
    context = context_of(model, tmp_path, digits(False), digits(True) if validation else None)
    with pytest.raises(UsageError, match=problem):
        distil(model, settings, context)


def test_a_teacher_with_other_outputs_is_told(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "other.py"
    file.write_text(TEACHER.format(outputs=7), encoding="utf-8")
    with pytest.raises(UsageError, match=r"teacher: gives 1 output of shape \(1, 7\), and the student"):
        distil(model, Distil(teacher=f"{file}:build"), context_of(model, tmp_path, digits(False), None))


def test_nothing_to_train_on_and_several_processes_are_told(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="distil: has nothing to train on"):
        distil(model, Distil(), context_of(model, tmp_path, None, None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = Distil(student="search", to=Goal("macs", 0.5, is_share=True))
    with pytest.raises(UsageError, match="is not done by several processes"):
        distil(model, settings, context_of(model, tmp_path, digits(False), digits(True)))


TOKENS, LENGTH = 12, 10


class Writer(nn.Module):
    """A language model of one recurrent layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(self.table(ids))[0])
        return result


def test_a_generator_learns_what_its_teacher_writes(tmp_path: Path) -> None:
    specs = (TensorSpec("ids", (1, LENGTH), "int64"),)
    rng = np.random.default_rng(0)
    rows = [(np.arange(LENGTH) * step + first) % TOKENS for step in (1, 5) for first in rng.integers(TOKENS, size=48)]
    data = open_dataset([{"ids": row} for row in rows], specs, None)

    def writer(width: int) -> Model:
        torch.manual_seed(width)
        return Model(
            "writer", Writer(width).eval(), None, specs, (TensorSpec("y", (1, LENGTH, TOKENS), "float32"),),
            {"ids": np.zeros((1, LENGTH), np.int64)}, None, (), (), "0" * 64,
        )  # fmt: skip

    teacher, student = writer(32), writer(12)
    assert teacher.module is not None
    ids = torch.from_numpy(np.stack(rows))
    optimizer = torch.optim.AdamW(teacher.module.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(teacher.module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    context = replace(context_of(teacher, tmp_path, data, data), original=teacher)
    config = TrainingConfig(epochs=20, batch_size=16, learning_rate=2e-2)
    taught = distil(student, Distil(sequence_level=True, training=config), context)
    (step,) = taught.history
    assert step.config["loss"] == "cross-entropy"
    assert len(list((tmp_path / "sequences").iterdir())) == 1  # validation data without labels are the same here

    def continues(model: Model) -> float:
        assert model.module is not None
        with torch.no_grad():
            return float((model.module(ids)[:, 3:-1].argmax(-1) == ids[:, 4:]).float().mean())

    print(f"teacher {continues(teacher):.3f}, student {continues(student):.3f}, taught {continues(taught):.3f}")
    assert continues(taught) > 0.8 > continues(student)
