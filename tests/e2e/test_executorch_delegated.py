"""Real lowerings to the Vulkan and Core ML delegates, which run nowhere here, and the same programs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt.accelerators.executorch_delegated import DelegatedAccelerator
from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.formats.coreml_interpreter import Interpreter
from edgeopt.formats.coreml_program import read_program
from edgeopt.formats.executorch_delegated import coreml_files, read_calls
from edgeopt.runtimes.executorch import ExecuTorchRuntime
from edgeopt.types import Array, Artifact, Dim, LayerRules, Model, NeuralEngine, Npu, Scheme, TensorSpec, Vulkan

pytestmark = pytest.mark.e2e

PHONE, GPU = NeuralEngine("A17 Pro", 16, 17), Vulkan()
IMAGE = (1, 3, 16, 16)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.project(F.hardswish(self.depthwise(x)))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Cumulative(nn.Module):
    """A running sum, which Vulkan has no shader for, between layers that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.cumsum(self.first(x), 1))


def model_of(module: nn.Module, shape: tuple[int | Dim, ...]) -> Model:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    example = np.random.default_rng(0).standard_normal([1 if isinstance(d, Dim) else d for d in shape])
    with torch.no_grad():
        result = module.eval()(torch.from_numpy(example.astype(np.float32)))
    spec = TensorSpec("x", shape, "float32")
    output = TensorSpec("y", (*shape[:1], *result.shape[1:]), "float32")
    return Model("net", module, None, (spec,), (output,), {"x": example.astype(np.float32)}, None, (), (), "0" * 64)


def export(model: Model, npu: Npu, folder: Path, precision: str = "fp16") -> tuple[Artifact, Artifact]:
    exporter = load_exporter("executorch", npu.kind)
    twin = exporter.export_float(model, folder)
    request = QuantizationRequest(Scheme(precision, "none", npu=npu), None)  # type: ignore[arg-type]
    return twin, exporter.export_quantized(model, twin, request, folder)


def run(path: Path, artifact: Artifact, x: Array) -> Array:
    with ExecuTorchRuntime().open(path, artifact.signature) as session:
        return session.run({"x": x})["y"]


