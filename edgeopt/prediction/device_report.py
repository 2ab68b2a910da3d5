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


@dataclass(frozen=True, slots=True)
class _Model:
    file: str
    sha256: str
    format: Format


@dataclass(frozen=True, slots=True)
class _Settings:
    threads: int


@dataclass(frozen=True, slots=True)
class _Latency:
    p50: float | None = None
    mean: float | None = None


@dataclass(frozen=True, slots=True)
class _Report:
    kind: Literal["edgeopt-device-report"]
    model: _Model
    settings: _Settings
    latency_ms: _Latency
    throttled: bool = False


def read(path: Path, artifact: Path | None = None) -> Measured:
    """One report as a measurement. Its model is `artifact`, or lies in the bundle that the report belongs to.

    Raises:
        UsageError: the file is no such report, it has no latency, the device was throttled, or the model is not there
            or is another one.
    """
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    report = from_plain(_Report, loads(path.read_bytes(), str(path)), str(path))
    if report.throttled:
        raise UsageError("the device was throttled", where=str(path), fix="let it cool down and measure again")
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
        raise UsageError("is not a model file", where=str(path), fix=f"give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    if not 0 < ms < float("inf"):
        raise UsageError("must be more than 0", where="--ms")
    return Measured(path, sha256_of(path), SUFFIXES[path.suffix], threads, ms)


def _beside(path: Path, model: _Model) -> Path:
    name = Path(model.file).name
    for folder in path.resolve().parents[:_LEVELS]:
        if (folder / name).is_file() and sha256_of(folder / name) == model.sha256:
            return folder / name
    raise UsageError(
        f"is about a {name} that does not lie beside it", where=str(path), fix="name the file with --artifact"
    )
