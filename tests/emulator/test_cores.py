from __future__ import annotations

import pytest

from edgeopt.device_profiles import list_devices
from edgeopt.emulator.cores import all_cores, core_for, cpus
from edgeopt.errors import UsageError

#: Cores of devices that are no Arm application cores.
OTHERS = ("cortex-m", "lion-cove", "skymont", "gracemont")


def test_every_arm_core_of_every_device_resolves_to_its_instruction_sets() -> None:
    for device in list_devices():
        for cluster in device.clusters:
            if cluster.core.startswith(OTHERS):
                continue
            core = core_for(f"{device.name}:{cluster.core}")
            assert core.name == cluster.core
            missing = set(cluster.features) - set(core.features)
            assert set(core.features) <= set(cluster.features)
            assert missing <= {"sme"}
            assert not missing or (core.stand_in is not None and "sme" in core.stand_in)


def test_a_device_stands_for_its_fastest_core() -> None:
    assert core_for("pixel-4").name == "cortex-a76"
    assert core_for("galaxy-s23").name == "cortex-x3"


def test_a_core_of_a_device() -> None:
    assert core_for("pixel-4:cortex-a55").name == "cortex-a55"


def test_a_device_decides_what_its_core_can() -> None:
    assert core_for("cortex-a75").features == ("neon", "fp16", "dotprod")
    old = core_for("pixel-3")
    assert (old.name, old.features) == ("cortex-a75", ("neon", "fp16"))
    assert "sve2" in core_for("galaxy-s24").features
    assert "sve2" not in core_for("galaxy-s24-ultra").features


def test_a_core_without_its_later_extensions_is_shown_as_its_first_version() -> None:
    # Kernels take dot products for granted from Cortex-A55 r1p0 on, whatever the feature bits say.
    assert core_for("cortex-a55").midr == 0x412FD050
    assert core_for("pixel-3:cortex-a55").midr == 0x410FD050


def test_only_the_cores_that_qemu_knows_are_no_stand_ins() -> None:
    own = {core.name for core in all_cores() if core.stand_in is None}
    assert own >= {"cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "cortex-a710", "neoverse-n1"}
    assert "cortex-x3" not in own
    assert "Cortex-X3" in (core_for("iphone-15").stand_in or "")


def test_sme_is_off_where_it_computes_wrongly() -> None:
    _, counting = cpus()
    for cpu in counting:
        assert not cpu.startswith("max") or ",sme=off" in cpu


def test_every_cpu_of_a_core_is_tried_at_setup() -> None:
    numerics, counting = cpus()
    for core in (*all_cores(), core_for("pixel-3"), core_for("galaxy-s24")):
        assert core.qemu in numerics
        assert core.qemu_counting in counting


def test_names_are_unique_and_numbers_are_of_arm() -> None:
    cores = all_cores()
    assert len({core.name for core in cores}) == len(cores)
    assert all(core.midr >> 24 == 0x41 and core.midr >> 16 & 0xF == 0xF for core in cores)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("cortex-a7x", "did you mean cortex-a7"),
        ("pixel-44", "did you mean pixel-4"),
        ("pixel-4:cortex-a53", "its cores: cortex-a76, cortex-a55"),
        ("corstone-300", "cortex-m55, which the emulated phone can't be"),
        ("intel-n100", "gracemont, which the emulated phone can't be"),
        ("qqqqqq", "edgeopt emulator doctor"),
        ("", "unknown core or device"),
        ("./nowhere.toml", "no such device file"),
    ],
)
def test_wrong_names(profile: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        core_for(profile)
    assert words in caught.value.line()
