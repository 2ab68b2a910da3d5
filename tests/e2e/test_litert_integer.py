"""Networks with attention, normalization and curved activations as LiteRT files for NPUs that compute in integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeopt.accelerators import load_accelerator
from edgeopt.device_profiles import load_device
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.runtimes import load_runtime
from edgeopt.types import Array, Artifact, EstimatorSpec, Model, Placement, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

U55, U85 = (load_device(name).npus[0] for name in ("corstone-300", "corstone-320"))
CORAL = load_device("coral-usb").npu("edge-tpu")
INT8 = Scheme("w8a8", "static", io="int8")
INT16 = Scheme("w8a16", "static", activation_symmetric=True)


class Encoder(nn.Module):
    """A transformer block behind an embedding, with a padding mask."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table, self.norm, self.last = nn.Embedding(50, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        scores = q @ k.transpose(2, 3) / 4
        scores = scores.masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
        x = x + self.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y: torch.Tensor = self.last(x + self.down(F.gelu(self.up(x))))
        return y


class Curved(nn.Module):
    """Activations without a recipe in ai-edge-quantizer, or with comparisons; a group norm of channel-first planes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(5))
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.elu(self.convs[0](F.leaky_relu(x, 0.1)))
        x = F.leaky_relu(self.convs[1](x), 0.2)
        x = F.mish(self.convs[2](x))
        x = torch.minimum(self.norm(self.convs[3](x)), self.convs[4](x).abs())
        y: torch.Tensor = self.head(x.amax((2, 3)))
        return y


def converted(kind: type[nn.Module], scheme: Scheme, directory: Path) -> tuple[Artifact, Artifact]:
    torch.manual_seed(0)
    network = kind().eval()
    inputs: tuple[TensorSpec, ...]
    if isinstance(network, Encoder):
        inputs = tuple(TensorSpec(name, (1, 12), "int64") for name in ("tokens", "mask"))
        samples = tokens(6, padded=False)
    else:
        inputs = (TensorSpec("image", (1, 3, 8, 8), "float32", "NCHW"),)
        samples = images(6)
    example = samples[0].inputs
    with torch.no_grad():
        shape = tuple(network(*(torch.from_numpy(example[spec.name]) for spec in inputs)).shape)
    outputs = (TensorSpec("output", shape, "float32"),)
    model = Model("net", network, None, inputs, outputs, dict(example), None, (), (), "0" * 64)
    calibration = CalibrationRun(lambda: iter(samples), len(samples), EstimatorSpec(), lambda _: None)
    assert scheme.npu is not None
    exporter = load_exporter("litert", scheme.npu.kind)
    floating = exporter.export_float(model, directory)
    artifact = exporter.export_quantized(model, floating, QuantizationRequest(scheme, calibration), directory)
    return floating, artifact


def tokens(count: int, *, padded: bool) -> list[Sample]:
    random = np.random.default_rng(3 if padded else 2)
    lengths = random.integers(4, 9, count) if padded else np.full(count, 12)
    masks = [(np.arange(12) < length).astype(np.int64)[None] for length in lengths]
    return [Sample({"tokens": random.integers(0, 50, (1, 12)), "mask": m}, None, str(i)) for i, m in enumerate(masks)]


def images(count: int) -> list[Sample]:
    random = np.random.default_rng(1)
    made = (random.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(count))
    return [Sample({"image": values}, None, str(i)) for i, values in enumerate(made)]


def sqnr(floating: Artifact, artifact: Artifact, runtime: str, samples: list[Sample]) -> float:
    wanted, got = (
        np.concatenate([results(file, name, sample) for sample in samples])
        for file, name in ((floating, "litert"), (artifact, runtime))
    )
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()))


def results(artifact: Artifact, runtime: str, sample: Sample) -> Array:
    with load_runtime(runtime).open(artifact.path, artifact.signature) as session:
        output = session.run(sample.inputs)["output"]
    # What a padded position gets is never read.
    return (output[:, sample.inputs["mask"][0] == 1] if "mask" in sample.inputs else output).reshape(-1)


def placed(artifact: Artifact, scheme: Scheme, directory: Path) -> Placement:
    assert scheme.npu is not None
    placement = load_accelerator("litert", scheme.npu.kind).compile(artifact, scheme.npu, directory).placement
    assert placement is not None
    return placement


@pytest.mark.parametrize(("scheme", "decibels"), [(INT8, 28), (INT16, 35)], ids=["int8", "w8a16"])
def test_a_transformer_runs_on_the_ethos_u85_alone(scheme: Scheme, decibels: int, tmp_path: Path) -> None:
    scheme = replace(scheme, npu=U85)
    floating, artifact = converted(Encoder, scheme, tmp_path)
    assert [(op.type, op.reason) for op in placed(artifact, scheme, tmp_path).on_cpu] == []
    # None of the calibration samples was padded.
    assert sqnr(floating, artifact, "tosa", tokens(4, padded=True)) > decibels


def test_on_the_ethos_u55_only_the_table_and_the_mask_are_left_to_the_cpu(tmp_path: Path) -> None:
    scheme = replace(INT8, npu=U55)
    _, artifact = converted(Encoder, scheme, tmp_path)
    left = {op.type for op in placed(artifact, scheme, tmp_path).on_cpu}
    assert left <= {"GATHER", "CAST", "EQUAL", "NOT_EQUAL", "SELECT", "SELECT_V2", "LOGICAL_NOT", "BROADCAST_TO"}


def test_curved_activations_and_group_norms_run_on_every_ethos_u(tmp_path: Path) -> None:
    scheme = replace(INT8, npu=U55)
    floating, artifact = converted(Curved, scheme, tmp_path)
    assert artifact.unquantized_ops == ()
    placement = placed(artifact, scheme, tmp_path)
    assert [(op.type, op.reason) for op in placement.on_cpu] == []
    layers = {op.layer for op in placement.ops if op.layer is not None}
    assert {"convs.0", "convs.4", "norm", "head"} <= layers
    assert not [layer for layer in layers if "quant" in layer]
    assert sqnr(floating, artifact, "tosa", images(4)) > 22


def test_the_edge_tpu_gets_normalizations_in_integers(tmp_path: Path) -> None:
    scheme = replace(INT8, npu=CORAL)
    _, artifact = converted(Curved, scheme, tmp_path)
    # It has neither an exponential nor a logarithm.
    assert {op.type for op in artifact.unquantized_ops} <= {"EXP", "LOG"}
