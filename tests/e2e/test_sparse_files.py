"""Networks with zeros through the real exporters: sparse LiteRT files, counted zeros, packed files that run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.bundle.sparse_storage import compare, pack, unpack
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.litert import LiteRTExporter
from edgeopt.exporter.litert_sparse import write_sparse
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.formats import summarize
from edgeopt.formats.sparsity import zeros_of
from edgeopt.runtimes.litert import LiteRTRuntime
from edgeopt.tuning.sparse_file import with_sparse_kernels
from edgeopt.types import Artifact, LayerRules, Model, Scheme, StepRecord, TensorSpec

pytestmark = pytest.mark.e2e

RUNTIME = LiteRTRuntime()


class Excite(nn.Module):
    """Squeeze and excite with 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.act = nn.AdaptiveAvgPool2d(1), nn.ReLU()
        self.reduce, self.expand = nn.Conv2d(channels, 32, 1), nn.Conv2d(32, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.expand(self.act(self.reduce(self.pool(x)))))


class Network(nn.Module):
    """PyTorch's padding: one zero on each side, also where the stride is 2."""

    def __init__(self, excite: bool = False) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()
        self.expand, self.down = nn.Conv2d(32, 128, 1), nn.Conv2d(128, 128, 3, 2, 1, groups=128)
        self.excite: nn.Module = Excite(128) if excite else nn.Identity()
        self.mix, self.swish, self.project = nn.Conv2d(128, 128, 1), nn.Hardswish(), nn.Conv2d(128, 256, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.excite(self.act(self.down(self.act(self.expand(self.act(self.stem(x)))))))
        x = self.swish(self.project(x + self.mix(x)))
        return self.head(self.pool(x).flatten(1))


def _model(zeros: float, excite: bool = False) -> Model:
    torch.manual_seed(0)
    module = Network(excite).eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                layer.weight *= layer.weight.abs() > layer.weight.abs().flatten().quantile(zeros)
    shape = (1, 3, 64, 64)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    inputs, outputs = (TensorSpec("image", shape, "float32", "NCHW"),), (TensorSpec("logits", (1, 10), "float32"),)
    return Model("sparse", module, None, inputs, outputs, {"image": image}, None, (), (), "0" * 64)


def _share(model: Model) -> float:
    assert model.module is not None
    weights = [p for p in model.module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def _logits(path: Path, model: Model) -> np.ndarray:
    session = RUNTIME.open(path, summarize(path).signature)
    result = session.run_native({"image": model.example_inputs["image"].transpose(0, 2, 3, 1)})
    session.close()
    logits: np.ndarray = next(iter(result.values()))
    return logits


@pytest.fixture(scope="module")
def model() -> Model:
    return _model(0.85)


@pytest.fixture(scope="module")
def litert(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return LiteRTExporter().export_float(model, tmp_path_factory.mktemp("litert"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_converted_network_becomes_sparse(precision: str, model: Model, litert: Artifact, tmp_path: Path) -> None:
    source = litert.path
    if precision == "fp16":
        request = QuantizationRequest(Scheme("fp16", "none"), None, LayerRules())
        source = LiteRTExporter().export_quantized(model, litert, request, tmp_path).path
    layers = write_sparse(source, tmp_path / "sparse.tflite")
    assert [(layer.name, layer.refusal) for layer in layers] == [("expand", None), ("mix", None), ("project", None)]
    sparse = summarize(tmp_path / "sparse.tflite")
    assert sparse.size_bytes < 0.75 * source.stat().st_size
    assert sparse.signature == summarize(source).signature
    np.testing.assert_allclose(_logits(tmp_path / "sparse.tflite", model), _logits(source, model), atol=1e-4)


def test_squeeze_and_excite_by_convolutions_fits(tmp_path: Path) -> None:
    model = _model(0.85, excite=True)
    source = LiteRTExporter().export_float(model, tmp_path).path
    layers = write_sparse(source, tmp_path / "sparse.tflite")
    assert {layer.name: layer.refusal for layer in layers} == dict.fromkeys(
        ("expand", "excite.reduce", "excite.expand", "mix", "project")
    )
    np.testing.assert_allclose(_logits(tmp_path / "sparse.tflite", model), _logits(source, model), atol=1e-4)


def test_every_format_has_the_zeros_of_the_model(model: Model, litert: Artifact, tmp_path: Path) -> None:
    paths = [litert.path, OnnxExporter().export_float(model, tmp_path).path]
    paths.append(ExecuTorchExporter().export_float(model, tmp_path).path)
    assert [zeros_of(path).share for path in paths] == [pytest.approx(_share(model))] * 3
    write_sparse(litert.path, tmp_path / "sparse.tflite")
    assert zeros_of(tmp_path / "sparse.tflite").share == pytest.approx(_share(model))


def test_a_packed_file_runs_after_unpacking(model: Model, litert: Artifact, tmp_path: Path) -> None:
    packed = pack(litert.path, tmp_path / "model.tflite.packed")
    unpack(packed.path, tmp_path / "model.tflite")
    assert (tmp_path / "model.tflite").read_bytes() == litert.path.read_bytes()
    np.testing.assert_array_equal(_logits(tmp_path / "model.tflite", model), _logits(litert.path, model))
    sizes = compare(litert.path)
    assert sizes.packed_deflated < 1.01 * sizes.deflated < sizes.packed < sizes.plain


def test_a_sparsified_model_ships_sparse_where_the_runtime_has_kernels(
    model: Model, litert: Artifact, tmp_path: Path
) -> None:
    assert with_sparse_kernels(litert, tmp_path) == (litert, ())  # nobody asked for it
    asked = replace(litert, history=(*litert.history, StepRecord("sparsify")))
    shipped, told = with_sparse_kernels(asked, tmp_path)
    assert [finding.code for finding in told] == ["zeros", "sparse-kernels"]
    assert shipped.history[-1].step == "sparse-kernels"
    assert shipped.size_bytes == shipped.path.stat().st_size < litert.size_bytes
    np.testing.assert_allclose(_logits(shipped.path, model), _logits(litert.path, model), rtol=1e-3, atol=1e-4)
    dense, told = with_sparse_kernels(replace(asked, precision="w8a8"), tmp_path)
    assert dense.path == litert.path
    assert [finding.code for finding in told] == ["zeros", "no-sparse-kernels"]
