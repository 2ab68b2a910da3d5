"""Real conversions to ExecuTorch for Ethos-U and VGF, run on TOSA's reference model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt.accelerators.executorch_arm import ArmAccelerator
from edgeopt.errors import ConversionError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.executorch_arm import ArmExporter
from edgeopt.formats.executorch import read_program
from edgeopt.runtimes.tosa import TosaRuntime
from edgeopt.types import (
    Artifact,
    EstimatorSpec,
    EthosU,
    LayerRules,
    Model,
    Npu,
    Sample,
    Scheme,
    TensorSpec,
    Vgf,
)

pytestmark = pytest.mark.e2e

U55 = EthosU("ethos-u55", 128, 500, "Ethos_U55_High_End_Embedded", "Shared_Sram", 2 << 20, 16 << 20)
U85 = EthosU("ethos-u85", 256, 1000, "Ethos_U85_SYS_DRAM_Mid", "Sram_Only", 2 << 20, 16 << 20)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        x = x + F.relu6(self.body(x))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(16, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = F.relu(self.down(x))
        return self.out(torch.cat([skip, F.relu(self.up(F.relu(self.bottom(skip))))], 1))


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        weights = torch.softmax(self.query(h) @ self.key(h).transpose(1, 2) / 4.0, -1)
        return x + F.gelu(weights @ self.value(h))


class Between(nn.Module):
    """One operator that no Ethos-U has, between two convolutions."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.second(torch.fmod(x, 3.0) if self.operator == "fmod" else torch.sort(x, 3)[0])


