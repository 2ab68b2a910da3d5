"""Cores that the latency model knows, beside those of the device profiles and of the emulated phone."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edgeopt import prediction
from edgeopt.device_profiles import list_devices, load_device
from edgeopt.device_profiles.schema import CoreCluster
from edgeopt.emulator.cores import all_cores
from edgeopt.errors import UsageError
from edgeopt.prediction.machine import machine

#: Of microcontrollers and PCs: neither predicted nor emulated.
OTHERS = ("cortex-m", "gracemont", "lion-cove", "skymont")
KNOWN: set[str] = set(tomllib.loads(Path(prediction.__file__).with_name("cores.toml").read_text())["cores"])
EMULATED = {core.name: core for core in all_cores()}
CLUSTERS = [
    pytest.param(cluster, id=f"{device.name}-{cluster.core}")
    for device in list_devices()
    for cluster in device.clusters
]


def test_what_is_emulated_is_predicted() -> None:
    assert EMULATED.keys() <= KNOWN


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_profiles_name_cores_of_both_tables(cluster: CoreCluster) -> None:
    if cluster.core.startswith(OTHERS):
        assert cluster.core not in KNOWN
        assert cluster.core not in EMULATED
        return
    assert cluster.core in KNOWN
    assert cluster.core in EMULATED
    # What decides about int8 kernels; SVE is left out where a phone hides it.
    own, emulated = set(cluster.features), set(EMULATED[cluster.core].features)
    assert own & {"neon"} == emulated & {"neon"}
    assert own - {"sve", "sve2", "sme"} <= emulated


def test_an_unknown_core_is_named(tmp_path: Path) -> None:
    text = """title = "Z"
device-class = "board"
soc = "Z"
year = 2024
memory-mb = 1024
formats = ["litert"]
sources = ["https://example.org"]
[[cluster]]
core = "krait"
count = 2
max-mhz = 1000
features = ["neon"]
"""
    (tmp_path / "z.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        machine(load_device(str(tmp_path / "z.toml")), 1)
    line = caught.value.line()
    assert line.startswith("device 'z': the latency model knows nothing about the core krait; measure")
    assert len(line) < 160
