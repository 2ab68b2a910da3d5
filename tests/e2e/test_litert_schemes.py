"""Every scheme and rule beyond plain int8 through the LiteRT exporter and runtime, for real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.litert import LiteRTExporter
from edgeopt.formats.litert import layer_of, summarize
from edgeopt.runtimes.litert import LiteRTRuntime
from edgeopt.types import Artifact, EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

EXPORTER, RUNTIME = LiteRTExporter(), LiteRTRuntime()
STATIC = Scheme("w8a8", "static")
SHAPE = (1, 3, 16, 16)


class Net(nn.Module):
    """Convolutions, then one transformer layer over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 64, 3, 4, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.act, self.norm = nn.Hardswish(), nn.LayerNorm(64)
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.depthwise(F.relu(self.stem(x)))).flatten(2).transpose(1, 2)
        y = self.norm(x)
        weights = (self.q(y) @ self.k(y).transpose(1, 2) / 8).softmax(-1)
        return self.head((x + self.out(weights @ self.v(y))).mean(1))


def _samples(count: int = 8, seed: int = 0) -> Iterator[Sample]:
    for i in range(count):
        values = np.random.default_rng((seed, i)).standard_normal(SHAPE).astype(np.float32)
        yield Sample({"x": values}, None, f"sample {i}")


def _no_samples() -> Iterator[Sample]:
    raise AssertionError("a sample was run again")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    torch.manual_seed(0)
    inputs, outputs = (TensorSpec("x", SHAPE, "float32", "NCHW"),), (TensorSpec("y", (1, 10), "float32"),)
    example = next(_samples()).inputs
    model = Model("small", Net().eval(), None, inputs, outputs, example, None, (), (), "0" * 64)
    return model, EXPORTER.export_float(model, tmp_path_factory.mktemp("net"))


def _run(known: dict[str, Range] | None = None, *, again: bool = False) -> CalibrationRun:
    samples = _no_samples if again else _samples
    return CalibrationRun(samples, 8, EstimatorSpec(), lambda _: None, {} if known is None else known)


def _quantize(
    net: tuple[Model, Artifact],
    directory: Path,
    scheme: Scheme,
    rules: LayerRules | None = None,
    run: CalibrationRun | None = None,
) -> Artifact:
    rules = rules or LayerRules()
    run = (run or _run()) if scheme.needs_calibration else None
    assert EXPORTER.unsupported(scheme, rules) is None
    return EXPORTER.export_quantized(*net, QuantizationRequest(scheme, run, rules), directory)


def _sqnr(net: tuple[Model, Artifact], artifact: Artifact) -> float:
    signal = noise = 0.0
    with (
        RUNTIME.open(net[1].path, net[1].signature) as a,
        RUNTIME.open(artifact.path, artifact.signature) as b,
    ):
        for sample in _samples(4, seed=1):
            want, got = a.run(sample.inputs)["y"], b.run(sample.inputs)["y"]
            signal += float(np.square(want).sum())
            noise += float(np.square(want - got).sum())
    return float(10 * np.log10(signal / max(noise, 1e-30)))


@pytest.mark.parametrize(
    ("scheme", "decibels"),
    [
        (STATIC, 30),
        (Scheme("w8a16", "static"), 40),
        (Scheme("w8", "none", weight_symmetric=False), 45),
        (Scheme("w8", "none", "per-tensor", weight_estimator="mse"), 35),
        (Scheme("w4", "none"), 15),
        (Scheme("w4", "none", weight_symmetric=False, weight_estimator="hqq"), 15),
        (Scheme("8da4w", "dynamic", weight_estimator="mse"), 15),
        (Scheme("8da4w", "dynamic", "per-group"), 15),
        (Scheme("8da4w", "dynamic", "per-group", group_size=64, weight_estimator="hqq"), 15),
        (Scheme("w8a8", "static", weight_estimator="mse", scale="power-of-two"), 25),
    ],
    ids=["w8a8", "w8a16", "w8-asym", "w8-mse", "w4", "w4-hqq", "8da4w-mse", "8da4w-g32", "8da4w-g64", "pow2"],
)
def test_every_scheme_runs_and_is_close(
    net: tuple[Model, Artifact], tmp_path: Path, scheme: Scheme, decibels: float
) -> None:
    artifact = _quantize(net, tmp_path, scheme)
    assert artifact.precision == scheme.precision
    assert artifact.size_bytes < net[1].size_bytes
    assert _sqnr(net, artifact) > decibels
    record = artifact.history[-1].config
    assert record["weight_estimator"] == scheme.weight_estimator


