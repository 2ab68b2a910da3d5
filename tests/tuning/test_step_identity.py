"""What a finished step is known again by: all that decides its result, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.steps import Distil, Goal, Prune, Qat, Step
from edgeopt.config import RunConfig, config_of
from edgeopt.errors import UsageError
from edgeopt.plan import plan_jobs
from edgeopt.training.config import Teaching
from edgeopt.tuning.context import StepData
from edgeopt.tuning.step_identity import code_of, identity_of
from edgeopt.types import ImagePreprocessing, Model, StepRecord, TensorSpec, TextPreprocessing

FACTORY = """
import torch
from torch import nn
from parts import Tail
from edgeopt.sources import ModelSpec

def build():
    torch.manual_seed(0)
    return ModelSpec(nn.Sequential(nn.Linear(4, 2), Tail()), example_inputs=(torch.zeros(1, 4),))
"""
PARTS = """
from torch import nn
from helpers import bend

class Tail(nn.Module):
    def forward(self, x):
        return bend(x)
"""


def a_model() -> Model:
    torch.manual_seed(0)
    spec = TensorSpec("x", (1, 4), "float32"), TensorSpec("y", (1, 2), "float32")
    example = {"x": np.ones((1, 4), np.float32)}
    return Model("net", nn.Linear(4, 2).eval(), None, spec[:1], spec[1:], example, None, (), (StepRecord("load"),), "0")


def identity(step: Step, model: Model | None = None, **more: object) -> object:
    config: RunConfig = config_of({"model": "net.py:build", "target": "android-int8-dynamic", **more})
    return identity_of(step, plan_jobs(config)[0], config, StepData(None, None, None), model or a_model())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a teacher of the user's own, in three files."""
    (tmp_path / "big.py").write_text(FACTORY)
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "helpers.py").write_text("def bend(x):\n    return x.relu()\n")
    (tmp_path / "losses.py").write_text("def mine(outputs, labels):\n    return outputs.sum()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in ("parts", "helpers", "losses"):
        sys.modules.pop(name, None)


def test_preprocessing_and_labels_of_the_model_count(tmp_path: Path) -> None:
    model = a_model()
    picture = ImagePreprocessing(height=8, width=8)
    found = [identity(Prune(), replace(model, preprocessing=p)) for p in (None, picture, replace(picture, std=(2.0,)))]
    found.append(identity(Prune(), replace(model, labels=("cat", "dog"))))
    assert len({repr(one) for one in found}) == 4

    path = tmp_path / "tokenizer.json"
    path.write_text("one")
    text = replace(model, preprocessing=TextPreprocessing(tokenizer=str(path), max_length=8))
    before = identity(Prune(), text)
    path.write_text("other")
    assert identity(Prune(), text) != before


def test_code_is_followed_through_the_files_of_the_user(project: Path) -> None:
    import parts

    before = code_of([parts])
    (project / "unrelated.py").write_text("x = 1")
    assert code_of([parts]) == before
    (project / "helpers.py").write_text("def bend(x):\n    return x.relu().clamp(max=6)\n")
    assert code_of([parts]) != before
    assert code_of([torch, np, None]) == code_of([])


def test_a_teacher_counts_by_what_it_is(project: Path) -> None:
    taught = Distil(teacher=f"{project}/big.py:build")
    before = identity(taught)
    assert before != identity(Distil())
    (project / "copy.py").write_text(FACTORY)
    assert identity(Distil(teacher=f"{project}/copy.py:build")) == before
    (project / "helpers.py").write_text("def bend(x):\n    return x.sigmoid()\n")
    changed = identity(taught)
    assert changed != before
    (project / "big.py").write_text(FACTORY.replace("manual_seed(0)", "manual_seed(1)"))
    assert identity(taught) not in (before, changed)
    with pytest.raises(UsageError, match="no such file"):
        identity(Distil(teacher=f"{project}/none.py:build"))


@pytest.mark.parametrize("spec", ["losses:mine", "losses.py:mine"])
def test_a_loss_of_the_users_own_counts_and_is_looked_for_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(project)

    def with_loss(loss: str) -> Step:
        return replace(Distil(), teaching=replace(Distil().teaching, loss=loss))

    before = identity(with_loss(spec))
    (project / "losses.py").write_text("def mine(outputs, labels):\n    return outputs.mean()\n")
    assert identity(with_loss(spec)) != before
    with pytest.raises(UsageError, match="did you mean 'cross-entropy'"):
        identity(with_loss("cross-entrpy"))


def test_smoothing_that_no_loss_takes_is_told_at_once() -> None:
    smooth = Teaching(loss="mse", label_smoothing=0.1)
    with pytest.raises(UsageError, match="goes with cross-entropy"):
        identity(Prune(teaching=smooth))
    with pytest.raises(UsageError, match="goes with cross-entropy, and the loss is 'distillation'"):
        identity(Distil(teaching=replace(smooth, loss="distillation")))
    # What the teacher writes is learned with cross-entropy.
    identity(Distil(sequence_level=True, teaching=replace(smooth, loss="distillation")))


def test_where_the_teachers_outputs_are_kept_makes_no_difference(tmp_path: Path) -> None:
    kept = replace(Distil(), teaching=replace(Distil().teaching, teacher_cache=tmp_path))
    assert identity(kept) == identity(Distil())


def test_the_target_counts_where_its_file_is_measured_or_trained_for() -> None:
    other = {"target": "android-onnx-int8-dynamic"}
    assert identity(Prune()) == identity(Prune(), **other)
    for step in (Qat(), Prune(to=Goal("size", 0.5, is_share=True))):
        assert identity(step) != identity(step, **other)
