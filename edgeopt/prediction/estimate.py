"""From the work of a file to milliseconds on a device, with an interval, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeopt.device_profiles.schema import DeviceProfile
from edgeopt.errors import UsageError
from edgeopt.prediction.calibration import Calibration
from edgeopt.prediction.count import count
from edgeopt.prediction.machine import Machine, machine
from edgeopt.prediction.model import LIMITS, Parameters, demand, milliseconds, parts
from edgeopt.prediction.parameters import LatencyModel, load
from edgeopt.prediction.refusal import refuse_unknown, refuse_unsupported
from edgeopt.prediction.work import FileWork, OpWork
from edgeopt.types import Finding, Format, Measurement

#: Standard deviations of logarithms that are assumed, not measured, for what no published figure tells.
_CORE, _ARITHMETIC, _RUNTIME, _NETWORK, _LITTLE = 0.25, 0.3, 0.2, 0.3, 0.2
#: From a standard deviation to the half-width that holds 90 %.
_NINETY = 1.645
_MANY = 3
_UNSEEN_ARITHMETIC = {"matrix-i8mm": "int8 matrix instructions (i8mm)", "matrix-fp16": "fp16 arithmetic"}
_RUNTIMES: Mapping[Format, str] = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}


@dataclass(frozen=True, slots=True)
class OpEstimate:
    """Estimated time of one operator per inference, and what limits it: "compute", "memory" or "dispatch"."""

    name: str
    type: str
    ms: float
    limit: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one inference of a file is expected to take on a device's CPU, warm.

    Attributes:
        low, high: the interval that holds `coverage` of figures that the fit did not see, in milliseconds; wider where
            an assumption stands in for figures (see `findings`).
        basis: one sentence: what the estimate rests on.
        limits: share of the time by what limits the operators.
        ops: in file order, those that take no time left out.
        figures: published ones of this device that the model was fitted to. calibration: the user's own; 0 for none.
    """

    device: str
    format: Format
    threads: int
    ms: float
    low: float
    high: float
    coverage: float
    basis: str
    limits: Mapping[str, float]
    ops: tuple[OpEstimate, ...]
    findings: tuple[Finding, ...]
    macs: int
    figures: int
    calibration: int

    def slowest(self, number: int) -> tuple[OpEstimate, ...]:
        return tuple(sorted(self.ops, key=lambda op: (-op.ms, op.name))[:number])

    def measurements(self, subject: str = "quantized") -> tuple[Measurement, ...]:
        """The figure for a report. Its spread is the interval, not quartiles."""
        return (
            Measurement(
                name="predicted_latency_ms",
                subject=subject,
                value=self.ms,
                unit="ms",
                provenance="estimated",
                runtime=f"{self.format} on {self.device}",
                threads=self.threads,
                spread=(self.low, self.high),
            ),
        )


def predict(
    path: Path, format_: Format, device: DeviceProfile, threads: int, calibration: Calibration | None = None
) -> Prediction:
    """Estimate one inference on the CPU of `device`, from the file alone.

    Args:
        calibration: figures that were measured on this device; see `edgeopt.prediction.calibration.find`.

    Raises:
        UsageError: nothing can be told: the file is corrupt, of a format or with operators that the model does not
            know, the device takes no such files, or its cores are unknown.
    """
    return estimate(count(path, format_), str(path), format_, device, threads, calibration)


def estimate(
    work: FileWork,
    where: str,
    format_: Format,
    device: DeviceProfile,
    threads: int,
    calibration: Calibration | None = None,
) -> Prediction:
    """As `predict`, of work that was counted before; `where` names its file in errors."""
    refuse_unsupported(work, where)
    if format_ not in device.formats:
        raise UsageError(f"takes no {format_} files", where=f"device {device.name!r}")
    model = load()
    on = machine(device, threads)
    parameters = _parameters(model, device, calibration)
    asked = demand(work.ops, on)
    times = milliseconds(asked, parameters)
    refuse_unknown(work, times, where)
    total = float(times.sum())
    ops = _operators(work.ops, times, np.stack(parts(asked, parameters)))
    doubts = list(_doubts(work, on, format_, model, times, calibration))
    base = model.widths[_known(model, device, calibration)]
    width = math.hypot(base, *(_NINETY * sd for sd, _ in doubts))
    return Prediction(
        device=device.name,
        format=format_,
        threads=threads,
        ms=total,
        low=total * math.exp(-width),
        high=total * math.exp(width),
        coverage=model.coverage,
        basis=_basis(model, device, calibration),
        limits={limit: sum(op.ms for op in ops if op.limit == limit) / total for limit in LIMITS},
        ops=ops,
        findings=(*(finding for _, finding in doubts), *_notes(work, model, device, threads, on)),
        macs=work.macs,
        figures=model.published.get(device.name, 0),
        calibration=0 if calibration is None else len(calibration.figures),
    )


