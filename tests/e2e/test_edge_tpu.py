"""Small PyTorch models through the Edge TPU exporter and the reference kernels, for real."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.litert_edge_tpu import EdgeTpuExporter
from edgeopt.formats import summarize
from edgeopt.formats.edge_tpu_form import check_form
from edgeopt.runtimes.litert import LiteRTRuntime
from edgeopt.runtimes.litert_reference import LiteRTReference
from edgeopt.types import (
    Artifact,
    EdgeTpu,
    EstimatorSpec,
    LayerRules,
    Model,
    Sample,
    Scheme,
    TensorSpec,
)

pytestmark = pytest.mark.e2e

EXPORTER, REFERENCE = EdgeTpuExporter(), LiteRTReference()
NPU = EdgeTpu(8 << 20, "usb3")
IMAGE = TensorSpec("input", (1, 3, 32, 32), "float32", "NCHW")


class Residual(nn.Module):
    """Asymmetric padding, depthwise, residual, padded pooling, mean, linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3)
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.hidden, self.head = nn.Linear(16, 12, bias=False), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = x + self.point(F.relu6(self.depthwise(x)))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


class UNet(nn.Module):
    """Transposed convolutions with and without an activation, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(16, 2, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu6(self.down(x))
        x = F.relu6(self.up(F.relu(self.deep(skip))))
        return self.out(torch.cat([x, skip], 1))


class Keywords(nn.Module):
    """1-D convolutions over time, linear on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.depthwise = nn.Conv1d(10, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.point, self.head = nn.Conv1d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.point(F.relu(self.depthwise(F.relu(self.wide(x))))))
        return self.head(x.mean(2)).softmax(-1)


class Modern(nn.Module):
    """What the compiler has never heard of: grouped convolution and GELU; a pooling of negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.grouped(F.max_pool2d(self.stem(x), 3, 2, 1)))
        return self.head(x.mean((2, 3)))


def _model(module: nn.Module, spec: TensorSpec, output: TensorSpec) -> Model:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    example = next(_samples(spec, 1)).inputs
    return Model("small", module.eval(), None, (spec,), (output,), example, None, (), (), "0" * 64)


def _samples(spec: TensorSpec, count: int, seed: int = 0) -> Iterator[Sample]:
    for i in range(count):
        values = np.random.default_rng((seed, i)).standard_normal([int(str(d)) for d in spec.shape])
        yield Sample({"input": values.astype(np.float32)}, None, f"sample {i}")


def _export(
    model: Model, directory: Path, rules: LayerRules | None = None, io: str = "int8"
) -> tuple[Artifact, Artifact]:
    run = CalibrationRun(lambda: _samples(model.inputs[0], 8), 8, EstimatorSpec(), lambda _: None)
    scheme = Scheme("w8a8", "static", io="int8" if io == "int8" else "float", npu=NPU)
    float_file = EXPORTER.export_float(model, directory)
    return float_file, EXPORTER.export_quantized(
        model, float_file, QuantizationRequest(scheme, run, rules or LayerRules()), directory
    )


def _kinds(artifact: Artifact) -> Counter[str]:
    return Counter(op.type for op in summarize(artifact.path).ops)


def _sqnr(model: Model, float_file: Artifact, artifact: Artifact) -> float:
    """Of the file on the reference kernels, in dB, against its float twin."""
    name = model.outputs[0].name
    signal = noise = 0.0
    with (
        LiteRTRuntime().open(float_file.path, float_file.signature) as exact,
        REFERENCE.open(artifact.path, artifact.signature) as session,
    ):
        for sample in _samples(model.inputs[0], 4, seed=1):
            want, got = exact.run(sample.inputs)[name], session.run(sample.inputs)[name]
            signal, noise = signal + float(np.square(want).sum()), noise + float(np.square(want - got).sum())
    return 10 * np.log10(signal / noise)


def test_a_residual_network_is_int8_throughout(tmp_path: Path) -> None:
    model = _model(Residual(), IMAGE, TensorSpec("logits", (1, 10), "float32"))
    float_file, artifact = _export(model, tmp_path)
    assert check_form(artifact.path) == ()
    kinds = _kinds(artifact)
    assert not {"PADV2", "FULLY_CONNECTED", "QUANTIZE", "DEQUANTIZE"} & kinds.keys()
    assert kinds["MAX_POOL_2D"] == 1
    assert artifact.unquantized_ops == ()
    (image,), (logits,) = artifact.signature.inputs, artifact.signature.outputs
    assert (image.dtype, image.shape, logits.dtype) == ("int8", (1, 32, 32, 3), "int8")
    assert artifact.history[-1].step == "edge-tpu-form"
    assert dict(artifact.history[-1].config) == {
        "pool paddings": 1,
        "products as convolutions": 2,
        "means of full rank": 1,
        "reshapes merged": 2,
        "operators without readers": 2,
        "identities": 2,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.tflite", "model_fp32.tflite"]
    assert _sqnr(model, float_file, artifact) > 25


def test_a_unet_keeps_its_transposed_convolutions_on_the_accelerator(tmp_path: Path) -> None:
    model = _model(UNet(), IMAGE, TensorSpec("mask", (1, 2, 32, 32), "float32", "NCHW"))
    float_file, artifact = _export(model, tmp_path)
    assert check_form(artifact.path) == ()
    assert _kinds(artifact).keys() <= {"PAD", "CONV_2D", "TRANSPOSE_CONV", "CONCATENATION", "RELU6"}
    assert _sqnr(model, float_file, artifact) > 20


def test_a_keyword_network_of_one_dimension(tmp_path: Path) -> None:
    spec = TensorSpec("input", (1, 10, 40), "float32")
    model = _model(Keywords(), spec, TensorSpec("scores", (1, 4), "float32"))
    float_file, artifact = _export(model, tmp_path)
    assert check_form(artifact.path) == ()
    assert artifact.unquantized_ops == ()
    assert "TRANSPOSE" not in _kinds(artifact)
    assert _sqnr(model, float_file, artifact) > 20


def test_operators_that_the_compiler_has_never_heard_of(tmp_path: Path) -> None:
    model = _model(Modern(), IMAGE, TensorSpec("logits", (1, 5), "float32"))
    float_file, artifact = _export(model, tmp_path)
    assert check_form(artifact.path) == ()
    kinds = _kinds(artifact)
    assert "GELU" not in kinds
    assert (kinds["SPLIT"], kinds["MAX_POOL_2D"], kinds["PADV2"]) == (1, 2, 0)
    assert {op.reason for op in artifact.unquantized_ops} == {
        "stands for GELU, which the Edge TPU compiler doesn't know"
    }
    assert _sqnr(model, float_file, artifact) > 20


def test_float_borders_and_float_layers_are_the_cpus(tmp_path: Path) -> None:
    model = _model(Residual(), IMAGE, TensorSpec("logits", (1, 10), "float32"))
    _, artifact = _export(model, tmp_path, LayerRules(keep_float=("head",), int16_activations=("point",)), io="float")
    assert check_form(artifact.path) == ()
    assert artifact.signature.inputs[0].dtype == "float32"
    assert [(op.name, op.type) for op in artifact.unquantized_ops] == [("head", "FULLY_CONNECTED")]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = _model(Keywords(), TensorSpec("input", (1, 10, 40), "float32"), TensorSpec("scores", (1, 4), "float32"))
    hashes = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        hashes.add(_export(model, tmp_path / name)[1].sha256)
    assert len(hashes) == 1
