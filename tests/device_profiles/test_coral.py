"""Coral boards, and the target that is for them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from edgeopt.device_profiles import load_device
from edgeopt.exporter import load_exporter
from edgeopt.exporter.litert_edge_tpu import EdgeTpuExporter
from edgeopt.runtimes import load_runtime
from edgeopt.targets import load_target
from edgeopt.types import EdgeTpu

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "latency" / "coral_benchmarks.csv"
LINKS = {
    "coral-usb": "usb3",
    "coral-dev-board": "pcie",
    "coral-dev-board-mini": "usb2",
    "coral-dev-board-micro": "usb2",
}


@pytest.mark.parametrize(("name", "link"), LINKS.items())
def test_every_board_has_one_edge_tpu(name: str, link: str) -> None:
    device = load_device(name)
    npu = device.npu("edge-tpu")
    assert isinstance(npu, EdgeTpu)
    assert (npu.cache_bytes, npu.link) == (8 << 20, link)
    assert "Edge TPU" in device.accelerators
    assert "litert" in device.formats


def test_the_usb_accelerators_title_names_its_host() -> None:
    device = load_device("coral-usb")
    assert device.title.endswith("on a Raspberry Pi 4")
    assert device.clusters == load_device("raspberry-pi-4").clusters
    assert all("desktop PC" in latency.runtime for latency in device.reference_latencies)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"needs {PUBLISHED}")
@pytest.mark.parametrize(
    ("name", "runtime", "column"),
    [
        ("coral-usb", "Edge TPU", "usb_edgetpu_ms"),
        ("coral-dev-board", "Edge TPU", "devboard_edgetpu_ms"),
        ("coral-dev-board", "litert", "embedded_cpu_ms"),
    ],
)
def test_reference_latencies_are_the_published_ones(name: str, runtime: str, column: str) -> None:
    with PUBLISHED.open() as file:
        published = [float(row[column]) for row in csv.DictReader(file)]
    figures = [figure for figure in load_device(name).reference_latencies if figure.runtime.startswith(runtime)]
    assert [figure.ms for figure in figures] == published


def test_the_target_goes_with_its_exporter_runtime_and_device() -> None:
    target = load_target("edgetpu-int8")
    assert isinstance(load_exporter(target.format, target.accelerator), EdgeTpuExporter)
    assert target.scheme.io == "int8"
    assert load_runtime(target.runtimes[0]).emulates is not None
    assert load_device(target.device).npu("edge-tpu") is not None
    assert (target.gates.max_accuracy_drop, target.gates.min_sqnr_db, target.gates.min_accelerated) == (0.01, 10, 0.5)
