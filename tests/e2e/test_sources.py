"""Every kind of source goes through real converters, and the files compute what the loaded model computes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeopt.exporter import load_exporter
from edgeopt.runtimes import load_runtime
from edgeopt.sources import SourceOptions, as_torch, load_model
from edgeopt.types import Format, Model

pytestmark = pytest.mark.e2e

RUNTIMES: dict[Format, str] = {"litert": "litert", "onnx": "onnxruntime", "executorch": "executorch"}

FACTORY = """
import torch
from torch import nn
from edgeopt.sources import ModelSpec

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.head = nn.Linear(8, 5)

    def forward(self, image, scale=None, offset=None):
        features = self.stem(image)
        features = features * self.gate(features) + offset.reshape(1, 8, 1, 1)
        features = nn.functional.interpolate(nn.functional.max_pool2d(features, 3, 2, 1), scale_factor=2)
        return {"logits": self.head(features.mean((2, 3))), "maps": features}

def make():
    return ModelSpec(Net(), {"image": torch.randn(1, 3, 16, 16), "offset": torch.randn(8)})
"""


def factory(folder: Path) -> str:
    (folder / "net.py").write_text(FACTORY)
    return f"{folder / 'net.py'}:make"


def exported_program(folder: Path) -> str:
    model = load_model(factory(folder), SourceOptions())
    assert model.module is not None
    program = torch.export.export(model.module, tuple(torch.from_numpy(a) for a in model.example_inputs.values()))
    torch.export.save(program, folder / "net.pt2")
    return str(folder / "net.pt2")


def encoder(folder: Path) -> str:
    transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "bert")
    return f"hf:{folder / 'bert'}"


def onnx(folder: Path) -> str:
    return as_onnx(factory(folder), folder)


def onnx_encoder(folder: Path) -> str:
    return as_onnx(encoder(folder), folder)


def as_onnx(source: str, folder: Path) -> str:
    return str(load_exporter("onnx").export_float(load_model(source, SourceOptions()), folder).path)


@pytest.mark.parametrize("format_", ["litert", "onnx", "executorch"])
@pytest.mark.parametrize("source", [factory, exported_program, onnx, onnx_encoder, encoder])
def test_a_source_converts(source: Callable[[Path], str], format_: Format, tmp_path: Path) -> None:
    model: Model = as_torch(load_model(source(tmp_path), SourceOptions()))
    assert model.module is not None
    with torch.no_grad():
        result = model.module(*(torch.from_numpy(np.array(model.example_inputs[s.name])) for s in model.inputs))
    expected = [result] if isinstance(result, torch.Tensor) else list(result)
    folder = tmp_path / "out"
    folder.mkdir()
    artifact = load_exporter(format_).export_float(model, folder)
    with load_runtime(RUNTIMES[format_]).open(artifact.path, artifact.signature) as session:
        found = session.run(model.example_inputs)
    for spec, tensor in zip(model.outputs, expected, strict=True):
        np.testing.assert_allclose(found[spec.name], tensor.numpy(), rtol=1e-3, atol=1e-4)
