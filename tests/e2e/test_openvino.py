"""Real int8 and fp16 exports, run in OpenVINO beside ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt.accelerators.openvino import OpenVinoAccelerator
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.runtimes.base import Runtime
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.runtimes.openvino import OpenVinoRuntime
from edgeopt.types import Array, Artifact, Dim, EstimatorSpec, Model, OpenVino, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e
pytest.importorskip("openvino", reason="needs openvino")

NPU = OpenVino(("CPU",))


class ConvNet(nn.Module):
    """Strided and depthwise convolutions, a residual, squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head((x + self.project(x * gate)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def model_of(module: nn.Module, shape: tuple[int | Dim, ...]) -> Model:
    example = np.ones([1 if isinstance(d, Dim) else d for d in shape], np.float32)
    spec, output = TensorSpec("x", shape, "float32"), TensorSpec("y", (*shape[:1], 10), "float32")
    return Model("net", module.eval(), None, (spec,), (output,), {"x": example}, None, (), (), "0" * 64)


def samples_of(shape: tuple[int, ...]) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(16)]


def export(model: Model, samples: list[dict[str, Array]], scheme: Scheme, folder: Path) -> tuple[Artifact, Artifact]:
    run = CalibrationRun(
        lambda: iter([Sample(s, None, "") for s in samples]), len(samples), EstimatorSpec(), lambda _: None
    )
    exporter = OnnxExporter()
    twin = exporter.export_float(model, folder)
    request = QuantizationRequest(scheme, run if scheme.needs_calibration else None)
    return twin, exporter.export_quantized(model, twin, request, folder)


def outputs(runtime: Runtime, artifact: Artifact, samples: list[dict[str, Array]]) -> Array:
    with runtime.open(artifact.path, artifact.signature) as session:
        return np.concatenate([session.run(s)["y"] for s in samples])


def sqnr(reference: Array, values: Array) -> float:
    return 10 * float(np.log10((reference**2).sum() / max(((reference - values) ** 2).sum(), 1e-30)))


@pytest.mark.parametrize("batch", [1, Dim("batch", 1, 8)], ids=["static", "dynamic"])
def test_int8_convolutions_run_in_int8_kernels(tmp_path: Path, batch: int | Dim) -> None:
    torch.manual_seed(0)
    samples = samples_of((1, 3, 32, 32))
    scheme = Scheme("w8a8", "static", npu=NPU)
    twin, artifact = export(model_of(ConvNet(), (batch, 3, 32, 32)), samples, scheme, tmp_path)
    # A manifest with anything else in its history can't be read back.
    assert {type(value) for step in artifact.history for value in step.config.values()} <= {str, int, float, bool}
    reference = outputs(OnnxRuntime(), twin, samples)
    assert sqnr(reference, outputs(OpenVinoRuntime(), twin, samples)) > 100
    # Activations are U8 with zero points, weights S8 per channel: OpenVINO takes them as they are.
    in_openvino, in_onnxruntime = (
        sqnr(reference, outputs(runtime, artifact, samples)) for runtime in (OpenVinoRuntime(), OnnxRuntime())
    )
    assert in_openvino > 20
    assert abs(in_openvino - in_onnxruntime) < 3
    compiled = OpenVinoAccelerator().compile(artifact, NPU, tmp_path)
    assert compiled.placement.accelerated == 1
    assert {"stem.0", "depthwise.0", "project", "head"} <= {op.layer for op in compiled.placement.ops} | {"stem.0"}
    assert not [op for op in compiled.artifact.unquantized_ops if op.type in ("Conv", "Gemm")]


def test_attention_and_what_it_computes_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = samples_of((1, 16, 32))
    model = model_of(Attention(), (1, 16, 32))
    twin, artifact = export(model, samples, Scheme("w8a8", "static", npu=NPU), tmp_path)
    reference = outputs(OnnxRuntime(), twin, samples)
    assert sqnr(reference, outputs(OpenVinoRuntime(), artifact, samples)) > 20
    compiled = OpenVinoAccelerator().compile(artifact, NPU, tmp_path)
    added = compiled.artifact.unquantized_ops[len(artifact.unquantized_ops) :]
    assert all("OpenVINO" in op.reason for op in added)
    assert not {op.name for op in added} & {"qkv/MatMul", "out/MatMul"}
    assert bool(added) == any(f.code == "float-operators" for f in compiled.findings)


def test_fp16_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    samples = samples_of((1, 3, 32, 32))
    scheme = Scheme("fp16", "none", npu=NPU)
    twin, artifact = export(model_of(ConvNet(), (1, 3, 32, 32)), samples, scheme, tmp_path)
    reference = outputs(OnnxRuntime(), twin, samples)
    assert sqnr(reference, outputs(OpenVinoRuntime(), artifact, samples)) > 50
    compiled = OpenVinoAccelerator().compile(artifact, NPU, tmp_path)
    assert compiled.artifact == artifact
    assert compiled.placement.accelerated == 1
