"""Models through the Hexagon exporter, QNN's delegation report and its x86 emulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional

from edgeopt.accelerators.hexagon import HexagonAccelerator
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.onnx_hexagon import HexagonExporter
from edgeopt.formats.onnx import read_signature
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.runtimes.qnn_htp import QnnHtpRuntime
from edgeopt.types import Array, Artifact, EstimatorSpec, Hexagon, LayerRules, Model, Sample, Scheme, TensorSpec

MISSING = QnnHtpRuntime().unavailable()
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

PHONE, OLD_PHONE = Hexagon("v75", 57, 8), Hexagon("v68", 93, 2)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + functional.silu(self.depthwise(x))
        x = torch.cat((functional.max_pool2d(self.up(x), 2), x), 1)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.register_buffer("mask", torch.full((12, 12), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, 2)]
        attended = functional.scaled_dot_product_attention(*parts, attn_mask=self.mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class WithErf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Module()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.erf(self.linear(x)))


@dataclass(frozen=True)
class Exported:
    model: Model
    float: Artifact
    shape: tuple[int, ...]
    folder: Path

    def samples(self) -> Iterator[Sample]:
        for i in range(8):
            yield Sample({"x": np.random.default_rng(i).standard_normal(self.shape, dtype=np.float32)}, None, str(i))

    def quantized(self, scheme: Scheme, rules: LayerRules | None = None) -> Artifact:
        run = CalibrationRun(self.samples, 8, EstimatorSpec(), lambda _: None) if scheme.needs_calibration else None
        request = QuantizationRequest(scheme, run, rules or LayerRules())
        return HexagonExporter().export_quantized(self.model, self.float, request, self.folder)

    def sqnr(self, artifact: Artifact) -> tuple[float, float]:
        """Of the emulated outputs in dB: against the float file, and against the same file on the CPU."""
        htp, cpu = QnnHtpRuntime(), OnnxRuntime()
        with (
            htp.open(artifact.path, artifact.signature) as emulated,
            cpu.open(self.float.path, self.float.signature) as real,
            cpu.open(artifact.path, artifact.signature) as same,
        ):
            signal, noises = 0.0, [0.0, 0.0]
            for sample in self.samples():
                got = emulated.run(sample.inputs)["y"]
                for i, session in enumerate((real, same)):
                    wanted = session.run(sample.inputs)["y"]
                    noises[i] += float(np.square(wanted - got).sum())
                signal += float(np.square(wanted).sum())
        to_float, to_cpu = (float(10 * np.log10(signal / max(noise, 1e-30))) for noise in noises)
        return to_float, to_cpu


def export(module: nn.Module, shape: tuple[int, ...], folder: Path) -> Exported:
    torch.manual_seed(0)
    example: Mapping[str, Array] = {"x": np.zeros(shape, np.float32)}
    with torch.no_grad():
        result = tuple(module.eval()(torch.zeros(shape)).shape)
    x, y = TensorSpec("x", shape, "float32"), TensorSpec("y", result, "float32")
    model = Model("net", module.eval(), None, (x,), (y,), example, None, (), (), "0" * 64)
    return Exported(model, HexagonExporter().export_float(model, folder), shape, folder)


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    return export(Convolutions(), (1, 3, 32, 32), tmp_path_factory.mktemp("convolutions"))


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    return export(Attention(), (1, 12, 32), tmp_path_factory.mktemp("attention"))


@pytest.mark.parametrize("npu", [PHONE, OLD_PHONE], ids=lambda npu: npu.architecture)
@pytest.mark.parametrize(("precision", "least"), [("w8a8", 20.0), ("w8a16", 30.0)])
@pytest.mark.parametrize("name", ["convolutions", "attention"])
def test_whole_network_goes_to_htp(
    name: str, precision: str, least: float, npu: Hexagon, request: pytest.FixtureRequest
) -> None:
    exported: Exported = request.getfixturevalue(name)
    scheme = Scheme("w8a16" if precision == "w8a16" else "w8a8", "static", npu=npu)
    artifact = exported.quantized(scheme)
    assert not artifact.unquantized_ops
    placement = HexagonAccelerator().compile(artifact, npu, exported.folder).placement
    assert placement.ops
    assert placement.on_cpu == ()
    assert min(exported.sqnr(artifact)) > least


def test_fp16_runs_whole_and_its_rounding_shows(attention: Exported) -> None:
    artifact = attention.quantized(Scheme("fp16", "none", npu=PHONE))
    compiled = HexagonAccelerator().compile(artifact, PHONE, attention.folder)
    assert compiled.placement.on_cpu == ()
    assert 40 < attention.sqnr(artifact)[0] < 90


def test_integer_inputs_and_outputs(convolutions: Exported) -> None:
    artifact = convolutions.quantized(Scheme("w8a8", "static", io="int8", npu=PHONE))
    assert [t.dtype for t in (*artifact.signature.inputs, *artifact.signature.outputs)] == ["uint8", "uint8"]
    assert convolutions.sqnr(artifact)[0] > 20


def test_layers_of_16_bits_and_in_float(convolutions: Exported) -> None:
    scheme = Scheme("w8a8", "static", npu=PHONE)
    mixed = convolutions.quantized(scheme, LayerRules(("depthwise",), ("stem",)))
    assert {op.name.partition("/")[0] for op in mixed.unquantized_ops} == {"depthwise"}
    assert HexagonAccelerator().compile(mixed, PHONE, convolutions.folder).placement.on_cpu == ()
    assert convolutions.sqnr(mixed)[0] > 20


def test_the_same_model_gives_the_same_file_and_context_anywhere(convolutions: Exported, tmp_path: Path) -> None:
    scheme = Scheme("w8a8", "static", npu=PHONE)
    first = convolutions.quantized(scheme)
    again = replace(convolutions, folder=tmp_path).quantized(scheme)
    assert first.sha256 == again.sha256
    contexts = [
        HexagonAccelerator().compile(artifact, PHONE, artifact.path.parent).extra_files for artifact in (first, again)
    ]
    assert all(len(files) == 1 for files in contexts)
    assert contexts[0][0].read_bytes() == contexts[1][0].read_bytes()
    assert "EPContext" in {node.op_type for node in onnx.load(str(contexts[0][0])).graph.node}


def test_no_context_for_an_unknown_chip(convolutions: Exported) -> None:
    npu = Hexagon("v68", None, 2)
    compiled = HexagonAccelerator().compile(
        convolutions.quantized(Scheme("w8a8", "static", npu=npu)), npu, convolutions.folder
    )
    assert compiled.extra_files == ()
    assert [finding.code for finding in compiled.findings] == ["no-context-binary"]


def test_an_operator_that_htp_lacks_is_named_with_reason_and_fix(tmp_path: Path) -> None:
    exported = export(WithErf(), (1, 8), tmp_path)
    artifact = exported.quantized(Scheme("w8a8", "static", npu=PHONE))
    assert [op.type for op in artifact.unquantized_ops] == ["Erf"]
    placement = HexagonAccelerator().compile(artifact, PHONE, tmp_path).placement
    (op,) = placement.on_cpu
    assert (op.type, op.reason) == ("Erf", "QNN has no such operator")
    assert op.fix is not None
    assert 0 < placement.accelerated < 1
    assert exported.sqnr(artifact)[0] > 20, "it runs all the same"


def test_a_range_that_is_wrong_for_htp_ruins_the_emulated_result(convolutions: Exported) -> None:
    def clipped() -> Iterator[Sample]:
        for sample in convolutions.samples():
            yield Sample({"x": sample.inputs["x"] * np.float32(0.02)}, None, sample.name)

    run = CalibrationRun(clipped, 8, EstimatorSpec(), lambda _: None)
    request = QuantizationRequest(Scheme("w8a8", "static", npu=PHONE), run)
    broken = HexagonExporter().export_quantized(convolutions.model, convolutions.float, request, convolutions.folder)
    assert convolutions.sqnr(broken)[0] < 10


def foreign(folder: Path, kind: str, **attributes: object) -> Artifact:
    """A float file of one operator without a name, as other tools write it."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4, 1, 1], np.ones(16, np.float32))
    nodes = [helper.make_node(kind, ["x", "w"] if kind == "Conv" else ["x"], ["y"], **attributes)]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], [weight] if kind == "Conv" else [])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = folder / "foreign.onnx"
    onnx.save(proto, str(path))
    return Artifact(path, "onnx", "fp32", read_signature(proto), 1, "0" * 64, (), {}, ())


