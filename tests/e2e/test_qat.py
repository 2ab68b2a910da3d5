"""The simulation against the exported files, and what training on it is worth there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.qat import QuantizationAwareTraining
from edgeopt.datasets import open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.progress import Silent
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.base import Session
from edgeopt.training.config import TrainingConfig
from edgeopt.training.quantized_module import QuantizedModule
from edgeopt.types import Array, EstimatorSpec, Format, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

RUNTIMES = {"onnx": "onnxruntime", "litert": "litert", "executorch": "executorch"}
STATIC = Scheme("w8a8", "static")


def block(channels_in: int, channels_out: int, activation: nn.Module, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), activation)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, nn.ReLU6(), stride=2)
        self.body = nn.Sequential(
            block(16, 16, nn.ReLU6(), groups=16), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        )
        self.head = nn.Sequential(block(16, 32, nn.ReLU6(), stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        result: Tensor = self.classifier(self.head(x + self.body(x)))
        return result


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.gate(x)
        return result


class Mobile(nn.Module):
    """MobileNetV3 in small: hardswish, depthwise, squeeze-excite, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, nn.Hardswish(), stride=2)
        self.body = nn.Sequential(
            block(16, 16, nn.Hardswish(), groups=16), SqueezeExcite(16), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        )
        self.head = nn.Sequential(block(16, 32, nn.Hardswish(), stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        result: Tensor = self.classifier(self.head(x + self.body(x)))
        return result


class Transformer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down, self.head = (
            nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        result: Tensor = self.head(x)
        return result


PICTURE, TOKENS = (1, 3, 32, 32), (1, 8, 32)


def prepared(network: nn.Module, shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """Normalization statistics and scales as a trained network has them."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.5)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, *shape[1:]) * 1.5)
    return network.eval()


def sqnr(signal: Array, other: Array) -> float:
    return float(10 * np.log10((signal**2).sum() / ((signal - other) ** 2).sum()))


def opened(model: Model, data: Dataset, format_: Format, scheme: Scheme, directory: Path) -> Session:
    directory.mkdir(exist_ok=True)
    exporter = load_exporter(format_)
    run = CalibrationRun(lambda: iter(data), len(data), EstimatorSpec(), lambda _: None)
    # ExecuTorch quantizes the module and looks at no float file, which takes it ten seconds to write.
    twin = load_exporter("onnx" if format_ == "executorch" else format_).export_float(model, directory)
    artifact = exporter.export_quantized(model, twin, QuantizationRequest(scheme, run), directory)
    return load_runtime(RUNTIMES[format_]).open(artifact.path, artifact.signature)


def model_of(network: nn.Module, shape: tuple[int, ...], outputs: tuple[int, ...]) -> Model:
    layout = "NCHW" if len(shape) == 4 else None
    return Model(
        "net", network, None, (TensorSpec("x", shape, "float32", layout),), (TensorSpec("y", outputs, "float32"),),
        {"x": np.zeros(shape, np.float32)}, None, (), (), "0" * 64,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("network", "shape", "format_", "above_noise"),
    [
        (Residual, PICTURE, "onnx", 4.0),
        (Mobile, PICTURE, "onnx", 8.0),
        (Mobile, PICTURE, "litert", 8.0),
        (Mobile, PICTURE, "executorch", 4.0),
        (Transformer, TOKENS, "onnx", 8.0),
        (Transformer, TOKENS, "executorch", 8.0),
        (Transformer, TOKENS, "litert", 8.0),
    ],
)
def test_training_sees_the_files_numerics(
    network: type[nn.Module], shape: tuple[int, ...], format_: Format, above_noise: float, tmp_path: Path
) -> None:
    module = prepared(network(), shape)
    rng = np.random.default_rng(0)
    data = open_dataset([rng.normal(0, 1.5, shape[1:]).astype(np.float32) for _ in range(24)],
                        model_of(module, shape, (1, 10)).inputs, None)  # fmt: skip
    tests = [rng.normal(0, 1.2, shape).astype(np.float32) for _ in range(24)]
    with torch.no_grad():
        real = np.concatenate([module(torch.from_numpy(x)).numpy() for x in tests])
    model = model_of(module, shape, (1, *real.shape[1:]))
    with opened(model, data, format_, STATIC, tmp_path / "file") as session:
        file = np.concatenate([session.run({"x": x})["y"] for x in tests])
    simulation = QuantizedModule(module, [torch.from_numpy(tests[0])], format_, STATIC, LayerRules())
    simulation.calibrate(lambda: ((torch.from_numpy(s.inputs["x"]),) for s in data), len(data), EstimatorSpec())
    with torch.no_grad():
        simulated = np.concatenate([simulation(torch.from_numpy(x)).numpy() for x in tests])
    print(f"{network.__name__} {format_}: file-float {sqnr(real, file):.1f} dB, file-simulation "
          f"{sqnr(file, simulated):.1f} dB")  # fmt: skip
    assert sqnr(file, simulated) > 38.0
    assert sqnr(file, simulated) > sqnr(real, file) + above_noise


def digits(held_out: bool) -> list[tuple[Array, int]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == held_out
    pictures = (np.kron(data.images[chosen], np.ones((1, 2, 2))) / 8 - 1).astype(np.float32)[:, np.newaxis]
    return list(zip(pictures, (int(label) for label in data.target[chosen]), strict=True))


def hard_network(training: Dataset) -> nn.Module:
    """Trained on digits, then its inner channels rescaled by up to 100 without a change of its function: what one scale
    per tensor can't take."""
    torch.manual_seed(0)
    first, second = block(1, 16, nn.ReLU(), stride=2), block(16, 32, nn.ReLU(), stride=2)
    network = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).train()
    pictures = torch.from_numpy(np.concatenate([s.inputs["x"] for s in training]))
    labels = torch.tensor([s.label for s in training])
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for _ in range(6):
        for chosen in torch.randperm(len(pictures)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(pictures[chosen]), labels[chosen]).backward()
            optimizer.step()
    factors = torch.logspace(-1, 1, 16)
    with torch.no_grad():
        first.get_parameter("1.weight").mul_(factors)
        first.get_parameter("1.bias").mul_(factors)
        second.get_parameter("0.weight").div_(factors.view(1, -1, 1, 1))
    return network.eval()


def accuracy(session: Session, data: Dataset) -> float:
    with session:
        return float(np.mean([session.run(s.inputs)["y"].argmax() == s.label for s in data]))


@dataclass(frozen=True)
class HardCase:
    """A network that plain quantization harms, what is left of its accuracy, and the data."""

    model: Model
    training: Dataset
    calibration: Dataset
    held_out: Dataset
    float_accuracy: float
    plain_accuracy: float


HARSH = Scheme("w8a8", "static", weight_granularity="per-tensor")


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> HardCase:
    specs = (TensorSpec("x", (1, 1, 16, 16), "float32", "NCHW"),)
    training, held_out = open_dataset(digits(False), specs, None), open_dataset(digits(True), specs, None)
    network = hard_network(training)
    with torch.no_grad():
        real = float(np.mean([network(torch.from_numpy(s.inputs["x"])).argmax() == s.label for s in held_out]))
    model, calibration = model_of(network, (1, 1, 16, 16), (1, 10)), select(training, 32, 0)
    session = opened(model, calibration, "onnx", HARSH, tmp_path_factory.mktemp("plain"))
    return HardCase(model, training, calibration, held_out, real, accuracy(session, held_out))


@pytest.mark.parametrize("learned", [False, True])
def test_training_recovers_what_plain_quantization_loses(hard: HardCase, learned: bool, tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        return iter(hard.calibration)

    pass_ = QuantizationAwareTraining(
        "onnx", hard.training, TrainingConfig(epochs=3, batch_size=64, learning_rate=2e-3), learned=learned
    )
    inputs = PassInputs(HARSH, samples, 32, 0, Silent(), EstimatorSpec(), LayerRules())
    trained = run_pass(pass_, hard.model, inputs)
    assert bool(trained.input_ranges) is learned
    recovered = accuracy(opened(trained, hard.calibration, "onnx", HARSH, tmp_path), hard.held_out)
    print(f"float {hard.float_accuracy:.3f}, plain {hard.plain_accuracy:.3f}, trained {recovered:.3f}")
    assert hard.plain_accuracy < hard.float_accuracy - 0.05
    assert recovered >= hard.float_accuracy - 0.01
