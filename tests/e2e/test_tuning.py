"""Sensitivity and mixed precision on real files of a small network with one layer that suffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeopt.config import config_of
from edgeopt.datasets import open_dataset
from edgeopt.plan import plan_jobs
from edgeopt.progress import Silent
from edgeopt.sources import ModelSpec, SourceOptions, load_model
from edgeopt.tuning.analysis import sensitivity_of, terms_of
from edgeopt.tuning.assignment import search
from edgeopt.tuning.budget import Budget
from edgeopt.tuning.layers import find_layers
from edgeopt.tuning.sensitivity import analyse
from edgeopt.tuning.trial import Trials
from edgeopt.types import LayerRules, TensorSpec
from edgeopt.workbench import Workbench

pytestmark = pytest.mark.e2e

TARGETS = ("android-onnx-int8", "android-int8")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(),
        )  # fmt: skip
        self.head = torch.nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).mean(dim=(2, 3)))


def build() -> ModelSpec:
    """The outputs of `features.2` differ in size by a factor of 300, and the next layer evens that out."""
    torch.manual_seed(0)
    net = Net()
    scale = torch.logspace(-1.25, 1.25, 16)
    with torch.no_grad():
        net.features[2].weight *= scale[:, None, None, None]
        net.features[2].bias *= scale
        net.features[4].weight /= scale[None, :, None, None]
    return ModelSpec(net, inputs=(TensorSpec("image", (1, 3, 16, 16), "float32"),), name="fragile")


def data() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"image": random.normal(size=(3, 16, 16)).astype("float32")} for _ in range(48)]


def _config(target: str) -> dict[str, object]:
    return {
        "model": f"{__file__}:build",
        "calibration": f"{__file__}:data",
        "target": [target],
        "num_calibration_samples": "16",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_layers_around_the_uneven_tensor_are_the_sensitive_ones(target: str, tmp_path: Path) -> None:
    found = sensitivity_of(config_of(_config(target)), tmp_path / "state", Silent())
    assert sorted(entry.layer for entry in found.layers) == ["features.0", "features.2", "features.4", "head"]
    assert {entry.layer for entry in found.layers[:2]} == {"features.2", "features.4"}
    assert sum(entry.share for entry in found.layers[:2]) > 0.8
    # Noise powers add up, so the whole file's is not far from the sum.
    assert 0.2 < sum(entry.noise for entry in found.layers) / found.plain.noise < 5
    assert all(entry.int8_bytes and entry.int8_bytes < entry.float_bytes for entry in found.layers)


def test_finished_trials_are_not_done_again(tmp_path: Path) -> None:
    config = config_of(_config("android-onnx-int8"))
    first = sensitivity_of(config, tmp_path, Silent())
    second = sensitivity_of(config, tmp_path, Silent())
    assert first.trials > 0
    assert second.trials == 0
    assert [(e.layer, e.noise) for e in second.layers] == [(e.layer, e.noise) for e in first.layers]


def test_mixed_precision_beats_the_naive_choices_on_a_real_file(tmp_path: Path) -> None:
    config = config_of(_config("android-onnx-int8"))
    job = plan_jobs(config)[0]
    model = load_model(f"{__file__}:build", SourceOptions())
    samples = open_dataset(f"{__file__}:data", model.inputs, None)
    (tmp_path / "files").mkdir()
    workbench = Workbench(model, samples, LayerRules(), 0, tmp_path / "files", Silent())
    terms = terms_of(job, workbench, samples, None, 1, tmp_path, None, Silent())
    trials = Trials(workbench, job.estimator, terms)
    layers = find_layers(workbench, trials.plain(), trials.rules)
    sensitivity = analyse(trials, layers, Silent())
    plain, whole = trials.plain().size_bytes, workbench.float_artifact("onnx").size_bytes
    budget = Budget(max_size_bytes=plain + (whole - plain) * 2 // 3)  # one of the two large layers fits
    found = search(trials, layers, sensitivity, budget, trials.plain(), Silent())
    assert found.met
    assert trials.artifact(found.chosen.rules).size_bytes == found.chosen.cost.size_bytes <= budget.max_size_bytes
    assert {"features.2", "features.4"} & set(found.chosen.float_layers)
    naive = [point for point in found.points if "layer" in point.origin and budget.fits(point.cost.size_bytes)]
    assert len(naive) == 3
    assert found.chosen.score.noise < min(point.score.noise for point in naive)
