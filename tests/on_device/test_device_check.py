"""The parts of `device/check` that need no device: arithmetic, conditions, programs, the report."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from edgeopt.bundle.templates.device.devicecheck import benchmarks, conditions, figures, programs
from edgeopt.bundle.templates.device.devicecheck.device import Facts
from edgeopt.bundle.templates.device.devicecheck.errors import CheckError
from edgeopt.bundle.templates.device.devicecheck.finding import mismatch
from edgeopt.bundle.templates.device.devicecheck.transport import Reply

if TYPE_CHECKING:
    from edgeopt.bundle.templates.device.devicecheck.contents import Contents, Vector
    from edgeopt.bundle.templates.device.devicecheck.device import Workspace

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
    ("code", "errors", "phrase"),
    [
        (126, "sh: 1: /tmp/edgeopt-1/program: Permission denied", "(noexec); name another --directory"),
        (
            127,
            "/tmp/e/program: error while loading shared libraries: libonnxruntime.so.1: cannot open shared object file",
            "error while loading shared libraries: libonnxruntime.so.1: cannot open shared object file; put the",
        ),
        (127, "env: '/tmp/e/program': No such file or directory", "has not the loader that it was linked for"),
        (127, "sh: 1: /tmp/e/program: not found", "has not the loader that it was linked for"),
        (127, "sh: /tmp/e/program: inaccessible or not found", "has not the loader that it was linked for"),
        (126, "sh: /tmp/e/program: not executable: 64-bit ELF file", "exec format error"),
        (127, "/tmp/e/program: 1: \x7fMZ: not found", "exec format error"),
        (126, "setsid: failed to execute /tmp/e/program: Exec format error", "exec format error"),
        (139, "", "ended by signal 11"),
        (137, "", "out of memory?"),
        (1, "boom\nthe model is broken", "the model is broken"),
    ],
)
def test_why_a_program_fails(code: int, errors: str, phrase: str) -> None:
    assert phrase in programs._reason(Reply(code, b"", errors))


def test_benchmark_models_outputs_are_compared_only_where_it_is_clear_which_is_which() -> None:
    one = SimpleNamespace(size_bytes=4)
    workspace = SimpleNamespace(
        path="/w", get=lambda _: b"abcd", device=SimpleNamespace(call=lambda *_: Reply(0, b"- 4", ""))
    )
    program = benchmarks.LiteRTBenchmark(
        cast("Contents", None), cast("Workspace", workspace), "/w/model", 1, "/bin/benchmark_model"
    )
    assert program._outputs(cast("Vector", SimpleNamespace(inputs=(one,), outputs=(one,)))) == (b"abcd",)
    assert program._outputs(cast("Vector", SimpleNamespace(inputs=(one,), outputs=(one, one)))) is None
    assert program._outputs(cast("Vector", SimpleNamespace(inputs=(one, one), outputs=(one,)))) is None


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
