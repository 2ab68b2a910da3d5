"""What a device told, beside what host and emulator did, in one report."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from edgeopt.errors import UsageError
from edgeopt.json_data import Plain, from_plain
from edgeopt.types import DEVICE, Check, Finding, Measurement, Report

#: Codes of the findings that come from a device.
_THROTTLED, _NOT_CHECKED = "device-throttled", "device-not-checked"


@dataclass(frozen=True, slots=True)
class _Latency:
    runs: int | None
    p25: float | None
    p50: float | None
    p75: float | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class _Check:
    name: str
    measured: float | None
    limit: float
    op: Literal["<=", ">="]
    unit: str
    passed: bool


@dataclass(frozen=True, slots=True)
class _Device:
    name: str


@dataclass(frozen=True, slots=True)
class _Settings:
    threads: int


@dataclass(frozen=True, slots=True)
class _NotChecked:
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class _DeviceReport:
    """The part of device_report.json that goes into report.json."""

    device: _Device
    settings: _Settings
    load_ms: float | None
    first_ms: float | None
    latency_ms: _Latency
    peak_memory_bytes: int | None
    checks: tuple[_Check, ...]
    throttling: tuple[str, ...]
    not_checked: tuple[_NotChecked, ...]


def runtime_of(device: str) -> str:
    """ "Google Pixel 6" -> "device:google-pixel-6"."""
    return DEVICE + (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unnamed")


def merged(report: Report, document: Plain) -> Report:
    """The report with what was measured on a device, in place of what the same device told before.

    The report's status stays that of the export, which the manifest repeats: a check that failed on a device stands in
    the report as such. Raises UsageError where `document` is no report of a device.
    """
    if not isinstance(document, dict):
        raise UsageError("is not the report of a device", where="device_report.json")
    names = _DeviceReport.__dataclass_fields__
    told = from_plain(_DeviceReport, {key: document[key] for key in names if key in document}, "device_report.json")
    runtime = runtime_of(told.device.name)
    return replace(
        report,
        checks=(
            *(check for check in report.checks if not check.name.endswith(f"@{runtime}")),
            *(_check(check, runtime) for check in told.checks),
        ),
        measurements=(
            *(measurement for measurement in report.measurements if measurement.runtime != runtime),
            *_measurements(told, runtime, _subject(report)),
        ),
        findings=(
            *(finding for finding in report.findings if finding.where != runtime),
            *(Finding(_THROTTLED, runtime, reason) for reason in told.throttling),
            *(Finding(_NOT_CHECKED, runtime, f"{item.what}: {item.why}") for item in told.not_checked),
        ),
    )


def _check(check: _Check, runtime: str) -> Check:
    return Check(f"{check.name}@{runtime}", check.measured, check.limit, check.op, check.unit, check.passed)


def _subject(report: Report) -> str:
    """What the report calls the shipped file: an fp32 one is its own float twin."""
    return "quantized" if any(m.subject == "quantized" for m in report.measurements) else "float"


def _measurements(told: _DeviceReport, runtime: str, subject: str) -> tuple[Measurement, ...]:
    latency = told.latency_ms
    spread = (latency.p25, latency.p75) if latency.p25 is not None and latency.p75 is not None else None

    def measured(name: str, value: float | None, unit: str) -> tuple[Measurement, ...]:
        if value is None:
            return ()
        one = Measurement(name, subject, value, unit, "measured-device", runtime, threads=told.settings.threads)
        return (replace(one, repetitions=latency.runs, spread=spread) if name == "latency_ms" else one,)

    return (
        *measured("latency_ms", latency.p50 if latency.p50 is not None else latency.mean, "ms"),
        *measured("first_ms", told.first_ms, "ms"),
        *measured("load_ms", told.load_ms, "ms"),
        *measured("peak_memory_bytes", told.peak_memory_bytes, "bytes"),
    )