def _parameters(model: LatencyModel, device: DeviceProfile, calibration: Calibration | None) -> Parameters:
    if calibration is None:
        return model.parameters
    own = model.parameters.device.get(device.name, (1.0, 1.0))
    compute, memory = calibration.factors
    return replace(model.parameters, device={device.name: (own[0] * compute, own[1] * memory)})


def _operators(
    works: tuple[OpWork, ...],
    times: np.ndarray[tuple[int], np.dtype[np.float64]],
    terms: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> tuple[OpEstimate, ...]:
    limits = terms.argmax(axis=0)
    rows = zip(works, times, limits, strict=True)
    return tuple(OpEstimate(op.name, op.type, float(ms), LIMITS[limit]) for op, ms, limit in rows if ms > 0)


def _known(model: LatencyModel, device: DeviceProfile, calibration: Calibration | None) -> str:
    if calibration is not None:
        return "calibrated-3" if len(calibration.figures) >= _MANY else "calibrated-1"
    return "published" if device.name in model.published else "unseen"


def _doubts(
    work: FileWork,
    on: Machine,
    format_: Format,
    model: LatencyModel,
    times: np.ndarray[tuple[int], np.dtype[np.float64]],
    calibration: Calibration | None,
) -> Iterator[tuple[float, Finding]]:
    """What no published figure tells, each with the standard deviation that it adds."""
    core, total = on.fastest, float(times.sum()) or 1.0
    if core.kind not in model.parameters.core and calibration is None:
        yield _CORE, Finding("no-figure-of-core", core.name, f"no published figure is of a core like {core.name}")
    shares: dict[str, float] = {}
    for op, ms in zip(work.ops, times, strict=True):
        key = core.efficiency_key(op.arithmetic, op.kind)
        shares[key] = shares.get(key, 0.0) + float(ms) / total
    for key, what in _UNSEEN_ARITHMETIC.items():
        if shares.get(key, 0.0) > 0.2 and calibration is None:
            yield _ARITHMETIC, Finding("no-figure-of-arithmetic", core.name, f"no published figure uses {what}")
    if format_ in _RUNTIMES and (calibration is None or format_ not in {f.format for f in calibration.figures}):
        text = f"the figures are of LiteRT; {_RUNTIMES[format_]} is taken to be as fast"
        yield _RUNTIME, Finding("other-runtime", format_, text)
    convolutions = sum(float(ms) for op, ms in zip(work.ops, times, strict=True) if op.kind in ("conv", "depthwise"))
    if convolutions < total / 2:
        text = "the figures are of convolutional networks, and most of this one is something else"
        yield _NETWORK, Finding("other-network", "", text)
    if len({c.kind for c in on.cores}) > 1:
        text = "the figures are of cores of one kind working together; fewer threads may well be faster"
        yield _LITTLE, Finding("mixed-cores", on.name, text)


def _notes(work: FileWork, model: LatencyModel, device: DeviceProfile, threads: int, on: Machine) -> Iterator[Finding]:
    unknown = sorted({op.type for op in work.ops if op.kind == "unknown"})
    if unknown:
        yield Finding("unknown-operators", ", ".join(unknown), "counted as if they only moved their values")
    for tensor in work.assumed:
        yield Finding("dynamic-shape", tensor, "the estimate is for this size")
    if threads > on.threads:
        yield Finding("few-cores", device.name, f"has {on.threads} cores, so {threads} threads share them")
    if device.accelerators:
        yield Finding("cpu-only", device.name, f"the CPU alone; nothing is said of {', '.join(device.accelerators)}")
    old, own = model.of_old_kernels.get(device.name, 0), model.published.get(device.name, 0)
    if old:
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in sorted(model.old_kernels.items()))
        text = f"{old} of its {own} published figures are older than XNNPACK in LiteRT, and longer ({ratios})"
        yield Finding("old-kernels", device.name, text)


def _basis(model: LatencyModel, device: DeviceProfile, calibration: Calibration | None) -> str:
    ground = f"a model fitted to {model.figures} published figures of {model.devices} devices"
    own = model.published.get(device.name, 0)
    text = f"{ground}, {own} of them of this one" if own else f"{ground}, none of them of this one"
    if calibration is None:
        return text
    number = len(calibration.figures)
    return f"{text}, calibrated with {number} {'figure' if number == 1 else 'figures'} of yours ({calibration.path})"
