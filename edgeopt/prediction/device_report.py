"""Reading what `device/check` wrote on a device: device_report.json (docs/device-check.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeopt.errors import UsageError
from edgeopt.formats import SUFFIXES
from edgeopt.formats.files import sha256_of
from edgeopt.json_data import from_plain, loads
from edgeopt.prediction.calibration import Measured
from edgeopt.types import Format

#: How far above the report its model may lie: beside it, in the bundle around device/, or around what holds that.
_LEVELS = 3
#: Of the fastest cores' clock. Clusters of big cores are closer to one another, little ones further off.
_ABOUT = 0.8
#: What such a report says it is.
_KIND = "edgeopt-device-report"


@dataclass(frozen=True, slots=True)
class _Model:
    file: str
    sha256: str
    format: Format


@dataclass(frozen=True, slots=True)
class _Settings:
    threads: int
    cpus: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Latency:
    p50: float | None = None
    mean: float | None = None


@dataclass(frozen=True, slots=True)
class _Golden:
    passed: bool | None = None


@dataclass(frozen=True, slots=True)
class _Clock:
    """Cores that share a clock; `most_khz` is the highest that they can have."""

    cpus: tuple[int, ...]
    most_khz: int | None


@dataclass(frozen=True, slots=True)
class _State:
    clocks: tuple[_Clock, ...] = ()


@dataclass(frozen=True, slots=True)
class _Report:
    kind: Literal["edgeopt-device-report"]
    model: _Model
    settings: _Settings
    latency_ms: _Latency
    golden: _Golden = _Golden()
    before: _State = _State()
    throttled: bool = False


def read(path: Path, artifact: Path | None = None) -> Measured:
    """One report as a measurement. Its model is `artifact`, or lies in the bundle that the report belongs to.

    Raises:
        UsageError: the file is no such report, it has no latency, the device was throttled, gave wrong outputs or was
            measured on its slower cores, or the model is not there or is another one.
    """
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    document = loads(path.read_bytes(), str(path))
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        raise UsageError(
            "is no report of a device", where=str(path), fix="give the device_report.json of 'edgeopt device run'"
        )
    report = from_plain(_Report, document, str(path))
    if report.throttled:
        raise UsageError("the device was throttled", where=str(path), fix="let it cool down and measure again")
    if report.golden.passed is False:
        raise UsageError("the model's outputs were wrong there, so its latency tells nothing", where=str(path))
    if not _on_fastest(report):
        raise UsageError(
            "was measured on slower or fewer cores than predictions are for",
            where=str(path),
            fix="measure again without --cpus",
        )
    ms = report.latency_ms.p50 if report.latency_ms.p50 is not None else report.latency_ms.mean
    if ms is None or not 0 < ms < float("inf"):
        raise UsageError("holds no latency", where=str(path))
    if report.settings.threads < 1:
        raise UsageError("holds no number of threads", where=str(path))
    model = artifact if artifact is not None else _beside(path, report.model)
    if sha256_of(model) != report.model.sha256:
        raise UsageError("is not the file that the report is about (SHA-256 differs)", where=str(model))
    return Measured(model, report.model.sha256, report.model.format, report.settings.threads, ms)


def measurement(path: Path, ms: float, threads: int) -> Measured:
    """A figure that the user gives. Raises UsageError where the file is no model file, or the time is none."""
    if path.suffix not in SUFFIXES:
        raise UsageError("is not a model file", where=str(path), fix="give a .tflite, .onnx or .pte file")
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    if not 0 < ms < float("inf"):
        raise UsageError("must be more than 0", where="--ms")
    return Measured(path, sha256_of(path), SUFFIXES[path.suffix], threads, ms)


def _on_fastest(report: _Report) -> bool:
    """Whether the threads ran about as fast as the device's fastest cores; also where the report doesn't tell."""
    if report.settings.cpus is None:
        return True
    clocks = {cpu: clock.most_khz or 0 for clock in report.before.clocks for cpu in clock.cpus}
    used = sorted((clocks.get(cpu, 0) for cpu in report.settings.cpus), reverse=True)[: report.settings.threads]
    best = sorted(clocks.values(), reverse=True)[: report.settings.threads]
    return not any(used) or sum(used) >= _ABOUT * sum(best)


def _beside(path: Path, model: _Model) -> Path:
    name = Path(model.file).name
    for folder in path.resolve().parents[:_LEVELS]:
        if (folder / name).is_file() and sha256_of(folder / name) == model.sha256:
            return folder / name
    raise UsageError(
        f"is about a {name} that does not lie beside it", where=str(path), fix="name the file with --artifact"
    )
