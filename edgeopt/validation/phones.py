"""The exported file on an emulated phone: is it the same there, and how much work is it for that core?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.emulator.cores import Core, core_for
from edgeopt.emulator.counting import InstructionCount, count
from edgeopt.errors import ConfigError, MissingError
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.base import Session, encode
from edgeopt.types import PHONE, Array, Artifact, Check, Finding, Gates, Measurement, Provenance, Sample
from edgeopt.validation.benchmark import subject_of
from edgeopt.validation.evaluate import Evaluation, evaluate
from edgeopt.validation.fidelity import Fidelity
from edgeopt.validation.gates import accuracy_drop, accuracy_kept, judge

if TYPE_CHECKING:
    from edgeopt.progress import Progress
    from edgeopt.targets.schema import Target
    from edgeopt.validation.metrics import Metric

#: Below this ratio of instructions, float to quantized, a report says that quantization saves little work on that core.
SAVES_FROM = 1.5
#: Precisions whose products are of two int8 numbers, and so gain from int8 dot products.
_INT8_PRODUCTS = ("w8a8", "8da4w")
#: By how much the phone may fall below this machine's SQNR where that itself is near the limit: kernels round in
#: another order, which is not to decide.
_ROUNDING_DB = 0.1


@dataclass(frozen=True, slots=True)
class Phones:
    """Where to verify, and on what.

    Attributes:
        runtimes: "phone:cortex-a76", ..., each once.
        samples: a fresh iterator at each call; `count` of them.
    """

    runtimes: tuple[str, ...] = ()
    samples: Callable[[], Iterator[Sample]] = lambda: iter(())
    count: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "runtimes", tuple(dict.fromkeys(self.runtimes)))


def check_phone(name: str, target: Target) -> None:
    """Raises ConfigError where that is no emulated phone or can't run the target's file, MissingError without it."""
    where = f"verify-on {name!r}"
    if not name.startswith(PHONE):
        raise ConfigError("is no emulated phone", where=where, fix="give phone:NAME, such as phone:cortex-a76")
    phone = load_runtime(name)
    if target.format not in phone.formats or target.accelerator is not None:
        raise ConfigError(
            f"only an Arm CPU is emulated, and target {target.name!r} is for {target.accelerator or target.format}",
            where=where,
            fix="export that target in a run without --verify-on",
        )
    if (reason := phone.unavailable()) is not None:
        raise MissingError(reason, where=where)


@dataclass(frozen=True, slots=True)
class OnPhone:
    """What one emulated phone showed."""

    measurements: tuple[Measurement, ...]
    checks: tuple[Check, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file and what it is compared with.

    Attributes:
        artifact, float_twin: as in `edgeopt.validation.prove.Subject`.
        host: the same file, opened on this machine.
        reference: the float model; None where there is nothing to compare with.
    """

    artifact: Artifact
    float_twin: Artifact | None
    host: Session
    reference: Session | None


def verify_on(
    phone: str,
    candidate: Candidate,
    phones: Phones,
    gates: Gates,
    metric: Callable[[], Metric] | None,
    progress: Progress,
) -> OnPhone:
    """Run the samples on that phone beside this machine, judge what comes out, and count instructions.

    The limits on accuracy, agreement and SQNR hold there too. On so few samples chance may break one: where the file
    itself does on this machine, over the same samples, what it gets here is the limit (SQNR within a tenth of a dB).

    Raises:
        MissingError: the emulator is not installed. ConversionError: the phone's runtime can't run the file.
    """
    artifact, host, reference = candidate.artifact, candidate.host, candidate.reference
    subject = subject_of(artifact, candidate.float_twin)
    with load_runtime(phone).open(artifact.runnable, artifact.signature) as session:
        beside = _Beside(session, host)
        samples = progress.track(phones.samples(), f"Evaluating on {phone}", phones.count)
        there = evaluate(reference or host, beside, samples, metric)
    checks: tuple[Check, ...] = ()
    if reference is not None:
        here = evaluate(reference, host, phones.samples(), metric)
        checks = tuple(
            replace(check, name=f"{check.name}@{phone}") for check in judge(_fair(gates, here), there, (), {})
        )
    work = _counted(phone, candidate, gates, next(phones.samples()), progress)
    return OnPhone((*beside.measurements(phone, subject), *work.measurements), (*checks, *work.checks), work.findings)


