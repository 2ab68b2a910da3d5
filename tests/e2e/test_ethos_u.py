"""Small networks through the LiteRT exporter, Vela and the TOSA reference model, for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from torch import nn
from torch.nn import functional as F  # noqa: N812

from edgeopt.accelerators import load_accelerator
from edgeopt.accelerators.base import Compiled
from edgeopt.device_profiles import load_device
from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.litert_ethos_u import EthosUExporter
from edgeopt.formats.litert import summarize
from edgeopt.runtimes.tosa import TosaRuntime
from edgeopt.runtimes.tosa_convert import to_tosa
from edgeopt.types import Array, Artifact, EstimatorSpec, EthosU, Model, Npu, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

INT8 = Scheme("w8a8", "static", io="int8")
INT16 = Scheme("w8a16", "static", activation_symmetric=True)
BOARDS = {"ethos-u55": "corstone-300", "ethos-u65": "corstone-300-u65-256", "ethos-u85": "corstone-320"}

Export = Callable[[type[nn.Module], Scheme], Artifact]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(channels, 4 * channels, 1), nn.BatchNorm2d(4 * channels)
        self.depthwise = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)
        self.project = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.relu6(self.depthwise(F.relu6(self.norm(self.expand(x))))))


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, stride=2, padding=1), Block(8)
        self.grow, self.head = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.hardswish(self.grow(self.block(F.relu6(self.stem(x))))).mean((2, 3)))


class Running(nn.Module):
    """Its running sum has no form on any Ethos-U."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.cumsum(self.stem(x), 1))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Each network is converted once for all tests of this file."""
    made: dict[tuple[type[nn.Module], Scheme], Artifact] = {}

    def make(kind: type[nn.Module], scheme: Scheme) -> Artifact:
        if (kind, scheme) not in made:
            made[kind, scheme] = convert(kind, scheme, tmp_path_factory.mktemp(kind.__name__))
        return made[kind, scheme]

    return make


def convert(kind: type[nn.Module], scheme: Scheme, directory: Path) -> Artifact:
    torch.manual_seed(0)
    module = kind().eval()
    x = torch.randn(1, 3, 32, 32)
    inputs = (TensorSpec("image", (1, 3, 32, 32), "float32", "NCHW"),)
    with torch.no_grad():
        shape = tuple(module(x).shape)
    outputs = (TensorSpec("scores", shape, "float32", "NCHW" if len(shape) == 4 else None),)
    model = Model("net", module, None, inputs, outputs, {"image": x.numpy()}, None, (), (), "0" * 64)
    samples = [Sample({"image": values}, None, str(i)) for i, values in enumerate(pictures(4))]
    calibration = CalibrationRun(lambda: iter(samples), len(samples), EstimatorSpec(), lambda _: None)
    exporter = EthosUExporter()
    floating = exporter.export_float(model, directory)
    return exporter.export_quantized(model, floating, QuantizationRequest(scheme, calibration), directory)


def pictures(count: int) -> list[Array]:
    random = np.random.default_rng(0)
    return [random.standard_normal((1, 3, 32, 32)).astype(np.float32) for _ in range(count)]


def npu_of(device: str) -> Npu:
    return load_device(device).npus[0]


def compiled(artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
    return load_accelerator("litert", npu.kind).compile(artifact, npu, directory)


def by_reference_kernels(path: Path, native: dict[str, Array]) -> Array:
    interpreter = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], next(iter(native.values())))
    interpreter.invoke()
    result: Array = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return result


@pytest.mark.parametrize("scheme", [INT8, INT16], ids=["int8", "w8a16"])
@pytest.mark.parametrize("device", BOARDS.values(), ids=BOARDS.keys())
def test_a_convolutional_network_runs_on_the_npu_alone(
    export: Export, scheme: Scheme, device: str, tmp_path: Path
) -> None:
    artifact = export(MobileNet, scheme)
    made = compiled(artifact, npu_of(device), tmp_path)
    assert made.placement.on_cpu == ()
    assert [op.name for op in made.placement.ops] == [op.name for op in summarize(artifact.path).ops]
    assert sum(op.ms or 0 for op in made.placement.ops) > 0
    assert {op.layer for op in made.placement.ops} >= {"stem", "block.depthwise", "head"}
    assert {op.type for op in summarize(made.artifact.path).ops} == {"ethos-u"}
    assert made.artifact.emulation == artifact.path
    assert all(check.passed for check in made.checks)
    figures = {m.name: m.value for m in made.measurements}
    assert figures["macs"] > 100_000
    assert figures["latency_ms"] > 0
    assert {m.provenance for m in made.measurements} == {"estimated"}


def test_the_same_file_gives_the_same_bytes(export: Export, tmp_path: Path) -> None:
    runs = []
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        runs.append(compiled(export(MobileNet, INT8), npu_of("corstone-300"), tmp_path / name).artifact)
    assert runs[0].sha256 == runs[1].sha256
    assert sorted(path.name for path in (tmp_path / "once").iterdir()) == ["model_vela.tflite"]


def test_memory_over_budget_is_a_failed_check(export: Export, tmp_path: Path) -> None:
    npu = npu_of("corstone-300")
    assert isinstance(npu, EthosU)
    made = compiled(export(MobileNet, INT8), replace(npu, sram_bytes=2048, storage_bytes=1024), tmp_path)
    sram, storage = made.checks
    assert (sram.name, sram.passed, sram.limit) == ("sram_bytes", False, 2048)
    assert (storage.name, storage.passed) == ("storage_bytes", False)
    assert sram.advice
    assert "sram-peak" in {finding.code for finding in made.findings}


