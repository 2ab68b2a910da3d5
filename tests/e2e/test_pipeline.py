"""The main job, from the factory to the bundle, and what can be done with the bundle afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import edgeopt
from edgeopt.config import config_of
from edgeopt.pipeline import compare, export, validate
from edgeopt.sources import ModelSpec
from edgeopt.types import Bundle

pytestmark = pytest.mark.e2e

TARGETS = ("android-int8", "android-onnx-int8", "android-executorch-int8")

FACTORY = '''
import numpy as np
import torch
from edgeopt.sources import ModelSpec
from edgeopt.types import TensorSpec


class Net(torch.nn.Module):
    """Two inputs, a dict of two outputs."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU6(),
            torch.nn.Conv2d(32, 64, 3, stride=2, padding=1), torch.nn.Hardswish(),
        )
        self.embedding = torch.nn.Embedding(10, 64)
        self.head = torch.nn.Linear(64, 5)

    def forward(self, image, kind):
        maps = self.features(image)
        pooled = maps.mean(dim=(2, 3)) + self.embedding(kind)
        return {"scores": self.head(pooled), "maps": maps}


def build():
    torch.manual_seed(0)
    inputs = (TensorSpec("image", (1, 3, 32, 32), "float32"), TensorSpec("kind", (1,), "int64"))
    return ModelSpec(Net(), inputs=inputs, name="two-inputs")


def data():
    random = np.random.default_rng(0)
    return [
        ({"image": random.normal(size=(3, 32, 32)).astype("float32"), "kind": random.integers(0, 10)}, k % 5)
        for k in range(40)
    ]