def sqnr(reference: Array, values: Array) -> float:
    return 10 * float(np.log10((reference**2).sum() / max(((reference - values) ** 2).sum(), 1e-30)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return tmp_path_factory.mktemp


@pytest.fixture(scope="module")
def on_gpu(folder: Callable[[str], Path]) -> tuple[Artifact, Artifact]:
    return export(model_of(Residual(), IMAGE), GPU, folder("gpu"))


@pytest.fixture(scope="module")
def on_phone(folder: Callable[[str], Path]) -> tuple[Artifact, Artifact]:
    pytest.importorskip("coremltools", reason="needs coremltools")
    return export(model_of(Residual(), IMAGE), PHONE, folder("phone"))


def check_emulation(twin: Artifact, artifact: Artifact, x: Array) -> None:
    """Rounded like float16, and overflowing like it."""
    assert artifact.emulation is not None
    assert artifact.runnable == artifact.emulation != artifact.path
    exact, rounded = run(twin.path, twin, x), run(artifact.runnable, artifact, x)
    assert 40 < sqnr(exact, rounded) < 100
    assert np.isfinite(run(twin.path, twin, 1e6 * x)).all()
    assert not np.isfinite(run(artifact.runnable, artifact, 1e6 * x)).all()


def test_vulkan_takes_a_convolutional_network_whole(on_gpu: tuple[Artifact, Artifact]) -> None:
    twin, artifact = on_gpu
    compiled = DelegatedAccelerator().compile(artifact, GPU, artifact.path.parent)
    assert compiled.placement.accelerator == "Vulkan"
    assert compiled.placement.on_cpu == ()
    layers = {op.layer for op in compiled.placement.ops}
    assert {"stem.0", "depthwise", "project", "head"} <= layers
    assert len({op.name for op in compiled.placement.ops}) == len(compiled.placement.ops)
    assert [f.code for f in compiled.findings] == ["not-executed"]
    assert artifact.history[-1].config == {"format": "executorch", "precision": "fp16", "delegate": "VulkanBackend"}
    check_emulation(twin, artifact, np.random.default_rng(1).standard_normal(IMAGE).astype(np.float32))


def test_coreml_takes_it_whole(on_phone: tuple[Artifact, Artifact]) -> None:
    twin, artifact = on_phone
    compiled = DelegatedAccelerator().compile(artifact, PHONE, artifact.path.parent)
    assert compiled.placement.accelerator == "Core ML"
    assert compiled.placement.on_cpu == ()
    convolutions = [op.layer for op in compiled.placement.ops if op.type == "conv"]
    assert convolutions[1:] == ["depthwise", "project"]
    check_emulation(twin, artifact, np.random.default_rng(1).standard_normal(IMAGE).astype(np.float32))


def test_coreml_bytes_are_the_same_again(on_phone: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    _, artifact = on_phone
    _, again = export(model_of(Residual(), IMAGE), PHONE, tmp_path)
    assert again.sha256 == artifact.sha256
    assert again.runnable.read_bytes() == artifact.runnable.read_bytes()


def test_the_user_s_weights_are_left_alone(tmp_path: Path) -> None:
    model = model_of(Cumulative(), (1, 4, 8))
    assert model.module is not None
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    twin, artifact = export(model, GPU, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    compiled = DelegatedAccelerator().compile(artifact, GPU, tmp_path)
    # Around what stays on the CPU there are two delegates.
    assert [(op.type, op.reason) for op in compiled.placement.on_cpu] == [
        ("aten.cumsum.out", "the Vulkan delegate has no shader for aten.cumsum")
    ]
    assert {op.layer for op in compiled.placement.ops if op.type == "aten.linear.default"} == {"first", "second"}
    assert len(read_calls(artifact.path)) == 2
    with pytest.raises(ConversionError, match="no operator of it goes to the Vulkan delegate"):
        DelegatedAccelerator().compile(replace(artifact, path=twin.path), GPU, tmp_path)


def test_attention_without_a_mask_stays_on_the_gpu(tmp_path: Path) -> None:
    twin, artifact = export(model_of(Attention(), (1, 6, 16)), GPU, tmp_path, "fp32")
    assert DelegatedAccelerator().compile(artifact, GPU, tmp_path).placement.on_cpu == ()
    x = np.random.default_rng(1).standard_normal((1, 6, 16)).astype(np.float32)
    assert sqnr(run(twin.path, twin, x), run(artifact.runnable, artifact, x)) > 100


class Gelu(nn.Module):
    """Its tanh form, which coremltools would take for the exact one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def test_the_package_in_the_delegate_computes_the_model(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs coremltools")
    from executorch.exir._serialize._program import deserialize_pte_binary

    model = model_of(Gelu(), (1, 64))
    _, artifact = export(model, PHONE, tmp_path, "fp32")
    delegates = deserialize_pte_binary(artifact.path.read_bytes()).program.backend_delegate_data
    for name, content in coreml_files(bytes(delegates[0].data)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    x = np.linspace(-3, 3, 64, dtype=np.float32)[None]
    program = read_program(tmp_path / "model.mlpackage")
    found = Interpreter(program).run({program.inputs[0].name: x})
    wanted, exact = (F.gelu(torch.from_numpy(x), approximate=form).numpy() for form in ("tanh", "none"))
    assert np.abs(wanted - exact).max() > 1e-4
    np.testing.assert_allclose(next(iter(found.values())), wanted, atol=1e-5)


class Biased(nn.Module):
    """Stands for a model that coremltools converts wrongly: it gives something else once it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) if torch.compiler.is_exporting() else torch.tanh(x) + 1


def test_a_package_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs coremltools")
    with pytest.raises(ConversionError, match="output 'y': coremltools converted it wrongly"):
        export(model_of(Biased(), (1, 64)), PHONE, tmp_path)


def test_dynamic_batch_in_coreml(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs coremltools")
    _, artifact = export(model_of(Residual(), (Dim("batch", 1, 4), *IMAGE[1:])), PHONE, tmp_path)
    x = np.random.default_rng(1).standard_normal((3, *IMAGE[1:])).astype(np.float32)
    assert run(artifact.runnable, artifact, x).shape == (3, 4)
    assert DelegatedAccelerator().compile(artifact, PHONE, tmp_path).placement.accelerated == 1


def test_a_file_that_is_cut_short(on_gpu: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    cut = tmp_path / "model.pte"
    cut.write_bytes(on_gpu[1].path.read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"model\.pte"):
        DelegatedAccelerator().compile(replace(on_gpu[1], path=cut), GPU, tmp_path)


@pytest.mark.parametrize("npu", [GPU, PHONE], ids=lambda npu: npu.kind)
def test_what_the_delegates_are_not_made_for(npu: Npu) -> None:
    exporter = load_exporter("executorch", npu.kind)
    assert "fp16 or fp32" in (exporter.unsupported(Scheme("w8a8", "static", npu=npu), LayerRules()) or "")
    assert "one precision" in (exporter.unsupported(Scheme("fp16", "none", npu=npu), LayerRules(("head",))) or "")
    assert exporter.unsupported(Scheme("fp16", "none", npu=npu), LayerRules()) is None