class _Beside(Session):
    """Answers as the phone does, and keeps how that differs from this machine."""

    def __init__(self, phone: Session, host: Session) -> None:
        super().__init__(phone.signature)
        self._phone, self._host = phone, host
        self._fidelity = Fidelity()
        self._runs = self._identical = 0

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        found, expected = self._phone.run_native(inputs), self._host.run_native(inputs)
        self._runs += 1
        self._identical += all(_same(found[name], expected[name]) for name in expected)
        self._fidelity.update(self.decode(expected), self.decode(found))
        return found

    def measurements(self, phone: str, subject: str) -> tuple[Measurement, ...]:
        """How close the outputs are to this machine's, worst output first."""
        outputs = self._fidelity.results()
        agreement = min((o.agreement for o in outputs if o.agreement is not None), default=None)
        sqnr_db = min((o.sqnr_db for o in outputs if o.sqnr_db is not None), default=None)

        def measured(name: str, value: float, unit: str) -> Measurement:
            return Measurement(name, subject, value, unit, "emulated", phone, threads=1, repetitions=self._runs)

        return (
            measured("host_identical", self._identical / self._runs, "fraction"),
            *((measured("host_agreement", agreement, "fraction"),) if agreement is not None else ()),
            *((measured("host_sqnr_db", sqnr_db, "dB"),) if sqnr_db is not None else ()),
        )

    def close(self) -> None:
        """The sessions belong to the caller."""


def _same(found: Array, expected: Array) -> bool:
    """Equal in every element, NaN where the other is NaN."""
    return np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f")


def _fair(gates: Gates, here: Evaluation) -> Gates:
    """The limits on fidelity, none tighter than what this machine gets on the same samples."""
    drop = accuracy_drop(here)
    return Gates(
        max_accuracy_drop=_looser(max, gates.max_accuracy_drop, drop),
        min_accuracy_kept=_looser(min, gates.min_accuracy_kept, accuracy_kept(here)),
        min_agreement=_looser(min, gates.min_agreement, here.agreement),
        min_sqnr_db=_looser(min, gates.min_sqnr_db, None if here.sqnr_db is None else here.sqnr_db - _ROUNDING_DB),
    )


def _looser(of: Callable[[float, float], float], limit: float | None, here: float | None) -> float | None:
    return limit if limit is None or here is None else of(limit, here)


def _counted(phone: str, candidate: Candidate, gates: Gates, sample: Sample, progress: Progress) -> OnPhone:
    """Instructions of one inference of the file and of its float twin, and what their ratio says."""
    core = core_for(phone.partition(":")[2])
    progress.step(f"Counting instructions on {phone}")
    artifact, float_twin = candidate.artifact, candidate.float_twin
    own, counted = subject_of(artifact, float_twin), _count(artifact, sample, core)
    figures = _figures(phone, own, counted)
    checks = _within(phone, gates, counted)
    if float_twin is None:
        return OnPhone(figures, checks, ())
    twin = _count(float_twin, sample, core)
    ratio = twin.total / counted.total
    saved = Measurement("instruction_ratio", own, ratio, "x", "emulated", phone, threads=1)
    return OnPhone(
        (*figures, *_figures(phone, "float", twin), saved), checks, _verdict(phone, core, artifact, twin, counted)
    )


def _count(artifact: Artifact, sample: Sample, core: Core) -> InstructionCount:
    native = {tensor.name: encode(sample.inputs[tensor.name], tensor) for tensor in artifact.signature.inputs}
    return count(artifact.runnable, artifact.format, artifact.signature, native, core)


def _figures(phone: str, subject: str, counted: InstructionCount) -> tuple[Measurement, ...]:
    def measured(name: str, value: float, unit: str, how: Provenance) -> Measurement:
        return Measurement(name, subject, value, unit, how, phone, threads=1)

    return (
        measured("instructions", counted.total, "instructions", "emulated"),
        *(measured(f"instructions[{kind}]", n, "instructions", "emulated") for kind, n in counted.classes.items()),
        *((measured("cycles", counted.cycles, "cycles", "estimated"),) if counted.cycles is not None else ()),
    )


def _verdict(
    phone: str, core: Core, artifact: Artifact, twin: InstructionCount, counted: InstructionCount
) -> tuple[Finding, ...]:
    """Says it where quantization saves little work. Time may say otherwise: a float product takes longer than an int8
    one on some cores, so estimated cycles are told, too."""
    ratio = twin.total / counted.total
    if artifact.precision in ("fp32", "fp16") or ratio >= SAVES_FROM:
        return ()
    change = f"{ratio:.2f}x fewer" if ratio > 1 else f"{1 / ratio:.2f}x more"
    lacking = artifact.precision in _INT8_PRODUCTS and not {"dotprod", "i8mm"} & set(core.features)
    reason = f": {core.title} has no int8 dot products" if lacking else ""
    told = f"{artifact.precision} takes {change} instructions than float{reason}"
    if twin.cycles and counted.cycles:
        told += f" (estimated cycles: {twin.cycles / counted.cycles:.2f}x fewer)"
    return (Finding("little-saved", phone, told),)


def _within(phone: str, gates: Gates, counted: InstructionCount) -> tuple[Check, ...]:
    """The limit on instructions: a gate against regressions, since the count of a file does not vary."""
    limit = gates.max_instructions
    if limit is None:
        return ()
    passed = counted.total <= limit
    return (Check(f"instructions@{phone}", counted.total, limit, "<=", "instructions", passed),)
