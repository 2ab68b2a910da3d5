"""Pruning to a latency: layers timed in banks, files exported and measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.cost import LayerShape, macs_of
from edgeopt.compression.steps import Goal, Prune
from edgeopt.device_profiles import load_device
from edgeopt.plan import Job
from edgeopt.progress import Silent
from edgeopt.targets import load_target
from edgeopt.tuning.context import StepContext
from edgeopt.tuning.layer_bank import Bench, time_layers
from edgeopt.tuning.prune import prune
from edgeopt.tuning.pruning_costs import exported
from edgeopt.tuning.timing import time_together
from edgeopt.types import Format, LayerRules, Model, Sample, Scheme, TensorSpec
from edgeopt.workbench import Workbench

pytestmark = pytest.mark.e2e


class Noise:
    """Unlabelled pictures."""

    is_labelled = False
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        picture = np.random.default_rng(index).normal(size=(1, 3, 32, 32)).astype(np.float32)
        return Sample({"x": picture}, None, str(index))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        return "noise"


def network() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 32, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    spec = TensorSpec("x", (1, 3, 32, 32), "float32", layout="NCHW")
    example = {"x": Noise()[0].inputs["x"]}
    return Model("net", module, None, (spec,), (TensorSpec("y", (1, 10), "float32"),), example, None, (), (), "0")


def test_a_latency_goal_is_met_by_the_exported_file(tmp_path: Path) -> None:
    model = network()
    target = load_target("android-int8")
    job = Job(target, load_device(target.device), target.scheme, target.estimator, target.gates)
    (tmp_path / "files").mkdir()
    bench = Workbench(model, Noise(), LayerRules(), 0, tmp_path / "files", Silent())
    inputs = bench.pass_inputs(job.scheme, job.estimator)
    state = tmp_path / "cache" / "step"
    state.mkdir(parents=True)
    context = StepContext(job, model, None, None, inputs, bench.variant, state, 1)
    settings = Prune(to=Goal("latency", 0.7, is_share=True), importance="l2", multiple=16, max_ratio=0.75)

    pruned = prune(model, settings, context)

    files = [exported(context.bench(made), context) for made in (model, pruned)]
    sample = Sample(model.example_inputs, None, "example")
    # Measured anew, on a machine that may be busy.
    assert time_together(files, "litert", sample, 1, 2.0)[1].ratio < 0.85
    record = pruned.history[-1]
    assert record.step == "prune"
    assert record.config["to"] == "latency 0.7x"
    assert macs_of(pruned) < 0.8 * macs_of(model)
    widths = [layer.out_channels for layer in pruned.module.modules() if isinstance(layer, nn.Conv2d)]  # type: ignore[union-attr]
    assert all(width % 16 == 0 for width in widths)
    # The table stays for the next step.
    (table,) = (tmp_path / "cache" / "layer-times").iterdir()
    assert table.stat().st_size > 0


@pytest.mark.parametrize(("format_", "runtime"), [("litert", "litert"), ("onnx", "onnxruntime")])
def test_layers_in_one_file_are_told_apart(format_: Format, runtime: str) -> None:
    def convolution(inputs: int, outputs: int, groups: int = 1) -> LayerShape:
        macs = inputs // groups * outputs * 9 * 32 * 32
        return LayerShape(
            "convolution", inputs, outputs, (3, 3), (1, 1), (1, 1), (1, 1), groups, (32, 32), True, macs
        )  # fmt: skip

    linear = LayerShape("linear", 16, 16, (), (), (), (), 1, (1,), True, 256)
    shapes = [convolution(8, 8), convolution(96, 96), linear, convolution(48, 48), convolution(16, 16, 16)]
    times = time_layers(shapes, Bench(format_, Scheme("w8a8", "static"), runtime, 1))
    assert np.argsort(times)[::-1].tolist()[:2] == [1, 3]
    assert times[2] == min(times)
