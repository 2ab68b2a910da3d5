"""A device's figures in a bundle's report."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from edgeopt.errors import UsageError
from edgeopt.json_data import Plain
from edgeopt.on_device.merging import merged, runtime_of
from edgeopt.on_device.updating import reserved
from edgeopt.types import Check, Finding, Measurement, Report

HOST = Measurement("latency_ms", "quantized", 1.0, "ms", "measured-host", "litert")
GATE = Check("size_bytes", 5.0, 9.0, "<=", "bytes", passed=True)
REPORT = Report("passed", "net", "android-int8", "litert", (GATE,), (HOST,), (), (), (), {})


def document(name: str = "Google Pixel 6", p50: float | None = 4.0) -> dict[str, Plain]:
    return {
        "schema_version": 1,
        "device": {"name": name, "soc": "Tensor"},
        "settings": {"threads": 2, "cpus": [6, 7]},
        "load_ms": 10.0,
        "first_ms": None,
        "latency_ms": {"runs": 50, "mean": 4.5, "p25": 3.9, "p50": p50, "p75": 4.2, "p90": 5.0},
        "peak_memory_bytes": 2048,
        "checks": [
            {"name": "golden", "measured": None, "limit": 0.05, "op": "<=", "unit": "x", "passed": False},
        ],
        "throttling": ["hot"],
        "not_checked": [],
    }


def test_figures_stand_beside_the_hosts() -> None:
    report = merged(REPORT, document())
    assert report.measurements[0] == HOST
    assert [(m.name, m.value) for m in report.measurements[1:]] == [
        ("latency_ms", 4.0), ("load_ms", 10.0), ("peak_memory_bytes", 2048),
    ]  # fmt: skip
    latency = report.measurements[1]
    assert (latency.provenance, latency.runtime, latency.subject) == (
        "measured-device", "device:google-pixel-6", "quantized",
    )  # fmt: skip
    assert (latency.threads, latency.repetitions, latency.spread) == (2, 50, (3.9, 4.2))
    assert report.checks[0] == GATE
    assert (report.checks[1].name, report.checks[1].passed) == ("golden@device:google-pixel-6", False)
    assert report.findings == (Finding("device-throttled", "device:google-pixel-6", "hot"),)
    assert report.status == "passed"  # the manifest says so, too


def test_a_second_run_replaces_the_first_and_other_devices_stay() -> None:
    once = merged(merged(REPORT, document()), document("Raspberry Pi 5"))
    assert merged(once, document("Raspberry Pi 5")) == once
    runtimes = {m.runtime for m in once.measurements}
    assert runtimes == {"litert", "device:google-pixel-6", "device:raspberry-pi-5"}


def test_the_mean_stands_in_for_a_median_that_nobody_told() -> None:
    assert merged(REPORT, document(p50=None)).measurements[1].value == 4.5


@pytest.mark.parametrize("other", [None, [], {}, {"device": {"name": 3}}])
def test_other_documents_are_refused(other: Plain) -> None:
    with pytest.raises(UsageError):
        merged(REPORT, other)


def test_names_of_devices() -> None:
    assert runtime_of("Google Pixel 6") == "device:google-pixel-6"
    assert runtime_of("©") == "device:unnamed"


def test_one_run_at_a_time(tmp_path: Path) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another 'edgeopt device run'"), reserved(tmp_path):
            pass
    finally:
        os.close(lock)
    with reserved(tmp_path):
        pass
    with pytest.raises(UsageError, match="is not a bundle directory"), reserved(tmp_path / "none"):
        pass
