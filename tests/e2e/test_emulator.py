"""The installed emulator: its CPUs, and its own check of itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgeopt.emulator import Emulator, all_cores, core_for, cores
from edgeopt.emulator.installation import output_of
from edgeopt.emulator.prefix import features_line

pytestmark = pytest.mark.e2e

#: Feature of ours -> word in /proc/cpuinfo.
WORDS = {"neon": "asimd", "fp16": "asimdhp", "dotprod": "asimddp"}


def test_every_cpu_has_just_the_features_of_its_core(emulator: Emulator) -> None:
    for core in (*all_cores(), core_for("pixel-3"), core_for("galaxy-s24")):
        for hwcaps, cpu in (
            (emulator.manifest.hwcaps, core.qemu),
            (emulator.manifest.hwcaps_counting, core.qemu_counting),
        ):
            words = set(features_line(*hwcaps[cpu]).split())
            known = {WORDS.get(feature, feature) for feature in cores.FEATURES}
            assert words & known == {WORDS.get(feature, feature) for feature in core.features}, (core.name, cpu)


@pytest.mark.parametrize("profile", ["cortex-a53", "pixel-3", "cortex-a76", "galaxy-s23", "galaxy-s24"])
def test_what_programs_are_told_agrees(emulator: Emulator, profile: str) -> None:
    core = core_for(profile)
    for plugin in (None, f"{emulator.counter},out=/dev/null"):
        command = emulator.command(core, [str(emulator.directory / "bin/hwcap")], plugin=plugin)
        hwcap, hwcap2 = (int(word, 16) for word in output_of(command, profile).split())
        prefix = emulator.directory / "prefixes"
        kind = "numerics" if plugin is None else "counting"
        cpuinfo = (prefix / f"{core.name}-{core.level}-{kind}" / "proc/cpuinfo").read_text()
        assert f"Features\t: {features_line(hwcap, hwcap2)}\n" in cpuinfo


def test_the_hosts_libraries_stay_outside(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib/x86_64-linux-gnu")
    command = emulator.command(core_for("cortex-a76"), [str(emulator.directory / "bin/hwcap")])
    assert output_of(command, "hwcap").strip() == "119ffb 0"


def test_doctor_tries_every_runtime_on_every_level(emulator: Emulator) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeopt", "emulator", "doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["works"] is True
    assert len(document["diagnosis"]["trials"]) == 15
    assert {trial["problem"] for trial in document["diagnosis"]["trials"]} == {None}
    assert document["diagnosis"]["directory"] == str(emulator.directory)
    assert document["diagnosis"]["size_bytes"] > 50_000_000
