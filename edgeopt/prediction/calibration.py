"""Figures that the user measured on a device, kept in a file of the user's, and the factors that follow from them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from edgeopt.device_profiles.schema import DeviceProfile
from edgeopt.errors import UsageError
from edgeopt.prediction.calibration_fit import Share, factors, share
from edgeopt.prediction.count import count
from edgeopt.prediction.machine import machine
from edgeopt.prediction.model import Parameters, demand, milliseconds
from edgeopt.prediction.parameters import load
from edgeopt.prediction.refusal import refuse_unknown, refuse_unsupported
from edgeopt.toml_data import Form, parse, read_toml
from edgeopt.types import Format

#: Share of the time that starting operators may take, which the two factors leave alone. A figure beyond it would
#: hardly move them, and make the interval narrower all the same.
_MOST_START = 0.5


class _FigureForm(Form):
    file: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    format: Format
    threads: int = Field(gt=0)
    measured_ms: float = Field(gt=0)
    compute_ms: float = Field(ge=0)
    memory_ms: float = Field(ge=0)
    start_ms: float = Field(ge=0)


class _CalibrationForm(Form):
    device: str
    model: str
    figure: list[_FigureForm] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Figure:
    """A median of warm inferences on the device, beside what the model said before any calibration."""

    file: str
    sha256: str
    format: Format
    threads: int
    share: Share


@dataclass(frozen=True, slots=True)
class Calibration:
    """All figures of one device. `factors`: on the time of computing and of moving data."""

    path: Path
    figures: tuple[Figure, ...]
    factors: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement to calibrate with: median milliseconds of a file on so many threads."""

    path: Path
    sha256: str
    format: Format
    threads: int
    ms: float


def directory() -> Path:
    """Where calibrations are kept: `$EDGEOPT_HOME/devices`, else `~/.config/edgeopt/devices`."""
    home = os.environ.get("EDGEOPT_HOME")
    return (Path(home) if home else Path.home() / ".config" / "edgeopt") / "devices"


def find(device: DeviceProfile) -> Calibration | None:
    """The user's calibration of a device; None where there is none.

    Raises:
        ConfigError: its file has a mistake.
        UsageError: it was made with another latency model, that of another version of edgeopt.
    """
    path = directory() / f"{device.name}.toml"
    if not path.is_file():
        return None
    form = parse(_CalibrationForm, read_toml(path), path)
    if form.model != load().digest:
        raise UsageError(
            "was made with another version of the latency model",
            where=str(path),
            fix=f"`edgeopt devices calibrate {device.name} --forget`, then calibrate again",
        )
    return _calibration(
        path,
        [
            Figure(f.file, f.sha256, f.format, f.threads, Share(f.compute_ms, f.memory_ms, f.start_ms, f.measured_ms))
            for f in form.figure
        ],
    )


def calibrate(device: DeviceProfile, measured: Sequence[Measured]) -> Calibration:
    """Add figures to a device's calibration and write it. A figure of the same file and threads takes the old one's
    place. Raises UsageError where the model can't tell anything of a file or the device, or a file not of its speed."""
    model = load()
    known = find(device)
    figures = {(f.sha256, f.format, f.threads): f for f in (known.figures if known is not None else ())}
    for one in measured:
        figures[one.sha256, one.format, one.threads] = Figure(
            one.path.name, one.sha256, one.format, one.threads, _shared(one, device, model.parameters)
        )
    calibration = _calibration(directory() / f"{device.name}.toml", list(figures.values()))
    _write(calibration, device.name, model.digest)
    return calibration


def _shared(one: Measured, device: DeviceProfile, parameters: Parameters) -> Share:
    where = str(one.path)
    work = count(one.path, one.format)
    refuse_unsupported(work, where)
    asked = demand(work.ops, machine(device, one.threads))
    refuse_unknown(work, milliseconds(asked, parameters), where)
    own = share(asked, parameters, one.ms)
    if own.start_ms > _MOST_START * own.predicted_ms:
        raise UsageError(
            "is too small to tell how fast the device is: it mostly starts operators",
            where=where,
            fix="calibrate with a larger network",
        )
    return own


def forget(device: DeviceProfile) -> bool:
    """Remove a device's calibration; whether there was one."""
    path = directory() / f"{device.name}.toml"
    existed = path.is_file()
    path.unlink(missing_ok=True)
    return existed


def _calibration(path: Path, figures: Sequence[Figure]) -> Calibration:
    return Calibration(path, tuple(figures), factors([figure.share for figure in figures]))


def _write(calibration: Calibration, device: str, model: str) -> None:
    lines = [
        "# Written by `edgeopt devices calibrate`: figures measured on this device, which `edgeopt predict` uses.",
        f'device = "{device}"',
        f'model = "{model}"',
    ]
    for figure in calibration.figures:
        own = figure.share
        lines += [
            "",
            "[[figure]]",
            f"file = {_quoted(figure.file)}",
            f'sha256 = "{figure.sha256}"',
            f'format = "{figure.format}"',
            f"threads = {figure.threads}",
            f"measured-ms = {own.measured_ms!r}",
            f"compute-ms = {own.compute_ms!r}",
            f"memory-ms = {own.memory_ms!r}",
            f"start-ms = {own.start_ms!r}",
        ]
    calibration.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=calibration.path.parent, delete=False, encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    Path(file.name).replace(calibration.path)


def _quoted(text: str) -> str:
    """As a TOML basic string."""
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return f'"{escaped}"'
