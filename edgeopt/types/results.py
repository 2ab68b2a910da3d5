"""What was found out about an exported file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeopt.types.models import UnquantizedOp
from edgeopt.types.names import Provenance
from edgeopt.types.placement import Placement


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure with how it was obtained.

    `spread` is (25th percentile, 75th percentile) in the same unit; None for exact figures such as a size.
    `subject` says of which file: "quantized" (what ships; of a smaller network in float, too) or "float" (the twin).
    """

    name: str
    subject: str
    value: float
    unit: str
    provenance: Provenance
    runtime: str
    threads: int | None = None
    repetitions: int | None = None
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A gate and what was measured: `measured op limit`. A limit of None is no gate; the check then passes."""

    name: str
    measured: float | None
    limit: float | None
    op: Literal["<=", ">="]
    unit: str
    passed: bool
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a person should know: a calibration worry, a slow operator. `code` is stable, `where` names it."""

    code: str
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class OpTiming:
    """Median time of one operator (or of one delegated block) per inference, in milliseconds."""

    name: str
    type: str
    ms: float


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits on the exported file; None switches a gate off. Fractions, not per cent: 0.005 is half a point.

    `max_accuracy_drop` is a difference of the metric, `min_accuracy_kept` a share of the float model's (0.97: 97 % of
    its BLEU).
    `max_cpu_operators` and `min_accelerated` (a fraction of the operators) judge the placement on an accelerator,
    `max_instructions` one inference on each emulated phone.
    """

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr_db: float | None = None
    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    max_peak_memory_bytes: int | None = None
    max_cpu_operators: int | None = None
    min_accelerated: float | None = None
    max_instructions: int | None = None
    min_accuracy_kept: float | None = None


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What the model was worth and cost after one step, measured on the file exported after that step.

    Attributes:
        step: "start" for the model as it was loaded, then "prune", "distil", ...; the last is the shipped file.
        samples: on which the next three were measured.
        score: the task's metric; None without labels.
        agreement, sqnr_db: with the float file of the model as it was loaded; None where no output has them.
        macs: multiply-accumulate operations of one inference on the example input; None where torch can't count them.
        parameters: of the torch module; None where there is none.
        size_bytes: of the file.
        latency_ms, spread_ms: median and quartiles of one inference, all steps' files timed in turns; for an
            accelerator the estimate of its compiler, without spread, and None where there is none.
    """

    step: str
    samples: int
    score: float | None
    agreement: float | None
    sqnr_db: float | None
    macs: int | None
    parameters: int | None
    size_bytes: int
    latency_ms: float | None
    spread_ms: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Report:
    """What validation found out about one artifact, beside its float twin, in one runtime.

    `steps` is empty where the model was exported as it came; `placement` is None where it runs on the CPU.
    """

    status: Literal["passed", "failed"]
    model: str
    target: str
    runtime: str
    checks: tuple[Check, ...]
    measurements: tuple[Measurement, ...]
    unquantized_ops: tuple[UnquantizedOp, ...]
    op_timings: tuple[OpTiming, ...]
    findings: tuple[Finding, ...]
    evaluation: Mapping[str, str | int | float | bool | None]
    steps: tuple[StepFigures, ...] = ()
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that an app developer can drop in."""

    path: Path
    target: str
    passed: bool
    report: Report
