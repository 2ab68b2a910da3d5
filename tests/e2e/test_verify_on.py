"""`--verify-on phone:...` from end to end: one small network, its int8 file of every runtime on two emulated cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import edgeopt
from edgeopt.cli import main
from edgeopt.sources import ModelSpec
from edgeopt.types import Bundle, Measurement, TensorSpec

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("emulator")]

TARGETS = ("android-int8", "android-onnx-int8", "android-executorch-int8")
#: With int8 dot products, and without.
CORES = ("phone:cortex-a76", "phone:cortex-a53")


class Net(nn.Module):
    """Two outputs, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 48, 3, 1, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu(self.body(torch.relu(self.stem(image))))
        scores = self.head(features.mean((2, 3)))
        return scores, scores.argmax(1)


def spec() -> ModelSpec:
    torch.manual_seed(0)
    inputs = (TensorSpec("image", (1, 3, 24, 24), "float32", "NCHW"),)
    return ModelSpec(Net().eval(), inputs=inputs, outputs=("scores", "best"), name="net")


def exported(target: str, directory: Path, phones: tuple[str, ...], limit: int | None = None) -> Bundle:
    data = [(torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(seed)), 0) for seed in range(40)]
    return edgeopt.export(
        spec(),
        target=target,
        calibration=data,
        num_calibration_samples=32,
        num_verification_samples=3,
        max_accuracy_drop="off",
        min_agreement="off",
        min_speedup="off",
        verify_on=phones,
        max_instructions="off" if limit is None else limit,
        output_dir=directory,
    )


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target: str = request.param
    return exported(target, tmp_path_factory.mktemp(target), CORES)


def on(phone: str, bundle: Bundle) -> dict[tuple[str, str], Measurement]:
    return {(m.name, m.subject): m for m in bundle.report.measurements if m.runtime == phone}


def test_the_int8_file_computes_there_what_it_computes_here(bundle: Bundle) -> None:
    for phone in CORES:
        found = on(phone, bundle)
        assert found["host_identical", "quantized"].value == 1
        assert found["host_identical", "quantized"].repetitions == 3
        assert {m.provenance for m in found.values() if m.name != "cycles"} == {"emulated"}
        check = next(check for check in bundle.report.checks if check.name == f"sqnr_db@{phone}")
        assert check.passed
        assert check.limit is not None


def test_instructions_are_counted_and_dot_products_save_most(bundle: Bundle) -> None:
    ratios = []
    for phone in CORES:
        found = on(phone, bundle)
        for subject in ("float", "quantized"):
            classes = [m.value for (name, of), m in found.items() if name.startswith("instructions[") and of == subject]
            # The convolutions alone multiply 1.1 million pairs, at most 16 in one instruction.
            assert sum(classes) == found["instructions", subject].value > 70_000
        ratio = found["instructions", "float"].value / found["instructions", "quantized"].value
        assert found["instruction_ratio", "quantized"].value == ratio
        ratios.append(ratio)
        dot_products = found["instructions[dotprod]", "quantized"].value
        assert (dot_products > 10_000) == (phone == "phone:cortex-a76")
    assert ratios[0] > 1.3 * ratios[1]


def test_a_core_without_dot_products_is_told(bundle: Bundle) -> None:
    told = {finding.where: finding for finding in bundle.report.findings if finding.where in CORES}
    ratio = on("phone:cortex-a53", bundle)["instruction_ratio", "quantized"].value
    assert ("phone:cortex-a53" in told) == (ratio < 1.5)
    for finding in told.values():
        assert finding.code == "little-saved"
    if "phone:cortex-a53" in told:
        assert told["phone:cortex-a53"].message.endswith("Arm Cortex-A53 has no int8 dot products")


def test_validated_again_it_counts_the_same_and_keeps_the_limit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    phone = CORES[0]
    made = exported("android-onnx-int8", tmp_path, (phone, phone), limit=1000)
    check = next(check for check in made.report.checks if check.name == f"instructions@{phone}")
    assert (made.passed, check.passed, check.limit) == (False, False, 1000)
    capfd.readouterr()
    assert main(["validate", str(made.path), "--verify-on", phone, "--json"]) == 1
    printed = capfd.readouterr()
    assert f"missed instructions@{phone}" in printed.err
    again = {
        (m["name"], m["subject"]): m["value"]
        for m in json.loads(printed.out)["report"]["measurements"]
        if m["runtime"] == phone
    }
    before = on(phone, made)
    counts = {key: m.value for key, m in before.items() if key[0].startswith("instruction")}
    assert counts.items() <= again.items()
    assert again["host_identical", "quantized"] == before["host_identical", "quantized"].value == 1
    # Named twice, it ran once.
    assert len(before) == sum(m.runtime == phone for m in made.report.measurements)
