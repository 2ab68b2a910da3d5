"""Attention without a mask, which onnxsim would merge into operators that no layer owns and int8 does not reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.types import Artifact, EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

LAYERS = ("query", "key", "value", "out")


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in LAYERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        attended: torch.Tensor = functional.scaled_dot_product_attention(*parts)
        return self.out(attended.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Exported:
    model: Model
    float: Artifact
    folder: Path

    def quantized(self, scheme: Scheme, *keep_float: str) -> Artifact:
        run = CalibrationRun(samples, 8, EstimatorSpec(), lambda _: None) if scheme.needs_calibration else None
        request = QuantizationRequest(scheme, run, LayerRules(keep_float))
        return OnnxExporter().export_quantized(self.model, self.float, request, self.folder)


def samples() -> Iterator[Sample]:
    for i in range(8):
        yield Sample({"x": np.random.default_rng(i).standard_normal((1, 12, 32), dtype=np.float32)}, None, str(i))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    x, y = TensorSpec("x", (1, 12, 32), "float32"), TensorSpec("y", (1, 12, 32), "float32")
    example = next(samples()).inputs
    model = Model("net", Attention().eval(), None, (x,), (y,), dict(example), None, (), (), "0" * 64)
    folder = tmp_path_factory.mktemp("attention")
    return Exported(model, OnnxExporter().export_float(model, folder), folder)


def run(artifact: Artifact) -> np.ndarray:
    session = ort.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, next(samples()).inputs)[0]
    return result


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(reference - other).sum()))


def test_every_product_belongs_to_its_layer(exported: Exported) -> None:
    nodes = onnx.load(str(exported.float.path)).graph.node
    assert {n.domain for n in nodes} == {""}
    assert {f"{layer}/MatMul" for layer in LAYERS} <= {n.name for n in nodes}


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_projections_are_int8_and_can_be_kept_float_one_by_one(exported: Exported, activations: str) -> None:
    scheme = Scheme("w8a8", "static" if activations == "static" else "dynamic")
    whole = exported.quantized(scheme)
    assert sqnr(run(exported.float), run(whole)) > 30
    assert not {op.name.partition("/")[0] for op in whole.unquantized_ops if op.type == "MatMul"} & set(LAYERS)
    spared = exported.quantized(scheme, "key")
    kept = [op.name for op in spared.unquantized_ops if "keep-float" in op.reason and op.type == "MatMul"]
    assert kept == ["key/MatMul"]
