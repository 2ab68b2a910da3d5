"""Accelerator targets from end to end: what the user of the command line or of `edgeopt.export` gets."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import edgeopt
from edgeopt.cli import main
from edgeopt.debugging import debug
from edgeopt.pipeline import compare, validate
from edgeopt.types import Bundle, Report

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("ethosu") is None, reason="vela is not installed (edgeopt[ethos-u])"),
    pytest.mark.skipif(find_spec("tosa_reference_model") is None, reason="no TOSA reference model (edgeopt[ethos-u])"),
]

NETS = """
import numpy as np
import torch
from edgeopt.sources import ModelSpec
from edgeopt.types import TensorSpec


class Digits(torch.nn.Module):
    def __init__(self, outlier=None):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.widen = torch.nn.Conv2d(8, 16, 1)
        self.head = torch.nn.Linear(16, 10)
        if outlier is not None:  # a channel that nobody reads, and that is far larger than all others
            with torch.no_grad():
                self.widen.weight[0] *= outlier
                self.head.weight[:, 0] = 0

    def forward(self, x):
        x = torch.nn.functional.relu6(self.depthwise(torch.nn.functional.relu6(self.stem(x))))
        return self.head(torch.nn.functional.relu(self.widen(x)).mean((2, 3)))


def build(outlier=None):
    torch.manual_seed(0)
    inputs = (TensorSpec("image", (1, 1, 16, 16), "float32", "NCHW"),)
    return ModelSpec(Digits(outlier).eval(), inputs=inputs, name="tiny")


def broken():
    return build(outlier=-3000.0)


def data():
    random = np.random.default_rng(0)
    return [({"image": random.standard_normal((1, 16, 16)).astype("float32")}, k % 10) for k in range(24)]
"""
CRAMPED = """
extends = "corstone-300"
title = "A board with 1 KiB of SRAM"

[[npu]]
kind = "ethos-u55"
macs = 128
mhz = 500
system-config = "Ethos_U55_High_End_Embedded"
memory-mode = "Shared_Sram"
sram-kb = 1
storage-kb = 1024
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("accelerators")
    (made / "nets.py").write_text(NETS)
    (made / "cramped.toml").write_text(CRAMPED)
    return made


@pytest.fixture(scope="module")
def bundles(folder: Path) -> dict[str, Bundle]:
    def made(target: str) -> Bundle:
        return edgeopt.export(
            f"{folder}/nets.py:build",
            target=target,
            calibration=f"{folder}/nets.py:data",
            output_dir=folder / "dist",
            max_cpu_operators=0,
            max_accuracy_drop="off",  # the labels are made up
            min_sqnr_db=20,
        )

    return {target: made(target) for target in ("ethosu55-int8", "ethosu85-int8", "edgetpu-int8")}


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def values(report: Report) -> dict[str, float]:
    return {m.name: m.value for m in report.measurements if m.subject == "quantized"}


@pytest.mark.parametrize("target", ["ethosu55-int8", "ethosu85-int8", "edgetpu-int8"])
def test_everything_runs_on_the_accelerator_and_nothing_is_timed(bundles: dict[str, Bundle], target: str) -> None:
    report = bundles[target].report
    assert bundles[target].passed
    assert report.placement is not None
    assert report.placement.on_cpu == ()
    assert report.op_timings == ()
    assert report.evaluation["emulates"]
    provenance = {m.name: m.provenance for m in report.measurements if m.subject == "quantized"}
    assert provenance["sqnr_db"] == "emulated"
    assert provenance["latency_ms"] == "estimated"
    assert "speedup" not in provenance


@pytest.mark.parametrize("target", ["ethosu55-int8", "edgetpu-int8"])
def test_a_bundle_stands_on_its_own(bundles: dict[str, Bundle], target: str) -> None:
    bundle = bundles[target]
    again = validate(bundle.path)
    assert again.status == "passed"
    estimates = ("latency_ms", "macs", "cpu_operators", "accelerated")
    assert [values(again).get(name) for name in estimates] == [values(bundle.report).get(name) for name in estimates]
    assert again.placement == bundle.report.placement
    check = subprocess.run([sys.executable, bundle.path / "check.py"], capture_output=True, text=True, check=False)
    assert (check.returncode, check.stdout.splitlines()[-1]) == (0, "all outputs agree"), check.stderr


