"""The installed emulator; installs it first where it is not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgeopt import emulator
from edgeopt.emulator import cores
from edgeopt.emulator.home import unsupported
from edgeopt.emulator.installation import Emulator, output_of
from edgeopt.emulator.prefix import features_line
from edgeopt.errors import EdgeoptError

pytestmark = pytest.mark.e2e

#: Feature of ours -> word in /proc/cpuinfo.
WORDS = {"neon": "asimd", "fp16": "asimdhp", "dotprod": "asimddp"}


@pytest.fixture(scope="module")
def phone() -> Emulator:
    problem = unsupported()
    if problem is not None:
        pytest.skip(problem)
    try:
        return emulator.setup()
    except EdgeoptError as error:
        if "can't be downloaded" in error.line() or "pip can't download" in error.line():
            pytest.skip(error.line())
        raise


def test_every_cpu_has_just_the_features_of_its_core(phone: Emulator) -> None:
    for core in (*emulator.all_cores(), emulator.core_for("pixel-3"), emulator.core_for("galaxy-s24")):
        for hwcaps, cpu in (
            (phone.manifest.hwcaps, core.qemu),
            (phone.manifest.hwcaps_counting, core.qemu_counting),
        ):
            words = set(features_line(*hwcaps[cpu]).split())
            known = {WORDS.get(feature, feature) for feature in cores.FEATURES}
            assert words & known == {WORDS.get(feature, feature) for feature in core.features}, (core.name, cpu)


@pytest.mark.parametrize("profile", ["cortex-a53", "pixel-3", "cortex-a76", "galaxy-s23", "galaxy-s24"])
def test_what_programs_are_told_agrees(phone: Emulator, profile: str) -> None:
    core = emulator.core_for(profile)
    for plugin in (None, f"{phone.counter},out=/dev/null"):
        command = phone.command(core, [str(phone.directory / "bin/hwcap")], plugin=plugin)
        hwcap, hwcap2 = (int(word, 16) for word in output_of(command, profile).split())
        prefix = phone.directory / "prefixes"
        kind = "numerics" if plugin is None else "counting"
        cpuinfo = (prefix / f"{core.name}-{core.level}-{kind}" / "proc/cpuinfo").read_text()
        assert f"Features\t: {features_line(hwcap, hwcap2)}\n" in cpuinfo


def test_the_hosts_libraries_stay_outside(phone: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib/x86_64-linux-gnu")
    command = phone.command(emulator.core_for("cortex-a76"), [str(phone.directory / "bin/hwcap")])
    assert output_of(command, "hwcap").strip() == "119ffb 0"


def test_doctor_tries_every_runtime_on_every_level(phone: Emulator) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeopt", "emulator", "doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["works"] is True
    assert len(document["diagnosis"]["trials"]) == 15
    assert {trial["problem"] for trial in document["diagnosis"]["trials"]} == {None}
    assert document["diagnosis"]["directory"] == str(phone.directory)
    assert document["diagnosis"]["size_bytes"] > 50_000_000
