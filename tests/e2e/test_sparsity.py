"""Zeros of a sparse model, in the integers of the exported files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.fold_batch_norm import fold
from edgeopt.compression.sparsity.passes import Pattern, Sparsification
from edgeopt.compression.sparsity.pattern import is_two_of_four
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.progress import Silent
from edgeopt.types import Array, Artifact, EstimatorSpec, Format, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

STATIC = Scheme("w8a8", "static")
PICTURES = np.random.default_rng(0).normal(size=(8, 1, 3, 16, 16)).astype(np.float32)
#: Those that become sparse.
WEIGHTS = ("0.weight", "3.weight", "6.weight", "10.weight")


def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.normal_(part.bias)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    specs = (TensorSpec("x", (1, 3, 16, 16), "float32", "NCHW"),)
    outputs = (TensorSpec("y", (1, 10), "float32"),)
    return Model("net", net.eval(), None, specs, outputs, {"x": PICTURES[0]}, None, (), (), "0" * 64)


def samples() -> Iterator[Sample]:
    return (Sample({"x": picture}, None, str(index)) for index, picture in enumerate(PICTURES))


def exported(source: Model, format_: Format, directory: Path) -> Artifact:
    exporter = load_exporter(format_)
    # ExecuTorch quantizes the module and looks at no float file, which takes it ten seconds to write.
    twin = load_exporter("onnx" if format_ == "executorch" else format_).export_float(source, directory)
    run = CalibrationRun(samples, len(PICTURES), EstimatorSpec(), lambda _: None)
    return exporter.export_quantized(source, twin, QuantizationRequest(STATIC, run), directory)


def integers(weight: Array) -> Array:
    """Symmetric int8, one scale per output channel, batch normalization folded in before."""
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    return np.round(weight / (largest / 127)).astype(np.int8)


@pytest.mark.parametrize(
    ("format_", "pattern"),
    [("onnx", "unstructured"), ("onnx", "2:4"), ("litert", "unstructured"), ("litert", "2:4"), ("executorch", "2:4")],
)
def test_int8_files_hold_every_zero(format_: Format, pattern: Pattern, tmp_path: Path) -> None:
    inputs = PassInputs(STATIC, samples, len(PICTURES), 0, Silent(), EstimatorSpec(), LayerRules())
    sparse = run_pass(Sparsification(to=0.6, pattern=pattern), model(), inputs)
    content = exported(sparse, format_, tmp_path).path.read_bytes()
    folded, count = fold(sparse)
    assert count == 2
    assert sparse.module is not None
    assert folded.module is not None
    for name in WEIGHTS:
        zeros = sparse.module.get_parameter(name).detach().numpy() == 0
        stored = integers(folded.module.get_parameter(name).detach().numpy())
        assert bool((stored[zeros] == 0).all())
        if pattern == "2:4" and name != "0.weight":
            assert is_two_of_four(torch.from_numpy(stored), 1)
        # The three formats keep these very integers, convolutions in LiteRT and XNNPACK with their channels last.
        layouts = [stored] if format_ == "onnx" or stored.ndim == 2 else [np.moveaxis(stored, 1, -1)]
        assert any(np.ascontiguousarray(layout).tobytes() in content for layout in layouts), name
