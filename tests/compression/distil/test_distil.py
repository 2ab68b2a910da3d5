"""Distillation on real digits: what it is worth, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.distil.distil import Distillation
from edgeopt.compression.distil.views import StudentView, TeacherView, match
from edgeopt.datasets import open_dataset
from edgeopt.datasets.base import Dataset
from edgeopt.errors import UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, StepRecord, TensorSpec

SPECS = (TensorSpec("x", (1, 1, 8, 8), "float32", "NCHW"),)
CONFIG = TrainingConfig(epochs=5, batch_size=64, learning_rate=2e-2)


def digits(held_out: bool, labelled: bool = True) -> Dataset:
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == held_out
    pictures = (data.images[chosen] / 8 - 1).astype(np.float32)[:, np.newaxis]
    labels = [int(label) for label in data.target[chosen]]
    return open_dataset(list(zip(pictures, labels, strict=True)) if labelled else list(pictures), SPECS, None)


def network(*widths: int) -> nn.Module:
    torch.manual_seed(sum(widths))
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in zip((1, *widths), widths, strict=False)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def model_of(module: nn.Module, outputs: int = 10) -> Model:
    return Model(
        "digits", module.eval().requires_grad_(False), None, SPECS, (TensorSpec("y", (1, outputs), "float32"),),
        {"x": np.zeros((1, 1, 8, 8), np.float32)}, None, tuple("0123456789"), (), "0" * 64,
    )  # fmt: skip


def inputs_of(data: Dataset) -> PassInputs:
    def samples() -> Iterator[Sample]:
        return iter(data)

    return PassInputs(Scheme("w8a8", "static"), samples, len(data), 0, Silent(), EstimatorSpec(), LayerRules())


def accuracy(model: Model, data: Dataset) -> float:
    assert model.module is not None
    pictures = torch.from_numpy(np.concatenate([sample.inputs["x"] for sample in data]))
    labels = torch.tensor([sample.label for sample in data])
    with torch.no_grad():
        return float((model.module(pictures).argmax(-1) == labels).float().mean())


@pytest.fixture(scope="module")
def teacher() -> Model:
    module = network(16, 32).train()
    data = digits(held_out=False)
    pictures = torch.from_numpy(np.concatenate([sample.inputs["x"] for sample in data]))
    labels = torch.tensor([sample.label for sample in data])
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    for _ in range(8):
        for chosen in torch.randperm(len(pictures)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(pictures[chosen]), labels[chosen]).backward()
            optimizer.step()
    return replace(model_of(module), name="big", source_sha256="b" * 64)


def trained(model: Model, pass_: Distillation) -> Model:
    return run_pass(pass_, model, inputs_of(pass_.training))


FEATURES = Teaching(loss="distillation", features=("0", "1=1"))


def test_a_student_learns_from_features_without_labels(teacher: Model) -> None:
    data, held_out = digits(False, labelled=False), digits(True)
    student = model_of(network(8, 12))
    plain = trained(student, Distillation(teacher, data, config=CONFIG))
    taught = trained(student, Distillation(teacher, data, config=CONFIG, teaching=FEATURES))
    scores = [accuracy(model, held_out) for model in (teacher, student, plain, taught)]
    print("teacher {:.3f}, untrained {:.3f}, soft labels {:.3f}, with features {:.3f}".format(*scores))
    assert scores[2] > scores[1] + 0.4
    assert scores[3] >= scores[2] - 0.02
    (step,) = taught.history
    assert step.step == "distil"
    assert step.config["teacher"] == "big"
    assert step.config["features"] == "0, 1=1"
    assert step.config["feature_pairs"] == 2
    # Neither projections nor hooks stay, and what was frozen is frozen again.
    assert taught.module is not None
    assert student.module is not None
    shapes = {name: tensor.shape for name, tensor in student.module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in taught.module.state_dict().items()} == shapes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in taught.module.modules())
    assert not any(parameter.requires_grad for parameter in taught.module.parameters())


def test_the_same_seed_gives_the_same_student_and_the_cache_changes_nothing(teacher: Model, tmp_path: Path) -> None:
    data = digits(False)
    config = replace(CONFIG, epochs=2)
    kept = replace(FEATURES, teacher_cache=tmp_path / "teacher")
    students = [
        trained(model_of(network(8, 12)), Distillation(teacher, data, config=config, teaching=teaching))
        for teaching in (FEATURES, FEATURES, kept, kept)
    ]
    states = [student.module.state_dict() for student in students if student.module is not None]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(states[2][name], states[3][name])
        assert torch.allclose(tensor, states[2][name], atol=1e-3)
    assert any((tmp_path / "teacher").iterdir())
    assert students[0].history == students[2].history


class StoppedError(Exception):
    """An interruption."""


class StopsIn(Silent):
    """Interrupts training in its second epoch."""

    def track(self, items, title, total):  # type: ignore[no-untyped-def]  # generic over the items
        if "epoch 2" in title:
            raise StoppedError
        return super().track(items, title, total)


def test_a_killed_run_goes_on(teacher: Model, tmp_path: Path) -> None:
    data = digits(False)
    student = model_of(network(8, 12))
    config = replace(CONFIG, epochs=3)
    whole = trained(student, Distillation(teacher, data, config=config, teaching=FEATURES))
    pass_ = Distillation(teacher, data, config=config, teaching=FEATURES, checkpoint_dir=tmp_path / "state")
    with pytest.raises(StoppedError):
        run_pass(pass_, student, replace(inputs_of(data), progress=StopsIn()))
    resumed = trained(student, pass_)
    assert whole.module is not None
    assert resumed.module is not None
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name])


def test_a_sparse_student_stays_sparse(teacher: Model) -> None:
    student = model_of(network(8, 12))
    assert student.module is not None
    weight = student.module.get_parameter("1.0.weight")
    zeros = torch.arange(weight.numel()).reshape(weight.shape) % 2 == 0
    weight.masked_fill_(zeros, 0.0)
    data, config = digits(False), replace(CONFIG, epochs=1)
    for history, stays in (((StepRecord("sparsify"),), True), ((), False)):
        pass_ = Distillation(teacher, data, config=config, teaching=FEATURES)
        taught = trained(replace(student, history=history), pass_)
        assert taught.module is not None
        assert bool((taught.module.get_parameter("1.0.weight")[zeros] == 0).all()) is stays


def test_projections_start_the_same_and_leave_torchs_random_state(teacher: Model) -> None:
    assert teacher.module is not None
    student = network(8, 12)
    matching = match(student, teacher.module, (torch.zeros(1, 1, 8, 8),), ("0", "1"), attention=False)
    torch.manual_seed(5)
    views = [StudentView(student, matching, seed) for seed in (1, 1, 2)]
    after = torch.randn(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.randn(1))
    first, again, other = ([p.clone() for p in view.projections.parameters()] for view in views)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    outputs = views[0](torch.randn(3, 1, 8, 8))
    assert [x.shape for x in outputs] == [
        x.shape for x in TeacherView(teacher.module, matching)(torch.randn(3, 1, 8, 8))
    ]


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :10], x.mean(1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: replace(t, inputs=(replace(SPECS[0], name="image"),)),
         r"teacher 'big': takes image=float32\[1,1,8,8\], and the student x=float32\[1,1,8,8\]"),
        (lambda t: replace(t, module=TwoOutputs()), r"gives 2 outputs of shape \(1, 10\), \(1, 8, 8\), and"),
        (lambda t: replace(t, module=network(8)[:-1].append(nn.Linear(8, 7))), r"gives 1 output of shape \(1, 7\)"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_told(teacher: Model, change, problem: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=problem):
        trained(model_of(network(8, 12)), Distillation(change(teacher), digits(False), config=CONFIG))


class Attends(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(layers)
        self.up = nn.Linear(8, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x.squeeze(1))
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x.mean(1))
        return result


def test_attention_maps_come_closer() -> None:
    teacher, student = model_of(Attends(4, 16)), model_of(Attends(2, 8))
    data = digits(False, labelled=False)
    arguments = (torch.from_numpy(np.concatenate([data[i].inputs["x"] for i in range(16)])),)

    def distance(model: Model) -> float:
        assert model.module is not None
        assert teacher.module is not None
        matching = match(model.module, teacher.module, arguments, (), attention=True)
        assert [pair.teacher for pair in matching.maps] == [1, 3]
        with torch.no_grad():
            mine = StudentView(model.module, matching, 0).eval()(*arguments)
            theirs = TeacherView(teacher.module, matching).eval()(*arguments)
        return sum(float((a - b).square().mean()) for a, b in zip(mine[1:], theirs[1:], strict=True))

    teaching = Teaching(loss="distillation", attention=True, feature_weight=3.0)
    config = replace(CONFIG, epochs=2, learning_rate=1e-2)
    taught = trained(student, Distillation(teacher, data, config=config, teaching=teaching))
    assert distance(taught) < 0.7 * distance(student)
    assert taught.history[-1].config["attention_maps"] == 2


def test_attention_and_gradient_checkpointing_dont_go_together(teacher: Model) -> None:
    config = replace(CONFIG, gradient_checkpointing=True)
    with pytest.raises(UsageError, match="attention: attention maps can't be watched"):
        trained(
            model_of(network(8, 12)),
            Distillation(teacher, digits(False), config=config, teaching=Teaching(attention=True)),
        )
