"""A recipe from end to end: prune -> distil -> QAT -> export, each step measured, cached and resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgeopt
from edgeopt.bundle import open_bundle
from edgeopt.cli import main
from edgeopt.compression.steps import Distil, Factorize, Goal, Prune, Qat, Sparsify
from edgeopt.json_data import loads
from edgeopt.sources import ModelSpec
from edgeopt.sources.structure import load_model
from edgeopt.training.config import TrainingConfig
from edgeopt.types import Array, Bundle, TensorSpec

pytestmark = pytest.mark.e2e

SHORT = TrainingConfig(epochs=1, batch_size=32, learning_rate=1e-3)


class Net(nn.Module):
    """(N, 1, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return y


class Rows:
    def __init__(self, images: Array, labels: Array) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[dict[str, Array], int]:
        if index >= len(self):
            raise IndexError(index)
        return {"image": self._images[index : index + 1]}, int(self._labels[index])


@pytest.fixture(scope="module")
def digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.float32)[:, np.newaxis] / 8 - 1, found.target.astype(np.int64)


@pytest.fixture(scope="module")
def trained(digits: tuple[Array, Array]) -> nn.Module:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(part[:1200]) for part in digits)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for epoch in range(6):
        for chosen in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(64):
            loss = nn.functional.cross_entropy(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture
def run(digits: tuple[Array, Array], trained: nn.Module, tmp_path: Path):
    images, labels = digits
    spec = ModelSpec(
        module=trained, inputs=(TensorSpec("image", (1, 1, 8, 8), "float32", "NCHW"),), outputs=("y",), name="net"
    )

    def export(*steps: object, **options: object) -> Bundle:
        return edgeopt.export(
            spec,
            steps=steps,
            train=Rows(images[:1200], labels[:1200]),
            validation=Rows(images[1200:1400], labels[1200:1400]),
            evaluation=Rows(images[1400:], labels[1400:]),
            output_dir=tmp_path / "dist",
            min_speedup="off",
            **options,
        )

    return export


def test_prune_distil_qat(run, tmp_path: Path) -> None:
    weights = tmp_path / "small.safetensors"
    recipe = (
        Prune(to=Goal("macs", 0.5, is_share=True), rounds=2, training=SHORT),
        Distil(training=replace(SHORT, epochs=4, learning_rate=3e-3)),
        Qat(training=SHORT),
    )
    bundle = run(*recipe, target="android-int8", save_weights=weights)
    report = bundle.report
    assert [step.step for step in report.steps] == ["start", "prune", "distil", "qat"]
    start, pruned, *_, last = report.steps
    assert start.macs
    assert pruned.macs
    assert pruned.macs <= 0.5 * start.macs
    assert last.macs == pruned.macs
    assert last.size_bytes < start.size_bytes
    assert last.score
    assert last.score > 0.9
    # The shipped file is compared with the model as it was given, not with the pruned one.
    sizes = {m.subject: m.value for m in report.measurements if m.name == "size_bytes"}
    assert sizes["float"] > 6 * sizes["quantized"]
    history = [step.step for step in open_bundle(bundle.path).manifest.history]
    assert history.count("prune") == 2
    assert history.index("distil") < history.index("quantization-aware-training")
    assert b"<svg" in (bundle.path / "steps.svg").read_bytes()
    # Again: nothing is trained twice, and the model comes out the same.
    again = run(*recipe, target="android-int8")
    assert [f.where for f in again.report.findings if f.code == "step-cached"] == ["prune", "distil", "qat"]
    files = [open_bundle(b.path).model_path.read_bytes() for b in (bundle, again)]
    assert files[0] == files[1]
    # What was saved is a torch model that anybody can load.
    net = load_model(Net(), weights).eval()
    assert sum(p.numel() for p in net.parameters()) == last.parameters
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_sparsify_then_factorize_for_a_float_target(run) -> None:
    bundle = run(
        Factorize(to=Goal("macs", 0.8, is_share=True), multiple=4, training=SHORT),
        Sparsify(to=0.6, training=SHORT),
        target="android-onnx-fp32",
    )
    names = [step.step for step in bundle.report.steps]
    assert names == ["start", "factorize", "sparsify"]
    start, split, _ = bundle.report.steps
    assert start.macs
    assert split.macs
    assert split.macs <= 0.8 * start.macs
    assert bundle.path.joinpath("model.onnx").stat().st_size < 0.95 * start.size_bytes
    assert (bundle.path / "model.onnx.packed").is_file()
    assert main(["validate", str(bundle.path)]) == 0
    top1 = {m.subject: m.value for m in bundle.report.measurements if m.name == "top1"}
    assert top1.keys() == {"float", "quantized"}  # the model as it was given, and what was made of it
    assert top1["float"] == start.score


FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 10),
    )

EXAMPLE_INPUTS = (torch.zeros(1, 1, 8, 8),)
"""


def test_the_command_line_prunes_without_data_and_takes_its_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    shape = ["--input", "image=float32[1,1,8,8]"]
    common = ["--target", "android-fp32", "--json"]
    code = main(
        ["prune", "net.py:build", *shape, *common, "--prune-to", "macs=0.6x", "--save-weights", "s.safetensors"]
    )
    document = loads(capsys.readouterr().out, "output")
    assert isinstance(document, dict)
    (bundle,) = document["bundles"]
    start, pruned = bundle["report"]["steps"]
    assert code in (0, 1)  # a random network keeps no answer
    assert pruned["macs"] <= 0.6 * start["macs"]
    code = main(["export", "net.py:build", *shape, *common, "--weights", "s.safetensors", "--output-dir", "again"])
    document = loads(capsys.readouterr().out, "output")
    assert code == 0
    assert isinstance(document, dict)
    (bundle,) = document["bundles"]
    assert bundle["report"]["steps"] == []
    sizes = [(tmp_path / folder).rglob("model.tflite") for folder in ("dist", "again")]
    one, other = (next(iter(found)).stat().st_size for found in sizes)
    assert one == other
