"""Factorized networks as exported files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs, forward, run_pass
from edgeopt.compression.low_rank.low_rank import LowRank
from edgeopt.compression.steps import Goal
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.progress import Silent
from edgeopt.runtimes import load_runtime
from edgeopt.types import Array, EstimatorSpec, Format, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

SHAPE = (1, 3, 24, 24)
STATIC = Scheme("w8a8", "static")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 48, 1),
            nn.ReLU6(),
        )
        self.head = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x).mean((2, 3)))
        return result


def picture(seed: int) -> Array:
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((1, 3, 6, 6)).repeat(4, 2).repeat(4, 3)
    return (coarse + 0.3 * random.standard_normal(SHAPE)).astype(np.float32)


def samples() -> Iterator[Sample]:
    for seed in range(16):
        yield Sample({"x": picture(seed)}, None, str(seed))


def factorized() -> Model:
    torch.manual_seed(0)
    network = Net().eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    spec, output = TensorSpec("x", SHAPE, "float32", "NCHW"), TensorSpec("y", (1, 10), "float32")
    model = Model("net", network, None, (spec,), (output,), {"x": picture(0)}, None, (), (), "")
    inputs = PassInputs(STATIC, samples, 16, 0, Silent(), EstimatorSpec(), LayerRules())
    return run_pass(LowRank(Goal("macs", 0.6, is_share=True)), model, inputs)


@pytest.mark.parametrize(("format_", "runtime"), [("litert", "litert"), ("onnx", "onnxruntime")])
def test_int8_file_agrees_with_torch(format_: Format, runtime: str, tmp_path: Path) -> None:
    model = factorized()
    assert model.history[-1].config["layers"]
    exporter = load_exporter(format_)
    artifact = exporter.export_float(model, tmp_path)
    calibration = CalibrationRun(samples, 16, EstimatorSpec(), lambda _: None)
    quantized = exporter.export_quantized(model, artifact, QuantizationRequest(STATIC, calibration), tmp_path)
    signal = np.concatenate([forward(model, {"x": picture(seed)})[0].numpy() for seed in range(50, 58)])
    for file, least in ((artifact, 80.0), (quantized, 22.0)):
        with load_runtime(runtime).open(file.path, file.signature) as session:
            found = np.concatenate([next(iter(session.run({"x": picture(seed)}).values())) for seed in range(50, 58)])
        assert 10 * np.log10((signal**2).sum() / ((signal - found) ** 2).sum()) > least
