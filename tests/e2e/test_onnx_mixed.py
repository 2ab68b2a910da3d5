"""A layer that stays float in an int8 ONNX file really computes in float in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.types import EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec
from edgeopt.validation.evaluate import evaluate

pytestmark = pytest.mark.e2e


class Uneven(nn.Module):
    """The middle layer's channels differ by orders of magnitude: one scale for its weights would ruin it."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3, padding=1), middle, nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            middle.weight *= 100 ** torch.linspace(-1, 1, 8).view(-1, 1, 1, 1)
            self.last.weight /= 100 ** torch.linspace(-1, 1, 8).view(1, -1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.middle(self.first(x).relu()))
        return y


@pytest.mark.parametrize(
    "middle", [lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)]
)
def test_onnx_runtime_does_not_quantize_what_stays_float(middle: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = [Sample({"x": torch.randn(1, 3, 12, 12).numpy()}, None, str(i)) for i in range(8)]

    def stream() -> Iterator[Sample]:
        return iter(samples)

    model = Model(
        name="uneven",
        module=Uneven(middle()).eval(),
        native=None,
        inputs=(TensorSpec("x", (1, 3, 12, 12), "float32"),),
        outputs=(TensorSpec("y", (1, 4, 12, 12), "float32"),),
        example_inputs={"x": np.zeros((1, 3, 12, 12), np.float32)},
        preprocessing=None,
        labels=(),
        history=(),
        source_sha256="0" * 64,
    )
    exporter, runtime = OnnxExporter(), OnnxRuntime()
    twin = exporter.export_float(model, tmp_path)
    run = CalibrationRun(stream, len(samples), EstimatorSpec("min-max"), lambda _: None)
    request = QuantizationRequest(Scheme("w8a8", "static"), run, LayerRules(keep_float=("middle", "last")))
    mixed = exporter.export_quantized(model, twin, request, tmp_path)
    with runtime.open(twin.path, twin.signature) as float_, runtime.open(mixed.path, mixed.signature) as quantized:
        sqnr_db = evaluate(float_, quantized, stream(), None).sqnr_db
    assert sqnr_db is not None
    assert sqnr_db > 30  # below 15 with one scale for the middle layer's weights
