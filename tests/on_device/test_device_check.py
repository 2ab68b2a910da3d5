"""The parts of `device/check` that need no device: arithmetic, conditions, programs, what adb says, the shell part."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from edgeopt.bundle.templates.device import devicecheck
from edgeopt.bundle.templates.device.devicecheck import benchmarks, conditions, figures
from edgeopt.bundle.templates.device.devicecheck.device import Device, Facts, Workspace
from edgeopt.bundle.templates.device.devicecheck.errors import CheckError
from edgeopt.bundle.templates.device.devicecheck.programs import mismatch
from edgeopt.bundle.templates.device.devicecheck.transport import Adb, connect, hostname

SCRIPT = Path(devicecheck.__file__).parent / "on_device.sh"
STATE = """\
policy|0 1 2 3|schedutil|300000|1800000|1800000
policy|4 5|schedutil|400000|2250000|2250000
policy|6 7|schedutil|500000|2800000|2800000
cpu|0||250
cpu|1|1|250
cpu|2|1|250
cpu|3|1|250
cpu|4|1|620
cpu|5|1|620
cpu|6|1|1024
cpu|7|0|1024
zone|BIG|41250
zone|usb-skin|0
zone|broken|-274000
cooler|thermal-cpufreq-2|0
cooler|backlight|7
thermal_status|0
dumpsys_battery|level|87
dumpsys_battery|temperature|291
dumpsys_battery|status|2
"""


def test_decode_is_little_endian() -> None:
    assert figures.decode(struct.pack("<2f", 1.5, -2.0), "float32") == (1.5, -2.0)
    assert figures.decode(struct.pack("<e", 0.5), "float16") == (0.5,)
    assert figures.decode(b"\xff\x80", "int8") == (-1, -128)
    with pytest.raises(ValueError, match="3 bytes are no array of float32"):
        figures.decode(b"abc", "float32")


@pytest.mark.parametrize(
    ("found", "golden", "expected"),
    [
        ([1.0, 3.0], [1.0, 3.0], 0.0),
        ([1.0, 2.0], [1.0, 3.0], 0.5),
        ([1.0], [2.0], 0.5),  # one value has no range: its own size counts
        ([1.0], [0.0], 1.0),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([0.0], [0.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_deviation(found: list[float], golden: list[float], expected: float) -> None:
    assert figures.deviation(found, golden) == expected


def test_quantile_is_numpys() -> None:
    import numpy as np

    values = [5.0, 1.0, 4.0, 2.0, 8.0]
    for fraction in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert figures.quantile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)))


def test_slowing_down_is_told_from_noise() -> None:
    noise = random.Random(0)
    steady = [10 + noise.gauss(0, 0.3) for _ in range(100)]
    outliers = [*steady[:95], *[50.0] * 5]
    heating = [value * (1 + k / 300) for k, value in enumerate(steady)]
    assert figures.slowed_down(steady) is False
    assert figures.slowed_down(outliers) is False
    assert figures.slowed_down(heating) is True
    assert figures.slowed_down(heating[::-1]) is False
    assert figures.slowed_down(steady[:10]) is None


def test_state_is_read() -> None:
    state = conditions.parse(STATE)
    assert state.cpus == (0, 1, 2, 3, 4, 5, 6)  # 7 is offline
    assert state.temperatures_c == (("BIG", 41.25),)
    assert state.coolers == (("thermal-cpufreq-2", 0),)
    assert state.battery == conditions.Battery(87, 29.1, charging=True)


@pytest.mark.parametrize(
    ("wanted", "threads", "expected"),
    [
        ("big", 1, (6,)),
        ("big", 3, (4, 5, 6)),
        ("little", 4, (0, 1, 2, 3)),
        ("all", 4, ()),
        ("0-2,5", 1, (0, 1, 2, 5)),
    ],
)
def test_choosing_cpus(wanted: str, threads: int, expected: tuple[int, ...]) -> None:
    assert conditions.choose_cpus(wanted, conditions.parse(STATE), threads) == expected


@pytest.mark.parametrize("wanted", ["7", "0-9", "fast", "1-"])
def test_cpus_that_are_not_there(wanted: str) -> None:
    with pytest.raises(CheckError) as caught:
        conditions.choose_cpus(wanted, conditions.parse(STATE), 1)
    assert caught.value.code == 2


def test_mask() -> None:
    assert conditions.mask((4, 5, 6, 7)) == "f0"
    assert conditions.mask(()) == ""


def test_throttling_has_reasons() -> None:
    before = conditions.parse(STATE)
    hot = STATE.replace("500000|2800000|", "500000|1900000|").replace("thermal_status|0", "thermal_status|3")
    after = conditions.parse(hot.replace("thermal-cpufreq-2|0", "thermal-cpufreq-2|4"))
    assert conditions.throttling(before, before, [1.0] * 40) == ()
    assert conditions.throttling(before, after, [1.0] * 20 + [2.0] * 20) == (
        "the clock of CPU 6,7 was capped from 2800000 to 1900000 kHz",
        "Android's thermal status is 3",
        "the cooler thermal-cpufreq-2 went up to 4",
        "runs became slower, from 1 to 2 ms",
    )
    assert len(conditions.capped(after)) == 1


PHONE = Facts("android", "", "", "arm64-v8a", "aarch64", "Google", "Pixel 6", "", False, None, None, 0, frozenset())
BOARD = replace(PHONE, os="linux", abi="aarch64")


def elf(machine: int, loader: bytes | None) -> bytes:
    """The head of a 64-bit little-endian program."""
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<H", header, 18, machine)
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1 if loader else 0)
    if loader is None:
        return bytes(header)
    segment = bytearray(56)
    struct.pack_into("<I", segment, 0, 3)
    struct.pack_into("<Q", segment, 8, 120)
    struct.pack_into("<Q", segment, 32, len(loader) + 1)
    return bytes(header + segment) + loader + b"\0"


@pytest.mark.parametrize(
    ("content", "facts", "problem"),
    [
        (elf(183, b"/system/bin/linker64"), PHONE, None),
        (elf(183, b"/lib/ld-linux-aarch64.so.1"), PHONE, "is built for Linux, the device runs android"),
        (elf(183, b"/lib/ld-linux-aarch64.so.1"), BOARD, None),
        (elf(183, b"/system/bin/linker64"), BOARD, "is built for Android, the device runs linux"),
        (elf(183, None), PHONE, None),  # a static program runs on both
        (elf(62, b"/lib64/ld-linux-x86-64.so.2"), BOARD, "is built for x86_64, the device is aarch64"),
        (b"#!/bin/sh\n", PHONE, None),
        (b"\x7fELF", PHONE, None),
    ],
)
def test_programs_for_other_devices_are_refused(
    tmp_path: Path, content: bytes, facts: Facts, problem: str | None
) -> None:
    (tmp_path / "program").write_bytes(content)
    assert mismatch(tmp_path / "program", facts) == problem


def test_benchmark_models_statistics() -> None:
    text = "count=50 first=5100 curr=5050 min=5000 max=5200 avg=5060.5 std=30 p5=5001 median=5055 p95=5190\n"
    assert benchmarks._micro_summary(text, [1000.0, 6000.0, 5100.0, 5060.5]) == {
        "mean": 5.0605, "min": 5.0, "max": 5.2, "p50": 5.055,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("listing", "serial", "code", "phrase"),
    [
        ("", None, 3, "no device is attached"),
        ("A\tdevice\nB\tdevice\n", None, 2, "choose one with --adb A or B"),
        ("A\tunauthorized\n", None, 3, "has not authorized this computer"),
        ("A\toffline\n", "A", 3, "is offline"),
        ("A\tno permissions (user in plugdev group); see [http://x]\n", "A", 3, "udev"),
        ("A\trecovery\n", "A", 3, "in the state 'recovery'"),
        ("A\tdevice\n", "10.0.0.2:5555", 3, "adb connect 10.0.0.2:5555"),
    ],
)
def test_what_adb_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, serial: str | None, code: int, phrase: str
) -> None:
    (tmp_path / "listing").write_text(f"List of devices attached\n{listing}\n")
    (tmp_path / "adb").write_text(f"#!/bin/sh\ncat {tmp_path}/listing\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CheckError, match=phrase.replace("(", r"\(")) as caught:
        Adb(serial, None)
    assert caught.value.code == code


def test_no_adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckError, match="adb is not installed") as caught:
        connect(None, None, None, None)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("lease", "stale"),
    [
        ("1300 {host} {us}", False),
        ("900 {host} {us}", True),  # ran out
        ("1300 {host} 99999999", True),  # its process is gone
        ("1300 elsewhere 99999999", False),
        ("900 elsewhere 1", True),
        ("9999999 elsewhere 1", True),  # from a clock that was wrong
        ("", True),
        ("garbage", True),
    ],
)
def test_what_crashed_checks_left(lease: str, stale: bool) -> None:
    device = cast("Device", SimpleNamespace(transport=SimpleNamespace(base="/tmp")))
    workspace = Workspace(device, replace(PHONE, now=1000))
    assert workspace._is_stale(lease.format(host=hostname(), us=os.getpid())) is stale


@pytest.mark.parametrize(
    ("adb", "ssh", "directory"), [("A", "host", None), (None, "-oProxyCommand=x", None), (None, "host", "tmp; rm")]
)
def test_wrong_use_of_connections(adb: str | None, ssh: str | None, directory: str | None) -> None:
    with pytest.raises(CheckError) as caught:
        connect(adb, ssh, directory, None)
    assert caught.value.code == 2


SHELLS = [shell for name in ("dash", "bash", "mksh", "busybox") if (shell := shutil.which(name)) is not None]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_part(shell: str, tmp_path: Path) -> None:
    """What it makes, runs and removes; `remove` takes nothing but its own directories."""
    words = [shell, "sh"] if shell.endswith("busybox") else [shell]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, "-s", "--", *arguments], input=SCRIPT.read_text(), text=True, capture_output=True, timeout=20
        )

    directory = tmp_path / "edgeopt-0123abcd"
    assert call("create", str(directory), "99 host 1").returncode == 0
    assert call("create", str(directory), "99 host 1").returncode != 0
    assert call("leases", str(tmp_path)).stdout == f"{directory}|99 host 1\n"
    done = call("execute", str(directory), "5", "", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    late = call("execute", str(directory), "1", "", "sh", "-c", "sleep 30 & wait")
    assert late.returncode == 124
    assert "os=linux\n" in call("facts", str(tmp_path)).stdout
    assert call("digest", str(directory / "lease")).stdout.split()[1] == "10"
    for other in (tmp_path, tmp_path / "edgeopt-0123abcd/..", tmp_path / "edgeopt-1"):
        other.mkdir(exist_ok=True)
        assert call("remove", str(other)).returncode != 0
    assert call("remove", str(directory)).returncode == 0
    assert not directory.exists()


def test_the_report_is_the_documented_one() -> None:
    """Every key that docs/device-check.md names is written, and the other way round."""
    from edgeopt.bundle.templates.device.devicecheck import report
    from edgeopt.bundle.templates.device.devicecheck.check import Result, Settings
    from edgeopt.bundle.templates.device.devicecheck.contents import Contents
    from edgeopt.bundle.templates.device.devicecheck.programs import Figures

    state = conditions.parse(STATE)
    model = Path(__file__)
    contents = Contents("net", "t", "p", "onnx", "fp32", model, "0" * 64, "1" * 64, (), 0.1, 2.0, None)
    timing = Figures(1.0, 2.0, (3.0, 4.0, 5.0), {}, 1024, None)
    result = Result(
        contents, "adb", PHONE, "edgeopt-runner", None, Settings(), (6,), 5, (), timing, state, state, (), 1.0
    )
    document = report.document(result)
    text = (Path(__file__).parents[2] / "docs/device-check.md").read_text()
    assert all(f"`{key}`" in text for key in document), [key for key in document if f"`{key}`" not in text]
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["status"] == "failed"  # 4 ms, and 2 are allowed
    assert report.exit_code(document) == 1
    assert "FAILED: latency_ms is 4 ms, the limit is 2.0" in report.lines(document, result)
