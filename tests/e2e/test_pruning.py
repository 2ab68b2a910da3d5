"""Pruned networks as files: what each runtime computes is what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.structured import StructuredPruning
from edgeopt.datasets import open_dataset
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.progress import Silent
from edgeopt.runtimes import load_runtime
from edgeopt.sources.structure import PrunedMultiheadAttention
from edgeopt.types import Array, Artifact, EstimatorSpec, Format, LayerRules, Model, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

RUNTIMES = {"onnx": "onnxruntime", "litert": "litert", "executorch": "executorch"}
STATIC = Scheme("w8a8", "static")
PICTURE, TOKENS = (1, 3, 32, 32), (1, 8, 32)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(gate)


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 48, 3, 1, 1, groups=48, bias=False), nn.BatchNorm2d(48), nn.ReLU(), SqueezeExcite(48),
            nn.Conv2d(48, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Inverted(), Inverted(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.out = 4, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        result: Tensor = self.out(mixed.reshape(*mixed.shape[:2], -1))
        return result


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.attention = nn.LayerNorm(32), nn.LayerNorm(32), Attention()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        return result


def transformer() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), Layer(), Layer(), nn.Linear(32, 10))


class TorchEncoder(nn.Module):
    """Torch's own attention, which is another layer once heads of it are gone."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 10)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        result: Tensor = self.last(self.encoder(self.first(x), mask=mask, is_causal=True))
        return result


def pruned(network: nn.Module, shape: tuple[int, ...], outputs: tuple[int, ...]) -> Model:
    """A third of everything and one block less, in one recorded step."""
    torch.manual_seed(0)
    layout = "NCHW" if len(shape) == 4 else None
    example = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model = Model(
        "net", network.eval(), None, (TensorSpec("x", shape, "float32", layout),),
        (TensorSpec("y", outputs, "float32"),), {"x": example}, None, (), (), "0" * 64,
    )  # fmt: skip
    prunable = analyse(model, ("channels", "heads", "blocks"), ())
    plan = {group.name: tuple(range(group.units // 3)) for group in prunable.groups if group.units >= 3}
    last = [group for group in prunable.groups if group.kind == "blocks"][-1]
    inputs = PassInputs(STATIC, None, 0, 0, Silent(), EstimatorSpec(), LayerRules())
    smaller = run_pass(StructuredPruning(prunable, {**plan, last.name: (0,)}), model, inputs)
    assert smaller.module is not None
    assert sum(p.numel() for p in smaller.module.parameters()) < 0.6 * sum(p.numel() for p in network.parameters())
    return smaller


def outputs_of(model: Model, artifact: Artifact, tests: list[Array]) -> tuple[Array, Array]:
    """What torch computes, and what the file does."""
    assert model.module is not None
    with torch.no_grad():
        wanted = np.concatenate([model.module(torch.from_numpy(x)).numpy() for x in tests])
    with load_runtime(RUNTIMES[artifact.format]).open(artifact.path, artifact.signature) as session:
        return wanted, np.concatenate([session.run({"x": x})["y"] for x in tests])


def sqnr(signal: Array, other: Array) -> float:
    return float(10 * np.log10((signal**2).sum() / ((signal - other) ** 2).sum()))


@pytest.mark.parametrize("format_", ["onnx", "litert", "executorch"])
@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_pruned_networks_export_quantized(kind: str, format_: Format, tmp_path: Path) -> None:
    is_transformer = kind == "transformer"
    shape = TOKENS if is_transformer else PICTURE
    outputs = (1, 8, 10) if is_transformer else (1, 10)
    model = pruned(transformer() if is_transformer else mobile(), shape, outputs)
    rng = np.random.default_rng(1)
    data = open_dataset([rng.normal(size=shape[1:]).astype(np.float32) for _ in range(16)], model.inputs, None)
    exporter = load_exporter(format_)
    run = CalibrationRun(lambda: iter(data), len(data), EstimatorSpec(), lambda _: None)
    # ExecuTorch quantizes the module and looks at no float file, which takes it long to write.
    twin = load_exporter("onnx" if format_ == "executorch" else format_).export_float(model, tmp_path)
    tests = [rng.normal(size=shape).astype(np.float32) for _ in range(8)]
    assert sqnr(*outputs_of(model, twin, tests)) > 90
    quantized = exporter.export_quantized(model, twin, QuantizationRequest(STATIC, run), tmp_path)
    assert [record.step for record in quantized.history][:1] == ["prune"]
    assert sqnr(*outputs_of(model, quantized, tests)) > 20


@pytest.mark.parametrize("format_", ["onnx", "litert"])
def test_torch_attention_without_some_heads_exports_with_dynamic_ranges(format_: Format, tmp_path: Path) -> None:
    model = pruned(TorchEncoder(), TOKENS, (1, 8, 10))
    assert model.module is not None
    (attention,) = [part for part in model.module.modules() if isinstance(part, PrunedMultiheadAttention)]
    assert attention.num_heads == 3
    exporter, rng = load_exporter(format_), np.random.default_rng(1)
    twin = exporter.export_float(model, tmp_path)
    tests = [rng.normal(size=TOKENS).astype(np.float32) for _ in range(8)]
    assert sqnr(*outputs_of(model, twin, tests)) > 90
    quantized = exporter.export_quantized(model, twin, QuantizationRequest(Scheme("w8a8", "dynamic"), None), tmp_path)
    assert sqnr(*outputs_of(model, quantized, tests)) > 30
