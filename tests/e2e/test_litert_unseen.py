"""Regression tests: constructs of unseen models that the static LiteRT quantizer failed on or misreported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.litert import LiteRTExporter
from edgeopt.formats.litert import layer_of, summarize
from edgeopt.runtimes.litert import LiteRTRuntime
from edgeopt.types import Artifact, EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e


class ClassToken(nn.Module):
    """A constant of the activation's rank is joined to it, as in ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 8) / 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.token, x], 1))


class PaddedMean(nn.Module):
    """Its pooling becomes a reduction with a body of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.avg_pool2d(self.stem(x), 3, 2, 1, count_include_pad=False))


class ClippedMean(nn.Module):
    """It pools globally with a window that is larger than any feature map, as EfficientNet of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.avg_pool2d(self.stem(x), 448, ceil_mode=True))


class TwoSwishes(nn.Module):
    """One hard-swish in the middle and one that is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Hardswish()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.head(self.middle(self.stem(3 * x))))


class Causal(nn.Module):
    """The mask is made in the outermost module, which has no path."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)


def _samples(shape: tuple[int, ...]) -> Iterator[Sample]:
    for i in range(8):
        yield Sample({"x": np.random.default_rng(i).standard_normal(shape).astype(np.float32)}, None, f"sample {i}")


def _export(
    module: nn.Module, shape: tuple[int, ...], out: tuple[int, ...], directory: Path, keep_float: tuple[str, ...] = ()
) -> tuple[Artifact, Artifact]:
    """Float file and static int8 file."""
    torch.manual_seed(0)
    inputs = (TensorSpec("x", shape, "float32", "NCHW" if len(shape) == 4 else None),)
    outputs = (TensorSpec("y", out, "float32", "NCHW" if len(out) == 4 else None),)
    example = next(_samples(shape)).inputs
    model = Model("small", module.eval(), None, inputs, outputs, example, None, (), (), "0" * 64)
    run = CalibrationRun(lambda: _samples(shape), 8, EstimatorSpec(), lambda _: None)
    exporter = LiteRTExporter()
    twin = exporter.export_float(model, directory)
    request = QuantizationRequest(Scheme("w8a8", "static"), run, LayerRules(keep_float))
    return twin, exporter.export_quantized(model, twin, request, directory)


def _sqnr(twin: Artifact, artifact: Artifact, shape: tuple[int, ...]) -> float:
    runtime, inputs = LiteRTRuntime(), next(_samples(shape)).inputs
    with runtime.open(twin.path, twin.signature) as a, runtime.open(artifact.path, artifact.signature) as b:
        want, got = a.run(inputs)["y"], b.run(inputs)["y"]
    return float(10 * np.log10(np.square(want).sum() / np.square(want - got).sum()))


def test_constants_that_share_an_activations_scale(tmp_path: Path) -> None:
    twin, artifact = _export(ClassToken(), (1, 6, 8), (1, 7, 4), tmp_path)
    assert artifact.unquantized_ops == ()
    assert _sqnr(twin, artifact, (1, 6, 8)) > 30


def test_bodies_of_reductions_stay_float_and_are_named(tmp_path: Path) -> None:
    twin, artifact = _export(PaddedMean(), (1, 3, 14, 14), (1, 4, 6, 6), tmp_path)
    reasons = {op.type: op.reason for op in artifact.unquantized_ops}
    assert "inside another operator" in reasons.values()
    assert _sqnr(twin, artifact, (1, 3, 14, 14)) > 30


def test_average_of_a_window_that_hangs_over_the_edge_keeps_its_precision(tmp_path: Path) -> None:
    twin, artifact = _export(ClippedMean(), (1, 3, 14, 14), (1, 4, 1, 1), tmp_path)
    assert artifact.unquantized_ops == ()
    assert _sqnr(twin, artifact, (1, 3, 14, 14)) > 25


def test_hard_swish_is_split_where_it_becomes_int8_only(tmp_path: Path) -> None:
    shape = (1, 3, 14, 14)
    twin, artifact = _export(TwoSwishes(), shape, (1, 4, 12, 12), tmp_path)
    assert [op.type for op in summarize(twin.path).ops].count("HARD_SWISH") == 2
    ops = summarize(artifact.path).ops
    assert [op.type for op in ops].count("HARD_SWISH") == 0
    assert {layer_of(op.name) for op in ops if op.type in ("ADD", "MUL")} >= {"middle", "last"}
    assert artifact.unquantized_ops == ()
    assert artifact.signature.outputs[0].name == "y"
    assert _sqnr(twin, artifact, shape) > 30

    _, partly = _export(TwoSwishes(), shape, (1, 4, 12, 12), tmp_path, keep_float=("middle",))
    kept = [(op.type, op.dtype) for op in summarize(partly.path).ops if layer_of(op.name) == "middle"]
    assert ("HARD_SWISH", "float32") in kept


def test_reason_for_attention_in_the_outermost_module(tmp_path: Path) -> None:
    twin, artifact = _export(Causal(), (1, 6, 8), (1, 6, 8), tmp_path)
    assert artifact.unquantized_ops
    assert all("masks" in op.reason or "normalizes or attends" in op.reason for op in artifact.unquantized_ops)
    assert _sqnr(twin, artifact, (1, 6, 8)) > 25