def test_one_litert_file_serves_every_ethos_u(bundles: dict[str, Bundle]) -> None:
    """`edgeopt coverage` makes it once for all of them."""
    first, second = (bundles[t].path / "emulation" / "model.tflite" for t in ("ethosu55-int8", "ethosu85-int8"))
    assert first.read_bytes() == second.read_bytes()


def test_emulated_bundles_are_not_timed_against_each_other(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = bundles["ethosu55-int8"].path, bundles["edgetpu-int8"].path
    compared = compare(first, second)
    assert {m.name for m in compared.measurements} == {"size_bytes"}
    assert compared.outputs[0].sqnr_db is not None
    assert compared.outputs[0].sqnr_db > 30
    assert main(["compare", str(first), str(second)]) == 0
    shown = capsys.readouterr().out
    assert "Not timed" in shown
    assert "latency" not in shown


@pytest.mark.usefixtures("inside")
def test_a_network_that_eight_bits_ruin_exits_1_and_sixteen_save_it(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--calibration", "nets.py:data", "--max-accuracy-drop", "off")
    command = ["export", "nets.py:broken", *common, "--target", "ethosu55-int8", "--target", "ethosu55-w8a16"]
    assert main([*command, "--output-dir", "broken"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  tiny for ethosu55-int8 (proven in tosa); missed: SQNR" in out
    assert re.search(r"^ethosu55-w8a16 +passed", out, re.MULTILINE)
    assert "What to try" in out
    assert main(["validate", "broken/tiny-ethosu55-int8"]) == 1  # it still fails, by the record


@pytest.mark.usefixtures("inside")
def test_what_the_device_has_not_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--calibration", "nets.py:data", "--max-accuracy-drop", "off", "--output-dir", "cramped")
    assert main(["export", "nets.py:build", *common, "--target", "ethosu55-int8", "--device", "cramped.toml"]) == 1
    out = capsys.readouterr().out
    assert "missed: SRAM" in out
    assert "<= 1.0 KiB" in out
    given = ("--keep-float", "depthwise", "--max-cpu-operators", "0", "--min-accelerated", "off")
    assert main(["export", "nets.py:build", *common, "--target", "edgetpu-int8", *given]) == 1
    out = " ".join(capsys.readouterr().out.split())  # lines wrap
    assert "missed: operators on the CPU" in out
    assert "on the CPU:" in out


def test_refusals_come_before_any_work(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--calibration", "nets.py:data", "--output-dir", "never")
    assert main(["export", "nets.py:build", *common, "--target", "edgetpu-int8", "--device", "pixel-8"]) == 2
    error = capsys.readouterr().err
    assert "device 'pixel-8': has no edge-tpu" in error
    assert "coral-usb" in error
    assert not (inside / "never").exists()


def test_a_file_that_only_the_emulator_runs_can_be_looked_into(bundles: dict[str, Bundle]) -> None:
    """Regression: probes of a file for the Ethos-U went to the TOSA reference model, which drops doubled outputs."""
    found = debug(bundles["ethosu55-int8"].path)
    assert [layer.layer for layer in found.layers] == ["stem", "depthwise", "widen", "head"]
    assert found.runtime_b == "litert-reference"


def test_the_first_layer_may_stay_float_beside_an_integer_input(folder: Path) -> None:
    """Regression: the input had no range where only a float layer reads it."""
    bundle = edgeopt.export(
        f"{folder}/nets.py:build",
        target="edgetpu-int8",
        calibration=f"{folder}/nets.py:data",
        output_dir=folder / "first",
        keep_float=["stem"],
        max_accuracy_drop="off",
        min_accelerated="off",
    )
    assert bundle.report.placement is not None
    assert "stem" in {op.layer for op in bundle.report.placement.on_cpu}
    assert bundle.passed
