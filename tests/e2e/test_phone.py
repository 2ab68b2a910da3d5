"""The emulated phone for real: files of all three formats on two cores, against the same runtimes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt import emulator
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.types import Array, Artifact, EstimatorSpec, Format, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

CORES = ("cortex-a53", "cortex-a76")
FORMATS: tuple[Format, ...] = ("litert", "onnx", "executorch")


class Net(nn.Module):
    """Two inputs and two outputs; convolutions and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.context, self.head = nn.Linear(7, 16), nn.Linear(16, 10)

    def forward(self, image: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.relu(self.body(F.relu(self.stem(image))))
        pooled = features.mean((2, 3))
        return self.head(pooled + self.context(context)), pooled


@pytest.fixture(scope="module", autouse=True)
def _phone() -> None:
    reason = emulator.unavailable()
    if reason is not None:
        pytest.skip(reason)


def _sample(rows: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    image = random.standard_normal((rows, 3, 16, 16)).astype(np.float32)
    return {"image": image, "context": random.standard_normal((rows, 7)).astype(np.float32)}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Format, tuple[Artifact, Artifact]]:
    """For each format the float and the int8 file of a network."""
    torch.manual_seed(0)
    inputs = (TensorSpec("image", (1, 3, 16, 16), "float32", "NCHW"), TensorSpec("context", (1, 7), "float32"))
    outputs = (TensorSpec("scores", (1, 10), "float32"), TensorSpec("features", (1, 16), "float32"))
    model = Model("net", Net().eval(), None, inputs, outputs, _sample(1, 0), None, (), (), "0" * 64)
    samples = [Sample(_sample(1, seed), None, "") for seed in range(8)]
    found = {}
    for format_ in FORMATS:
        directory = tmp_path_factory.mktemp(format_)
        exporter = load_exporter(format_)
        twin = exporter.export_float(model, directory)
        run = CalibrationRun(lambda: iter(samples), len(samples), EstimatorSpec(), lambda _: None)
        request = QuantizationRequest(Scheme("w8a8", "static"), run)
        found[format_] = (twin, exporter.export_quantized(model, twin, request, directory))
    return found


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("format_", FORMATS)
def test_agrees_with_this_machine(
    artifacts: Mapping[Format, tuple[Artifact, Artifact]], format_: Format, core: str
) -> None:
    host, phone = load_runtime(HOST_RUNTIMES[format_]), load_runtime(f"phone:{core}")
    for artifact, tolerance in zip(artifacts[format_], (1e-5, 0.0), strict=True):
        with (
            host.open(artifact.path, artifact.signature) as here,
            phone.open(artifact.path, artifact.signature) as there,
        ):
            for seed in (98, 99):
                sample = _sample(1, seed)
                wanted, found = here.run(sample), there.run(sample)
                for name, values in wanted.items():
                    np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance * np.ptp(values))


def test_goes_on_after_what_does_not_fit(artifacts: Mapping[Format, tuple[Artifact, Artifact]]) -> None:
    for twin, _ in artifacts.values():
        with load_runtime("phone:cortex-a76").open(twin.path, twin.signature) as session:
            sample = _sample(1, 0)
            with pytest.raises(DataError, match="input 'context': has the shape"):
                session.run({**sample, "context": _sample(3, 0)["context"]})
            assert session.run(sample)["scores"].shape == (1, 10)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_damaged_file_is_one_line(
    artifacts: Mapping[Format, tuple[Artifact, Artifact]], format_: Format, tmp_path: Path
) -> None:
    twin, _ = artifacts[format_]
    path = tmp_path / twin.path.name
    path.write_bytes(twin.path.read_bytes()[:2000])
    with pytest.raises(ConversionError, match=f"^{path.name}: .* on the emulated Arm Cortex-A76 (refuses|died of) it"):
        load_runtime("phone:cortex-a76").open(path, twin.signature)


def test_more_threads_compute_the_same(artifacts: Mapping[Format, tuple[Artifact, Artifact]]) -> None:
    _, quantized = artifacts["litert"]
    sample = _sample(1, 5)
    results = []
    for threads in (1, 4):
        with load_runtime("phone:cortex-a76").open(quantized.path, quantized.signature, threads) as session:
            results.append(session.run(sample)["scores"])
    np.testing.assert_array_equal(*results)