'''


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The built-in example, exported once for all three runtimes."""
    config = config_of(
        {"example": "digits", "target": list(TARGETS), "output_dir": tmp_path_factory.mktemp("digits") / "dist"}
    )
    return {bundle.target: bundle for bundle in export(config)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_the_example_is_proven_in_its_runtime(digits: dict[str, Bundle], target: str) -> None:
    report = digits[target].report
    figures = {(m.name, m.subject): m.value for m in report.measurements}
    assert report.status == "passed"
    assert figures["top1", "float"] > 0.97
    assert figures["top1", "float"] - figures["top1", "quantized"] <= 0.01
    assert figures["sqnr_db", "quantized"] > 25
    assert figures["size_bytes", "quantized"] < figures["size_bytes", "float"] / 3
    assert report.evaluation["samples"] == 360
    assert {check.name for check in report.checks} >= {"accuracy_drop", "sqnr_db", "speedup", "source_sqnr_db"}
    assert report.unquantized_ops == ()


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_validates_again(digits: dict[str, Bundle], target: str) -> None:
    report = validate(digits[target].path)
    names = {check.name: check for check in report.checks}
    assert report.status == "passed"
    assert names["golden_vectors"].measured == 0
    assert "speedup" in {check.name for check in report.checks}
    kept = {finding.where for finding in report.findings if finding.code == "kept-from-record"}
    assert kept == {"accuracy_drop", "sqnr_db", "source_sqnr_db"}


def test_validation_on_data_judges_accuracy_anew(digits: dict[str, Bundle]) -> None:
    report = validate(digits["android-onnx-int8"].path, evaluation="edgeopt.examples.digits:held_out_set")
    kept = {finding.where for finding in report.findings}
    assert kept == {"source_sqnr_db"}
    assert report.evaluation["samples"] == 360
    assert {check.name for check in report.checks} >= {"accuracy_drop", "sqnr_db", "golden_vectors"}


def test_a_bundle_without_its_twin_still_validates(digits: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = digits["android-onnx-int8"]
    (alone,) = export(
        config_of(
            {
                "model": str(_write(tmp_path, FACTORY)) + ":build",
                "calibration": f"{tmp_path / 'net.py'}:data",
                "target": ["android-onnx-int8"],
                "float_twin": False,
                "output_dir": tmp_path / "dist",
                "min_speedup": "off",
            }
        )
    )
    assert not (alone.path / "float").exists()
    assert (bundle.path / "float").exists()
    report = validate(alone.path)
    assert report.status == "passed"
    assert any(m.name.startswith("sqnr_db") for m in report.measurements)


def test_two_runtimes_compare_in_one_run(digits: dict[str, Bundle]) -> None:
    comparison = compare(digits["android-int8"].path, digits["android-onnx-int8"].path)
    assert {m.subject for m in comparison.measurements} == {"a", "b"}
    assert comparison.outputs[0].sqnr_db > 20
    assert comparison.samples == 4


def test_bare_files_of_different_layout_compare(digits: dict[str, Bundle]) -> None:
    channel_last = digits["android-int8"].path / "float" / "model_fp32.tflite"
    channel_first = digits["android-onnx-int8"].path / "float" / "model_fp32.onnx"
    comparison = compare(channel_last, channel_first)
    assert comparison.outputs[0].sqnr_db > 80


def test_everything_but_the_report_is_the_same_twice(source: Path, tmp_path: Path) -> None:
    digests = []
    for run in ("first", "second"):
        bundle = edgeopt.export(
            f"{source}:build",
            target="android-onnx-int8",
            calibration=f"{source}:data",
            output_dir=tmp_path / run,
            min_speedup="off",
        )
        files = sorted(path for path in bundle.path.rglob("*") if path.is_file() and path.name != "report.json")
        digests.append({p.relative_to(bundle.path): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert digests[0] == digests[1]
    assert len(digests[0]) > 5


@pytest.mark.parametrize("target", TARGETS)
def test_several_inputs_and_a_dict_of_outputs(source: Path, tmp_path: Path, target: str) -> None:
    bundle = edgeopt.export(
        f"{source}:build",
        target=target,
        calibration=f"{source}:data",
        output_dir=tmp_path / "dist",
        num_calibration_samples=16,
        min_speedup="off",
    )
    assert bundle.passed, bundle.report.checks
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    signature = manifest["model"]["signature"]
    assert [t["name"] for t in signature["inputs"]] == ["image", "kind"]
    assert [t["name"] for t in signature["outputs"]] == ["scores", "maps"]
    assert bundle.report.evaluation["origin"] == "held out of the calibration set"
    assert bundle.report.evaluation["samples"] == 24
    steps = [step["step"] for step in manifest["history"]]
    assert "calibrate" in steps
    assert steps[0] == "load"


def test_a_module_and_data_at_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    data = TensorDataset(torch.randn(48, 16), torch.arange(48) % 4)
    bundle = edgeopt.export(
        ModelSpec(net, example_inputs=torch.randn(1, 16), name="at-hand"),
        target="android-onnx-int8",
        calibration=data,
        evaluation=DataLoader(data, batch_size=None),
        output_dir=tmp_path,
        min_speedup="off",
    )
    assert bundle.path == tmp_path / "at-hand-android-onnx-int8"
    assert bundle.report.evaluation["samples"] == 48
    assert {"top1", "agreement", "sqnr_db"} <= {m.name for m in bundle.report.measurements}


def test_a_missed_gate_still_writes_the_bundle(source: Path, tmp_path: Path) -> None:
    bundle = edgeopt.export(
        f"{source}:build",
        target="android-onnx-int8",
        calibration=f"{source}:data",
        output_dir=tmp_path,
        min_sqnr_db=150,
    )
    assert not bundle.passed
    assert json.loads((bundle.path / "report.json").read_text())["status"] == "failed"
    assert json.loads((bundle.path / "manifest.json").read_text())["status"] == "failed"
    assert validate(bundle.path).status == "failed"


def test_an_onnx_file_is_a_source_for_every_format(digits: dict[str, Bundle], tmp_path: Path) -> None:
    shutil.copy(digits["android-onnx-int8"].path / "float" / "model_fp32.onnx", tmp_path / "net.onnx")
    config = config_of(
        {
            "model": str(tmp_path / "net.onnx"),
            "calibration": "edgeopt.examples.digits:training_set",
            "evaluation": "edgeopt.examples.digits:held_out_set",
            "target": ["android-onnx-int8", "android-int8"],
            "output_dir": tmp_path / "dist",
        }
    )
    for bundle in export(config):
        assert bundle.passed, bundle.report.checks
        assert any(check.name == "source_sqnr_db" for check in bundle.report.checks)


def _write(folder: Path, text: str) -> Path:
    path = folder / "net.py"
    path.write_text(text)
    return path
