"""Everything that is claimed about an exported file, measured on that file in its runtime."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.runtimes.base import Session
from edgeopt.types import (
    Array,
    Artifact,
    Check,
    Finding,
    Gates,
    Measurement,
    OpTiming,
    Placement,
    Provenance,
    Report,
    Sample,
)
from edgeopt.validation.benchmark import benchmark, subject_of
from edgeopt.validation.evaluate import Evaluation, evaluate
from edgeopt.validation.gates import judge, without_limit
from edgeopt.validation.phones import Candidate, OnPhone, Phones, verify_on

if TYPE_CHECKING:
    from edgeopt.progress import Progress
    from edgeopt.validation.metrics import Metric

#: The float twin must be the source model within rounding; a converter that breaks the model is caught here.
SOURCE_SAMPLES = 4
MIN_SOURCE_SQNR_DB = 40.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is judged, and what it is compared with.

    Attributes:
        artifact: the file that ships.
        told: what its accelerator's tools say of it; None where it runs on the CPU.
        float_twin: the fp32 file of the same format; None when `artifact` is that file itself or the twin is gone.
        source: opens what the files were made from (or what is on record of it); None when that can't be run.
    """

    artifact: Artifact
    float_twin: Artifact | None
    source: Callable[[], Session] | None
    told: Told | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What an accelerator's compiler or a model of it says: where operators run, estimates, budgets kept or not."""

    placement: Placement
    measurements: tuple[Measurement, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """How to judge: data, metric, limits.

    Attributes:
        runtimes: the first decides everything; in the others the file is evaluated again. Where it emulates another
            machine, nothing is timed.
        samples: a fresh iterator at each call; `count` of them; `origin` says in words what they are.
        metric: None without labels.
        required_gates: fields of `Gates` that the user set and that must not be skipped.
        advice: check name -> what to try when it fails.
        phones: emulated ones, in which the file is verified as well; none by default.
    """

    model: str
    target: str
    runtimes: tuple[str, ...]
    samples: Callable[[], Iterator[Sample]]
    count: int
    origin: str
    metric: Callable[[], Metric] | None
    gates: Gates
    required_gates: frozenset[str]
    advice: Mapping[str, str]
    threads: int
    phones: Phones = field(default_factory=Phones)


@dataclass(frozen=True, slots=True)
class _Observed:
    """What opening and running the files showed."""

    evaluation: Evaluation | None
    elsewhere: Mapping[str, Evaluation]
    phones: tuple[OnPhone, ...]
    source_sqnr_db: float | None
    timings: tuple[OpTiming, ...]
    first_inputs: Mapping[str, Array] = field(repr=False)


def prove(subject: Subject, terms: Terms, findings: tuple[Finding, ...], progress: Progress) -> Report:
    """Evaluate, time and judge one artifact. A missed gate is in the report; only what can't be run raises."""
    observed = _observe(subject, terms, progress)
    told = subject.told
    measurements = _measured(subject, observed, terms, progress)
    checks = (
        *judge(terms.gates, observed.evaluation, measurements, terms.advice, terms.required_gates, observed.timings),
        *without_limit(terms.gates, observed.evaluation, measurements),
        *_source_check(observed.source_sqnr_db),
        *_checks_elsewhere(terms.gates, observed.elsewhere),
        *(check for phone in observed.phones for check in phone.checks),
        *_uncounted(terms),
        *(told.checks if told else ()),
    )
    return Report(
        status="passed" if all(check.passed for check in checks) else "failed",
        model=terms.model,
        target=terms.target,
        runtime=terms.runtimes[0],
        checks=checks,
        measurements=(
            *_quality(subject, observed, terms),
            *measurements,
            *(measurement for phone in observed.phones for measurement in phone.measurements),
        ),
        unquantized_ops=subject.artifact.unquantized_ops,
        op_timings=observed.timings,
        findings=(*findings, *(finding for phone in observed.phones for finding in phone.findings)),
        evaluation=_provenance(subject, observed.evaluation, terms),
        placement=told.placement if told else None,
    )


def emulated_by(artifact: Artifact, runtime: str) -> str | None:
    """What stands in for the device when this runtime runs the file; None where it runs as it would there."""
    phrase = load_runtime(runtime).emulates
    if phrase is None and artifact.emulation is not None:
        return f"not executed on its accelerator: the same program in {runtime}"
    return phrase


def _measured(subject: Subject, observed: _Observed, terms: Terms, progress: Progress) -> tuple[Measurement, ...]:
    """Times and memory of this machine, or what the accelerator's tools estimate; never those of an emulator."""
    artifact, twin, told = subject.artifact, subject.float_twin, subject.told
    estimates = (*told.measurements, *_placed(told.placement)) if told else ()
    if emulated_by(artifact, terms.runtimes[0]) is None:
        progress.step("Timing quantized against float" if twin else "Timing")
        return (*benchmark(artifact, twin, terms.runtimes[0], observed.first_inputs, terms.threads), *estimates)
    own = subject_of(artifact, twin)
    sizes = [(own, artifact), *((("float", twin),) if twin else ())]
    exact: Provenance = "measured-host"
    return (
        *(Measurement("size_bytes", of, float(x.size_bytes), "bytes", exact, terms.runtimes[0]) for of, x in sizes),
        *estimates,
    )


def _placed(placement: Placement) -> tuple[Measurement, ...]:
    told: Provenance = "estimated" if placement.predicted else "measured-host"
    return (
        Measurement("accelerated", "quantized", placement.accelerated, "fraction", told, placement.told_by),
        Measurement("cpu_operators", "quantized", len(placement.on_cpu), "operators", told, placement.told_by),
    )


def _observe(subject: Subject, terms: Terms, progress: Progress) -> _Observed:
    first_inputs = next(terms.samples()).inputs
    with ExitStack() as stack:

        def opened(artifact: Artifact, runtime: str) -> Session:
            session = load_runtime(runtime).open(artifact.runnable, artifact.signature, terms.threads)
            return stack.enter_context(session)

        first = terms.runtimes[0]
        emulated = emulated_by(subject.artifact, first) is not None
        candidate = opened(subject.artifact, first)
        host = HOST_RUNTIMES[subject.artifact.format] if emulated else first
        twin = opened(subject.float_twin, host) if subject.float_twin else None
        source = stack.enter_context(subject.source()) if subject.source else None
        source_sqnr_db = None
        if twin and source:
            source_sqnr_db = evaluate(source, twin, islice(terms.samples(), SOURCE_SAMPLES), None).sqnr_db
        reference = twin or source
        evaluation = None
        elsewhere = {}
        if reference:
            samples = progress.track(terms.samples(), "Evaluating", terms.count)
            evaluation = evaluate(reference, candidate, samples, terms.metric)
            for runtime in terms.runtimes[1:]:
                samples = progress.track(terms.samples(), f"Evaluating in {runtime}", terms.count)
                elsewhere[runtime] = evaluate(reference, opened(subject.artifact, runtime), samples, terms.metric)
        timings: tuple[OpTiming, ...] = ()
        if not emulated:
            progress.step("Profiling")
            timings = candidate.profile(first_inputs)
        on_trial = Candidate(subject.artifact, subject.float_twin, candidate, reference)
        phones = tuple(
            verify_on(phone, on_trial, terms.phones, terms.gates, terms.metric, progress)
            for phone in terms.phones.runtimes
        )
        return _Observed(evaluation, elsewhere, phones, source_sqnr_db, timings, first_inputs)


def _source_check(sqnr_db: float | None) -> tuple[Check, ...]:
    if sqnr_db is None:
        return ()
    passed = sqnr_db >= MIN_SOURCE_SQNR_DB
    advice = None if passed else "the converter changed the model: the float file differs from the source by far"
    return (Check("source_sqnr_db", sqnr_db, MIN_SOURCE_SQNR_DB, ">=", "dB", passed, advice),)


def _uncounted(terms: Terms) -> tuple[Check, ...]:
    """The user's limit on instructions where no phone was named to count them."""
    if terms.phones.runtimes or terms.gates.max_instructions is None:
        return ()
    if "max_instructions" not in terms.required_gates:
        return ()
    advice = "could not be measured: name an emulated phone with --verify-on phone:NAME"
    limit = terms.gates.max_instructions
    return (Check("instructions", None, limit, "<=", "instructions", passed=False, advice=advice),)


def _checks_elsewhere(gates: Gates, elsewhere: Mapping[str, Evaluation]) -> tuple[Check, ...]:
    fidelity = Gates(
        max_accuracy_drop=gates.max_accuracy_drop,
        min_accuracy_kept=gates.min_accuracy_kept,
        min_agreement=gates.min_agreement,
        min_sqnr_db=gates.min_sqnr_db,
    )
    return tuple(
        Check(f"{c.name}@{runtime}", c.measured, c.limit, c.op, c.unit, c.passed, c.advice)
        for runtime, evaluation in elsewhere.items()
        for c in judge(fidelity, evaluation, (), {})
    )


def _quality(subject: Subject, observed: _Observed, terms: Terms) -> tuple[Measurement, ...]:
    """Metric and fidelity as measurements, the reference's first."""
    evaluation = observed.evaluation
    if evaluation is None:
        return ()
    own = subject_of(subject.artifact, subject.float_twin)
    reference = "float" if subject.float_twin else "source"
    obtained: Provenance = "emulated" if emulated_by(subject.artifact, terms.runtimes[0]) else "measured-host"

    def measurement(name: str, of: str, value: float, unit: str) -> Measurement:
        how: Provenance = obtained if of == own else "measured-host"
        return Measurement(name, of, value, unit, how, terms.runtimes[0], repetitions=evaluation.samples)

    found = []
    if evaluation.metric is not None:
        for of, value in ((reference, evaluation.reference_metric), (own, evaluation.candidate_metric)):
            if value is not None:
                found.append(measurement(evaluation.metric, of, value, "fraction"))
    for output in evaluation.outputs:
        suffix = f"[{output.name}]" if len(evaluation.outputs) > 1 else ""
        if output.agreement is not None:
            found.append(measurement(f"agreement{suffix}", own, output.agreement, "fraction"))
        if output.sqnr_db is not None:
            found.append(measurement(f"sqnr_db{suffix}", own, output.sqnr_db, "dB"))
        found.append(measurement(f"max_abs_error{suffix}", own, output.max_abs_error, ""))
    return tuple(found)


def _provenance(
    subject: Subject, evaluation: Evaluation | None, terms: Terms
) -> dict[str, str | int | float | bool | None]:
    return {
        "samples": evaluation.samples if evaluation else 0,
        "origin": terms.origin,
        "metric": evaluation.metric if evaluation else None,
        "threads": terms.threads,
        "machine": platform.machine(),
        "emulates": emulated_by(subject.artifact, terms.runtimes[0]),
    }
