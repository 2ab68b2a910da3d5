"""Device profiles: the built-in ones, and mistakes in a user's own."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from edgeopt.device_profiles import list_devices, load_device
from edgeopt.device_profiles.channels import channel_multiple
from edgeopt.device_profiles.schema import DeviceProfile
from edgeopt.errors import ConfigError, UsageError
from edgeopt.types import Precision

LATENCY = Path(__file__).parents[2].parent / "shared" / "data" / "latency"

#: Cores of Armv8.0 have neither fp16 arithmetic nor dot products; the newer ones here all have both, but for Pixel 3.
OLD_CORES = {"cortex-a53", "cortex-a72"}


def test_enough_devices_of_every_class() -> None:
    classes = Counter(device.device_class for device in list_devices())
    assert sum(classes.values()) >= 10
    assert set(classes) == {"flagship", "mid-range", "low-end", "board"}
    assert {"raspberry-pi-4", "raspberry-pi-5"} <= {device.name for device in list_devices()}


@pytest.mark.parametrize("device", list_devices(), ids=lambda device: device.name)
def test_builtin_devices_are_plausible(device: DeviceProfile) -> None:
    assert device.sources
    assert (1 if device.device_class == "board" else 4) <= sum(cluster.count for cluster in device.clusters) <= 10
    for cluster in device.clusters:
        features = set(cluster.features)
        if not cluster.core.startswith("cortex-m"):
            assert features & {"neon", "avx2"}
            assert 1000 <= cluster.max_mhz <= 5000
        assert not (cluster.core in OLD_CORES and features & {"fp16", "dotprod", "i8mm", "sve"})
        assert features >= {"dotprod"} or not features & {"i8mm", "sve", "sve2"}
    frequencies = [cluster.max_mhz for cluster in device.clusters]
    assert frequencies == sorted(frequencies, reverse=True)


def test_the_facts_that_decide_about_int8() -> None:
    assert "dotprod" not in load_device("pixel-3").clusters[0].features
    assert "dotprod" in load_device("pixel-4").clusters[0].features
    assert "sve2" in load_device("pixel-8").clusters[0].features
    assert "sve" not in load_device("galaxy-s24-ultra").clusters[0].features


@pytest.mark.skipif(not LATENCY.is_dir(), reason=f"needs {LATENCY}")
def test_reference_latencies_are_the_published_ones() -> None:
    published = set()
    with (LATENCY / "tflite_pixel34_iphone.csv").open() as file:
        for row in csv.DictReader(file):
            precision = "w8a8" if row["model"].endswith("_quant") else "fp32"
            model = row["model"].removesuffix("_quant").removesuffix("_float")
            published.add((row["device"].lower().replace(" ", "-"), model, precision, float(row["cpu_ms"])))
    with (LATENCY / "tflite_hosted_models_pixel3.csv").open() as file:
        for row in csv.DictReader(file):
            precision = {"int8": "w8a8", "fp32": "fp32"}[row["dtype"]]
            published.add(("pixel-3", row["model"], precision, float(row["cpu4_ms"])))
    ours = {
        (device.name, latency.model, latency.precision, latency.ms)
        for device in list_devices()
        if device.name.startswith("pixel")
        for latency in device.reference_latencies
        if not latency.model.startswith("efficientnet-lite")
    }
    assert ours
    assert ours <= published


OWN = """
title = "Mine"
device-class = "board"
soc = "X1"
year = 2024
memory-mb = 1024
formats = ["onnx"]
sources = ["https://example.org/x1"]
[[cluster]]
core = "cortex-a55"
count = 4
max-mhz = 1500
features = ["neon"]
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_own_file(tmp_path: Path) -> None:
    device = load_device(write(tmp_path, OWN))
    assert (device.name, device.accelerators, device.reference_latencies) == ("mine", (), ())
    assert device.clusters[0].count == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            OWN.replace("max-mhz", "mhz"),
            r"cluster\[0\].mhz: unknown key; did you mean 'max-mhz'|cluster\[0\].max-mhz: is",
        ),
        (OWN.replace('["neon"]', '["neon", "dotproduct"]'), r"cluster\[0\].features\[1\]: .*'dotprod'"),
        (OWN.replace("https://example.org/x1", "a friend"), r"sources\[0\]"),
        (OWN.replace("count = 4", "count = 4.0"), r"cluster\[0\].count: .*integer"),
        (OWN[: OWN.index("[[")], r"cluster: is missing"),
        (OWN + "[[reference-latency]]\nmodel = 'm'\nprecison = 'fp32'\n", r"reference-latency\[0\]"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_device(write(tmp_path, text))


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean pixel-3"):
        load_device("pixel3")


@pytest.mark.parametrize(
    ("device", "precision", "multiple"),
    [
        ("pixel-6", "w8a8", 16),
        ("pixel-6", "8da4w", 16),
        ("pixel-6", "fp16", 16),
        ("pixel-6", "fp32", 8),
        ("pixel-6", "w8", 8),
        ("pixel-3", "w8a8", 8),
        ("redmi-6", "fp16", 8),
    ],
)
def test_the_width_step_follows_the_kernels(device: str, precision: Precision, multiple: int) -> None:
    assert channel_multiple(load_device(device), precision) == multiple


def test_the_width_step_of_an_npu_and_of_ones_own(tmp_path: Path) -> None:
    npu = OWN.replace("formats", 'accelerators = ["Arm Ethos-U65"]\nformats')
    assert channel_multiple(load_device(write(tmp_path, npu)), "w8a8") == 16
    own = OWN.replace("formats", "channel-multiple = 4\nformats")
    assert channel_multiple(load_device(write(tmp_path, own)), "w8a8") == 4
    with pytest.raises(ConfigError, match="channel-multiple"):
        load_device(write(tmp_path, own.replace("= 4\nformats", "= 0\nformats")))
