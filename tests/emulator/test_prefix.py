from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeopt.emulator import prefix
from edgeopt.emulator.cores import core_for

A76_HWCAP = 0x119FFB


def test_features_are_what_the_auxiliary_vector_says() -> None:
    line = prefix.features_line(A76_HWCAP, 0).split()
    assert {"fp", "asimd", "asimdhp", "asimddp", "atomics"} <= set(line)
    assert not {"sve", "i8mm", "bf16"} & set(line)
    assert prefix.features_line(0, 1 << 13 | 1 << 14 | 1 << 1) == "sve2 i8mm bf16"


def made(tmp_path: Path, num_cores: int) -> Path:
    (tmp_path / "sysroot/lib").mkdir(parents=True, exist_ok=True)
    (tmp_path / "sysroot/usr").mkdir(exist_ok=True)
    directory = tmp_path / "prefixes/one"
    prefix.make(directory, tmp_path / "sysroot", core_for("cortex-a76"), "fp asimd", num_cores)
    return directory


def test_all_files_agree(tmp_path: Path) -> None:
    directory = made(tmp_path, 4)
    system = directory / "sys/devices/system/cpu"
    assert (system / "possible").read_text() == (system / "present").read_text() == "0-3\n"
    cpuinfo = (directory / "proc/cpuinfo").read_text()
    assert cpuinfo.count("processor\t:") == 4
    assert "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\n" in cpuinfo
    assert (system / "cpu3/regs/identification/midr_el1").read_text() == "0x00000000414fd0b1\n"
    assert (system / "cpu3/topology/core_siblings_list").read_text() == "0-3\n"
    assert (system / "cpu3/cache/index2/size").read_text() == "256K\n"
    assert not (system / "cpu4").exists()


def test_one_core(tmp_path: Path) -> None:
    assert (made(tmp_path, 1) / "sys/devices/system/cpu/online").read_text() == "0\n"


def test_libraries_are_those_of_the_sysroot_wherever_it_moves(tmp_path: Path) -> None:
    made(tmp_path, 1)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert (moved / "prefixes/one/lib").resolve() == moved.resolve() / "sysroot/lib"
    moved.rename(tmp_path)


def test_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: made(tmp_path, 4), range(16)))
    assert [path.name for path in (tmp_path / "prefixes").iterdir()] == ["one"]
