"""Is the result good enough? Limits against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeopt.types import Check, Gates, Measurement, OpTiming
from edgeopt.validation.evaluate import Evaluation

#: Slack for the rounding of differences such as 0.8323 - 0.8273 <= 0.005.
_ROUNDING = 1e-9

_SLOWEST = 3


@dataclass(frozen=True, slots=True)
class _Gate:
    """How one field of `Gates` is called as a check, its direction, and why it may be impossible to measure."""

    field: str
    check: str
    op: Literal["<=", ">="]
    unit: str
    unmeasured: str


_GATES = (
    _Gate(
        "max_accuracy_drop",
        "accuracy_drop",
        "<=",
        "fraction",
        "give labelled data, or pairs of texts, with --evaluation",
    ),
    _Gate(
        "min_accuracy_kept",
        "accuracy_kept",
        ">=",
        "fraction",
        "give labelled data, or pairs of texts, with --evaluation",
    ),
    _Gate(
        "min_agreement",
        "agreement",
        ">=",
        "fraction",
        "no output has the form of class scores, integers or texts beside a float twin",
    ),
    _Gate("min_sqnr_db", "sqnr_db", ">=", "dB", "there is no float model to compare with, or no float output"),
    _Gate("min_speedup", "speedup", ">=", "x", "there is no float twin to time beside it"),
    _Gate("max_latency_ms", "latency_ms", "<=", "ms", "it was not timed"),
    _Gate("max_size_bytes", "size_bytes", "<=", "bytes", "it was not measured"),
    _Gate("max_peak_memory_bytes", "peak_memory_bytes", "<=", "bytes", "this system does not tell"),
    _Gate("max_cpu_operators", "cpu_operators", "<=", "operators", "the target has no accelerator"),
    _Gate("min_accelerated", "accelerated", ">=", "fraction", "the target has no accelerator"),
)


def judge(
    gates: Gates,
    evaluation: Evaluation | None,
    measurements: Sequence[Measurement],
    advice: Mapping[str, str],
    required: frozenset[str] = frozenset(),
    timings: Sequence[OpTiming] = (),
) -> tuple[Check, ...]:
    """One check per limit that is set and could be measured.

    Args:
        gates: the limits; `max_accuracy_drop` is absolute, 0.005 is half a point.
        evaluation: None when there was nothing to compare with.
        measurements: of `benchmark`; those of the subject "quantized" count, of "float" where there are none.
        advice: check name -> what to try when it fails.
        required: fields of `Gates` that the user set: when one can't be measured, its check fails, with the reason.
        timings: per operator, slowest first; the slowest are named when `speedup` fails.
    """
    checks = []
    for gate in _GATES:
        limit = getattr(gates, gate.field)
        if limit is None:
            continue
        measured = _measured(gate.check, evaluation, measurements)
        if measured is None:
            if gate.field in required:
                reason = f"could not be measured: {gate.unmeasured}"
                checks.append(Check(gate.check, None, limit, gate.op, gate.unit, passed=False, advice=reason))
            continue
        passed = measured <= limit + _ROUNDING if gate.op == "<=" else measured >= limit - _ROUNDING
        hint = None if passed else _advice(gate.check, advice, timings)
        checks.append(Check(gate.check, measured, limit, gate.op, gate.unit, passed=passed, advice=hint))
    return tuple(checks)


def without_limit(
    gates: Gates, evaluation: Evaluation | None, measurements: Sequence[Measurement]
) -> tuple[Check, ...]:
    """What could be judged but has no limit in `gates`, so that a report always holds the same checks."""
    measured = {gate: _measured(gate.check, evaluation, measurements) for gate in _GATES}
    return tuple(
        Check(gate.check, value, None, gate.op, gate.unit, passed=True)
        for gate, value in measured.items()
        if value is not None and getattr(gates, gate.field) is None
    )


def _measured(check: str, evaluation: Evaluation | None, measurements: Sequence[Measurement]) -> float | None:
    match check:
        case "accuracy_drop":
            return accuracy_drop(evaluation) if evaluation else None
        case "accuracy_kept":
            return accuracy_kept(evaluation) if evaluation else None
        case "agreement":
            return evaluation.agreement if evaluation else None
        case "sqnr_db":
            return evaluation.sqnr_db if evaluation else None
    by_subject = {m.subject: m.value for m in measurements if m.name == check}
    return by_subject.get("quantized", by_subject.get("float"))


def accuracy_drop(evaluation: Evaluation) -> float | None:
    """By how much the metric got worse; negative when it got better, None without labels."""
    if evaluation.reference_metric is None or evaluation.candidate_metric is None:
        return None
    drop = evaluation.reference_metric - evaluation.candidate_metric
    return drop if evaluation.higher_is_better else -drop


def accuracy_kept(evaluation: Evaluation) -> float | None:
    """The metric as a share of the reference's; None without labels, where lower is better, and of a reference of 0."""
    if evaluation.reference_metric is None or evaluation.candidate_metric is None or not evaluation.higher_is_better:
        return None
    return evaluation.candidate_metric / evaluation.reference_metric if evaluation.reference_metric > 0 else None


def _advice(check: str, advice: Mapping[str, str], timings: Sequence[OpTiming]) -> str | None:
    parts = [advice[check]] if check in advice else []
    if check == "speedup" and timings:
        slowest = sorted(timings, key=lambda timing: timing.ms, reverse=True)[:_SLOWEST]
        listed = ", ".join(f"{timing.name} ({timing.type}, {timing.ms:.2f} ms)" for timing in slowest)
        parts.append(f"slowest operators: {listed}")
    return "; ".join(parts) or None