def test_convolutions_and_products_are_integer_and_the_rest_says_why_not(
    net: tuple[Model, Artifact], tmp_path: Path
) -> None:
    artifact = _quantize(net, tmp_path, STATIC)
    types = {
        layer_of(op.name): op.dtype
        for op in summarize(artifact.path).ops
        if op.type in ("CONV_2D", "DEPTHWISE_CONV_2D")
    }
    assert set(types.values()) == {"int8"}
    reasons = {op.type: op.reason for op in artifact.unquantized_ops}
    assert "normalizes or attends" in reasons["BATCH_MATMUL"]
    assert "FULLY_CONNECTED" not in reasons

    artifact = _quantize(net, tmp_path, Scheme("w4", "none"))
    assert [(op.type, op.reason) for op in artifact.unquantized_ops] == [
        ("DEPTHWISE_CONV_2D", "DEPTHWISE_CONV_2D has no per-channel 4-bit weights in LiteRT")
    ]

    artifact = _quantize(net, tmp_path, Scheme("8da4w", "dynamic", "per-group", group_size=128))
    reasons = {op.name: op.reason for op in artifact.unquantized_ops}
    assert reasons["head"] == "its 64 inputs don't divide into groups of 128"
    assert reasons["stem"] == "CONV_2D has no per-group 4-bit weights in LiteRT"


def test_16_bits_for_single_layers_of_an_8_bit_file(net: tuple[Model, Artifact], tmp_path: Path) -> None:
    for io in ("float", "int8"):
        scheme = replace(STATIC, io=io)
        artifact = _quantize(net, tmp_path, scheme, LayerRules(int16_activations=("stem", "depth*", "head")))
        types = {op.name: op.dtype for op in summarize(artifact.path).ops if op.type not in ("QUANTIZE", "DEQUANTIZE")}
        assert types["stem"] == types["depthwise"] == types["head"] == "int16"
        assert types["q"] == types["out"] == "int8"
        expected = {"float": "float32", "int8": "int8"}[io]
        assert [t.dtype for t in (*artifact.signature.inputs, *artifact.signature.outputs)] == [expected] * 2
        assert _sqnr(net, artifact) > 25


def test_a_second_conversion_runs_no_sample(net: tuple[Model, Artifact], tmp_path: Path) -> None:
    known: dict[str, Range] = {}
    first = _quantize(net, tmp_path, STATIC, LayerRules(("stem", "q")), _run(known))
    for rules in (LayerRules(), LayerRules(("head",)), LayerRules(("stem", "q"))):
        artifact = _quantize(net, tmp_path, STATIC, rules, _run(known, again=True))
    assert artifact.sha256 == first.sha256
    wide = LayerRules(int16_activations=("head",))
    second = _quantize(net, tmp_path, STATIC, wide, _run(known))
    assert _quantize(net, tmp_path, STATIC, wide, _run(known, again=True)).sha256 == second.sha256


def test_all_layers_kept_in_float(net: tuple[Model, Artifact], tmp_path: Path) -> None:
    """Regression: ai-edge-quantizer refused a model without any calibrated activation."""
    artifact = _quantize(net, tmp_path, STATIC, LayerRules(("*",)))
    assert {op.dtype for op in summarize(artifact.path).ops} == {"float32"}
    assert _sqnr(net, artifact) > 100


def test_ranges_from_training_win(net: tuple[Model, Artifact], tmp_path: Path) -> None:
    model = replace(net[0], input_ranges={"stem": (-2.0, 0.55), "depthwise": (0.0, 5.1)})
    artifact = _quantize((model, net[1]), tmp_path, STATIC)
    scales = {d["name"]: d["quantization"] for d in Interpreter(str(artifact.path)).get_tensor_details()}
    assert scales["x_quantized"] == (pytest.approx(0.01), 72)
    assert scales["stem"] == (pytest.approx(0.02), -128)


def test_all_scales_are_powers_of_two(net: tuple[Model, Artifact], tmp_path: Path) -> None:
    artifact = _quantize(net, tmp_path, replace(STATIC, scale="power-of-two"))
    for detail in Interpreter(str(artifact.path)).get_tensor_details():
        exponents = np.log2(detail["quantization_parameters"]["scales"])
        assert np.array_equal(exponents, np.rint(exponents)), detail["name"]
