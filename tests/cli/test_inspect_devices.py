"""`edgeopt inspect` of a bundle that has been on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from edgeopt.bundle import open_bundle
from edgeopt.bundle.manifest import MANIFEST, REPORT
from edgeopt.cli import main
from edgeopt.report_file import to_json
from edgeopt.types import Check, Measurement


def test_what_a_device_told_is_shown(small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    bundle = small_bundle("b", model=helper.make_model(graph).SerializeToString())
    report = open_bundle(bundle).report()
    device = "device:google-pixel-6"
    latency = Measurement("latency_ms", "quantized", 12.3, "ms", "measured-device", device, threads=1)
    golden = Check(f"golden@{device}", 0.4, 0.05, "<=", "fraction", passed=False)
    report = replace(report, measurements=(*report.measurements, latency), checks=(*report.checks, golden))
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    (bundle / REPORT).write_text(to_json(report, digest), encoding="utf-8")
    assert main(["inspect", str(bundle)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Measured on google-pixel-6: 12.3 ms, failed golden@device:google-pixel-6" in shown