def test_weights_in_sram_count_as_sram(export: Export, tmp_path: Path) -> None:
    npu = npu_of("corstone-300")
    assert isinstance(npu, EthosU)
    shared = compiled(export(MobileNet, INT8), npu, tmp_path).checks[0].measured
    alone = compiled(export(MobileNet, INT8), replace(npu, memory_mode="Sram_Only"), tmp_path).checks[0].measured
    assert shared is not None
    assert alone is not None
    assert alone > shared + 1000


def test_what_falls_back_is_named_with_its_reason(export: Export, tmp_path: Path) -> None:
    made = compiled(export(Running, INT8), npu_of("corstone-300"), tmp_path)
    fallbacks = {op.type: op for op in made.placement.on_cpu}
    assert fallbacks["CUMSUM"].reason == "the NPU has no CUMSUM"
    assert fallbacks["CUMSUM"].fix
    assert set(fallbacks) == {"CUMSUM", "DEQUANTIZE", "QUANTIZE"}
    assert fallbacks["QUANTIZE"].fix == "quantize the operators next to it, which compute in float"
    assert "npu-time-only" in {finding.code for finding in made.findings}
    left = {op.type for op in summarize(made.artifact.path).ops}
    assert left == {"CUMSUM", "DEQUANTIZE", "QUANTIZE", "ethos-u"}


def test_a_float_file_stays_on_the_cpu_and_gets_no_latency(export: Export, tmp_path: Path) -> None:
    path = export(Running, INT8).path.with_name("model_fp32.tflite")
    made = compiled(foreign_artifact(path), npu_of("corstone-300"), tmp_path)
    assert made.placement.accelerated == 0
    assert "latency_ms" not in {m.name for m in made.measurements}
    assert any(op.fix == "quantize it: it computes in float" for op in made.placement.on_cpu)


def foreign_artifact(path: Path) -> Artifact:
    found = summarize(path)
    return Artifact(path, "litert", "w8a8", found.signature, found.size_bytes, found.sha256, (), {}, ())


def test_what_vela_refuses_as_a_whole_names_the_operator(export: Export, tmp_path: Path) -> None:
    """It takes the float form of most operators for one of the CPU, but not that of HARD_SWISH."""
    path = export(MobileNet, INT8).path.with_name("model_fp32.tflite")
    with pytest.raises(ConversionError, match=r"Vela can't compile the file: HARD_SWISH '.*'.*IFM type=FLOAT32"):
        compiled(foreign_artifact(path), npu_of("corstone-300"), tmp_path)


def test_a_damaged_file_is_one_clear_line(export: Export, tmp_path: Path) -> None:
    artifact = export(MobileNet, INT8)
    path = tmp_path / "cut.tflite"
    path.write_bytes(artifact.path.read_bytes()[:2000])
    with pytest.raises(ConversionError, match=r"cut\.tflite: Vela can't compile the file"):
        compiled(replace(artifact, path=path), npu_of("corstone-300"), tmp_path)


def test_int8_on_tosa_is_litert_to_the_bit(export: Export) -> None:
    artifact = export(MobileNet, INT8)
    with TosaRuntime().open(artifact.path, artifact.signature) as session:
        for picture in pictures(3):
            native = session.encode({"image": 2 * picture})
            assert np.array_equal(session.run_native(native)["scores"], by_reference_kernels(artifact.path, native))


def test_int16_on_tosa_is_litert_within_a_step_or_two(export: Export) -> None:
    artifact = export(MobileNet, INT16)
    assert not {"QUANTIZE", "DEQUANTIZE"} & {op.type for op in summarize(artifact.path).ops}
    assert {t.dtype for t in (*artifact.signature.inputs, *artifact.signature.outputs)} == {"int16"}
    with TosaRuntime().open(artifact.path, artifact.signature) as session:
        native = session.encode({"image": pictures(1)[0]})
        found = session.run_native(native)["scores"].astype(np.int32)
        assert np.abs(found - by_reference_kernels(artifact.path, native)).max() <= 2
        assert session.run({"image": pictures(1)[0]})["scores"].dtype == np.float32


def test_float_inputs_outside_the_range_saturate_on_tosa(export: Export) -> None:
    """Arm's converter makes a QUANTIZE of casts that wrap around."""
    artifact = export(MobileNet, replace(INT8, io="float"))
    with TosaRuntime().open(artifact.path, artifact.signature) as session:
        native = session.encode({"image": 5 * pictures(1)[0]})
        expected = by_reference_kernels(artifact.path, native)
        assert np.abs(session.run_native(native)["scores"] - expected).max() <= 0.02 * np.abs(expected).max()


def test_a_tosa_file_of_its_own(export: Export, tmp_path: Path) -> None:
    artifact = export(MobileNet, INT8)
    path = tmp_path / "model.tosa"
    path.write_bytes(to_tosa(artifact.path).graph)
    native = {"image": np.zeros((1, 32, 32, 3), np.int8)}
    with TosaRuntime().open(path, artifact.signature) as session:
        assert np.array_equal(session.run_native(native)["scores"], by_reference_kernels(artifact.path, native))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match="corrupt or truncated"):
        TosaRuntime().open(path, artifact.signature)


def test_an_operator_without_tosa_form_is_named(export: Export) -> None:
    artifact = export(Running, INT8)
    with pytest.raises(ConversionError, match=r"CUMSUM '.*': the operator has no TOSA form; take .*litert-reference"):
        TosaRuntime().open(artifact.path, artifact.signature)