class Tagger(nn.Module):
    """Token ids in, their embedding's linear map out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(300, 16), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


def build(module: nn.Module, shape: tuple[int, ...], *, ids: bool = False) -> Model:
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    example = draw(shape, 1, ids=ids)[0]
    with torch.no_grad():
        out = module.eval()(torch.from_numpy(example["x"]))
    inputs = (TensorSpec("x", shape, "int64" if ids else "float32"),)
    return Model(
        "net", module, None, inputs, (TensorSpec("y", tuple(out.shape), "float32"),), example, None, (), (), "0" * 64
    )


def draw(shape: tuple[int, ...], seed: int, count: int = 4, *, ids: bool = False) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [
        {"x": random.integers(0, 300, shape) if ids else random.normal(size=shape).astype(np.float32)}
        for _ in range(count)
    ]


def export(
    model: Model, directory: Path, npu: Npu, scheme: Scheme | None = None, keep_float: tuple[str, ...] = ()
) -> Artifact:
    ids = model.inputs[0].dtype == "int64"
    samples = draw(model.example_inputs["x"].shape, 2, 8, ids=ids)
    run = CalibrationRun(lambda: iter([Sample(s, None, "") for s in samples]), 8, EstimatorSpec(), lambda _: None)
    chosen = scheme or Scheme("w8a8", "static", io="int8", npu=npu)
    request = QuantizationRequest(chosen, run, LayerRules(keep_float))
    float_artifact = Artifact(directory / "f", "executorch", "fp32", None, 0, "", (), {}, ())  # type: ignore[arg-type]
    directory.mkdir(exist_ok=True)
    return ArmExporter().export_quantized(model, float_artifact, request, directory)


def sqnr_db(model: Model, artifact: Artifact, samples: Sequence[dict[str, np.ndarray]]) -> float:
    noise = power = 0.0
    assert model.module is not None
    with TosaRuntime().open(artifact.runnable, artifact.signature) as session:
        for sample in samples:
            with torch.no_grad():
                wanted = model.module(torch.from_numpy(sample["x"])).numpy()
            got = session.run(sample)["y"]
            assert got.shape == wanted.shape
            noise += float(((got - wanted) ** 2).sum())
            power += float((wanted**2).sum())
    return 10 * float(np.log10(power / noise))


CASES = {
    "a residual network on U55": (Residual, (1, 3, 32, 32), U55),
    "transposed convolutions on U85": (UNet, (1, 3, 32, 32), U85),
    "attention on U55": (Attention, (1, 8, 16), U55),
    "a residual network on VGF": (Residual, (1, 3, 32, 32), Vgf()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_network_goes_to_the_accelerator(case: str, tmp_path: Path) -> None:
    make, shape, npu = CASES[case]
    model = build(make(), shape)
    artifact = export(model, tmp_path, npu)
    assert artifact.emulation == tmp_path / "model.tosa"
    assert [t.dtype for t in (*artifact.signature.inputs, *artifact.signature.outputs)] == ["int8", "int8"]
    assert artifact.unquantized_ops == ()
    assert [op.info.delegate for op in read_program(artifact.path).ops] == [
        "VgfBackend" if isinstance(npu, Vgf) else "EthosUBackend"
    ]
    assert sqnr_db(model, artifact, draw(shape, 3)) > 28

    compiled = ArmAccelerator().compile(artifact, npu, tmp_path)
    assert compiled.artifact == artifact
    assert compiled.placement.on_cpu == ()
    assert {op.layer for op in compiled.placement.ops} & {"stem", "up", "query"}
    figures = {m.name: m.value for m in compiled.measurements}
    if isinstance(npu, Vgf):
        assert figures == {}
    else:
        assert figures["latency_ms"] > 0
        assert 0 < figures["sram_bytes"] < npu.sram_bytes
        assert figures["storage_bytes"] == artifact.size_bytes
        assert all(check.passed for check in compiled.checks)


def test_relu6_as_a_function_does_not_split_the_network(tmp_path: Path) -> None:
    """The backend fuses hardtanh, not relu6: taken as it is, it costs six operators on the CPU and three delegates."""
    artifact = export(build(Residual(), (1, 3, 16, 16)), tmp_path, U55)
    assert len(read_program(artifact.path).ops) == 1


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = build(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (1, 3, 8, 8))
    first, second = (export(model, tmp_path / name, U55) for name in ("a", "b"))
    assert first.sha256 == second.sha256
    assert first.runnable.read_bytes() == second.runnable.read_bytes()


def test_sram_over_the_budget_fails_its_check(tmp_path: Path) -> None:
    small = EthosU("ethos-u55", 128, 500, "Ethos_U55_High_End_Embedded", "Shared_Sram", 2048, 2048)
    artifact = export(build(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (1, 3, 32, 32)), tmp_path, small)
    checks = {check.name: check for check in ArmAccelerator().compile(artifact, small, tmp_path).checks}
    assert not checks["sram_bytes"].passed
    assert checks["sram_bytes"].limit == 2048
    assert checks["sram_bytes"].advice


def test_what_stays_on_the_cpu_is_named_and_still_computed(tmp_path: Path) -> None:
    model = build(Between("fmod"), (1, 3, 8, 8))
    artifact = export(model, tmp_path, U55)
    assert artifact.emulation == tmp_path / "model.tosa.zip"
    assert [(op.type, "no such operator" in op.reason) for op in artifact.unquantized_ops] == [
        ("aten.fmod.Scalar", True)
    ]
    assert sqnr_db(model, artifact, draw((1, 3, 8, 8), 3)) > 25
    compiled = ArmAccelerator().compile(artifact, U55, tmp_path)
    on_cpu = {op.type.rpartition(".")[0]: op for op in compiled.placement.on_cpu}
    assert "no such operator" in (on_cpu["aten.fmod"].reason or "")
    assert "quantized_decomposed.quantize_per_tensor" in on_cpu
    assert [finding.code for finding in compiled.findings] == ["npu-time-only"]


def test_an_operator_that_nothing_computes_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"aten\.sort"):
        export(build(Between("sort"), (1, 3, 8, 8)), tmp_path, U55)


def test_float_inputs_and_wide_activations(tmp_path: Path) -> None:
    model = build(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (1, 3, 12, 12))
    artifact = export(model, tmp_path, U85, Scheme("w8a16", "static", npu=U85))
    assert [t.dtype for t in (*artifact.signature.inputs, *artifact.signature.outputs)] == ["float32", "float32"]
    assert sqnr_db(model, artifact, draw((1, 3, 12, 12), 3)) > 35


def test_layers_kept_in_float_run_on_the_cpu(tmp_path: Path) -> None:
    model = build(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (1, 3, 12, 12))
    artifact = export(model, tmp_path, U55, Scheme("w8a8", "static", npu=U55), keep_float=("2",))
    assert [(op.type, op.reason) for op in artifact.unquantized_ops] == [
        ("aten.convolution.default", "kept in float as asked")
    ]
    assert sqnr_db(model, artifact, draw((1, 3, 12, 12), 3)) > 28


def test_vgf_computes_float_layers_and_conversions_itself(tmp_path: Path) -> None:
    model = build(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (1, 3, 12, 12))
    artifact = export(model, tmp_path, Vgf(), Scheme("w8a8", "static", npu=Vgf()), keep_float=("2",))
    assert artifact.emulation == tmp_path / "model.tosa"
    assert [(op.type, op.reason) for op in artifact.unquantized_ops] == [
        ("aten.convolution.default", "kept in float as asked")
    ]
    assert sqnr_db(model, artifact, draw((1, 3, 12, 12), 3)) > 28


def test_an_embedding_is_read_as_integers(tmp_path: Path) -> None:
    model = build(Tagger(), (1, 8), ids=True)
    artifact = export(model, tmp_path, U55)
    kernels = [op.info.type for op in read_program(artifact.path).ops if op.info.delegate is None]
    assert not any("quantize" in kernel for kernel in kernels)
    assert artifact.signature.inputs[0].dtype == "int64"
    assert sqnr_db(model, artifact, draw((1, 8), 3, ids=True)) > 30


def test_a_file_for_another_accelerator_is_refused(tmp_path: Path) -> None:
    model = build(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (1, 3, 8, 8))
    artifact = ExecuTorchExporter().export_float(model, tmp_path)
    with pytest.raises(ConversionError, match="XnnpackBackend"):
        ArmAccelerator().compile(artifact, U55, tmp_path)