def test_a_file_of_another_tool_is_placed_too(tmp_path: Path) -> None:
    placement = HexagonAccelerator().compile(foreign(tmp_path, "HardSwish"), PHONE, tmp_path).placement
    assert [(op.type, op.on) for op in placement.ops] == [("HardSwish", "accelerator")]


def test_float_on_a_hexagon_without_it_names_the_operator(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="Conv") as caught:
        HexagonAccelerator().compile(foreign(tmp_path, "Conv"), OLD_PHONE, tmp_path)
    assert "\n" not in caught.value.line()


def test_a_broken_file_and_a_wrong_shape_are_one_line_each(convolutions: Exported, tmp_path: Path) -> None:
    artifact = convolutions.quantized(Scheme("w8a8", "static", npu=PHONE))
    with (
        QnnHtpRuntime().open(artifact.path, artifact.signature) as session,
        pytest.raises(DataError, match="has the shape"),
    ):
        session.run({"x": np.zeros((1, 3, 16, 16), np.float32)})
    broken = onnx.load(str(artifact.path))
    del broken.graph.node[3]
    path = tmp_path / "broken.onnx"
    onnx.save(broken, str(path))
    with pytest.raises(ConversionError) as caught:
        QnnHtpRuntime().open(path, artifact.signature)
    assert "\n" not in caught.value.line()


def test_the_vendors_prints_stay_out_of_the_terminal(convolutions: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = convolutions.quantized(Scheme("w8a8", "static", npu=PHONE))
    capfd.readouterr()
    with QnnHtpRuntime().open(artifact.path, artifact.signature) as session:
        session.run(next(convolutions.samples()).inputs)
    HexagonAccelerator().compile(artifact, PHONE, convolutions.folder)
    assert capfd.readouterr() == ("", "")
