"""Proving a bundle again: on another machine, on other data, after a download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeopt.bundle import LoadedBundle
from edgeopt.bundle.archive import open_anywhere
from edgeopt.errors import MissingError, UsageError
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.progress import Progress, Silent
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.base import decode
from edgeopt.types import DEVICE, PHONE, Artifact, Check, Dim, Finding, Report, Sample, SignatureTensor, TensorSpec
from edgeopt.validation.golden import Replay, golden_check
from edgeopt.validation.metrics import load_metric
from edgeopt.validation.phones import Phones, check_phone
from edgeopt.validation.prove import Subject, Terms, Told, prove

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.validation.metrics import Metric


def validate(
    bundle: Path,
    *,
    evaluation: str | None = None,
    threads: int = 1,
    verify_on: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Report:
    """Verify every hash, reproduce the golden vectors and run every check again with the limits of the bundle.

    Without `evaluation` the limits on fidelity and accuracy keep the result on record, with a finding that says so:
    a handful of golden vectors can show that the file still does what it did, not how good it is.

    Args:
        verify_on: emulated phones ("phone:cortex-a76") that run the same samples, and count instructions.

    Raises:
        TamperedError: a file is not what the manifest says. UsageError: no bundle, or data that doesn't fit.
        MissingError: the bundle's runtime, or the emulator, is not on this machine.
    """
    with open_anywhere(bundle) as loaded:
        return _validate(loaded, evaluation, threads, verify_on, progress or Silent())


def _validate(
    loaded: LoadedBundle, evaluation: str | None, threads: int, verify_on: tuple[str, ...], progress: Progress
) -> Report:
    where = str(loaded.path)
    runtime = load_runtime(loaded.target.runtimes[0])
    if loaded.format not in runtime.formats:
        raise UsageError(f"names {runtime.name} as the runtime of a {loaded.format} file", where=where)
    if (reason := runtime.unavailable()) is not None:
        raise MissingError(reason, where=where)
    for phone in verify_on:
        check_phone(phone, loaded.target)
    progress.step("Running the golden vectors")
    vectors = tuple(loaded.golden())
    with runtime.open(loaded.runnable_path, loaded.signature) as session:
        tolerance = loaded.manifest.golden_tolerance
        golden = golden_check(session, ((v.inputs, v.outputs) for v in vectors), tolerance)
    terms = _terms(loaded, _data(loaded, evaluation) if evaluation is not None else None, threads, verify_on)
    report = prove(_subject(loaded, on_golden=evaluation is None), terms, (), progress)
    return _with_record(report, golden, loaded.report())


def _terms(loaded: LoadedBundle, data: Dataset | None, threads: int, verify_on: tuple[str, ...]) -> Terms:
    """The bundle's own limits over new data; over its golden vectors those that a handful of samples can decide."""
    golden = golden_samples(loaded)
    gates = loaded.gates
    if data is None:
        gates = replace(gates, max_accuracy_drop=None, min_accuracy_kept=None, min_agreement=None, min_sqnr_db=None)
    count = len(golden if data is None else data)

    def samples() -> Iterator[Sample]:
        return iter(golden if data is None else data)

    return Terms(
        model=loaded.name,
        target=loaded.target.name,
        runtimes=loaded.target.runtimes,
        samples=samples,
        count=count,
        origin="golden vectors" if data is None else "evaluation set",
        metric=_metric(loaded, data),
        gates=gates,
        required_gates=frozenset(),
        advice=loaded.target.advice,
        threads=threads,
        phones=Phones(verify_on, samples, count),
    )


def _metric(loaded: LoadedBundle, data: Dataset | None) -> Callable[[], Metric] | None:
    """The metric on record, if it is one of ours: a bundle must not choose code to run."""
    name = loaded.report().evaluation.get("metric")
    if data is None or not data.is_labelled or not isinstance(name, str) or ":" in name:
        return None
    return load_metric(name)


def _data(loaded: LoadedBundle, evaluation: str) -> Dataset:
    from edgeopt.datasets import match_labels, open_dataset

    specs = tuple(model_terms(tensor) for tensor in loaded.signature.inputs)
    return match_labels(open_dataset(evaluation, specs, loaded.preprocessing), loaded.labels)


def model_terms(tensor: SignatureTensor) -> TensorSpec:
    """What the model itself took, before the file's layout and type."""
    order = tensor.permutation or tuple(range(len(tensor.shape)))
    sizes: dict[int, int | Dim] = {
        source: Dim(size) if isinstance(size, str) else size for source, size in zip(order, tensor.shape, strict=True)
    }
    layout: Literal["NCHW"] | None = "NCHW" if tensor.permutation is not None else None
    return TensorSpec(tensor.name, tuple(sizes[axis] for axis in range(len(order))), tensor.model_dtype, layout)


def golden_samples(loaded: LoadedBundle) -> tuple[Sample, ...]:
    """The golden vectors' inputs in the model's terms."""
    inputs = loaded.signature.inputs
    return tuple(
        Sample({t.name: decode(vector.inputs[t.name], t) for t in inputs}, vector.label, f"golden vector {k}")
        for k, vector in enumerate(loaded.golden())
    )


def _subject(loaded: LoadedBundle, on_golden: bool) -> Subject:
    """The shipped file beside its twin, or beside what the twin once gave where the bundle left it out."""
    manifest = loaded.manifest
    recorded = loaded.report()
    shipped = Artifact(
        path=loaded.model_path,
        format=loaded.format,
        precision=loaded.precision,
        signature=loaded.signature,
        size_bytes=size_of(loaded.model_path),
        sha256=sha256_of(loaded.model_path),
        history=loaded.history,
        tools=loaded.tools,
        unquantized_ops=recorded.unquantized_ops,
        emulation=loaded.runnable_path if manifest.model.emulation is not None else None,
    )
    told = _told(recorded)
    if manifest.float_twin is None:
        references = [vector.reference for vector in loaded.golden()] if on_golden else []
        return Subject(shipped, None, (lambda: Replay(loaded.signature, references)) if references else None, told)
    path = loaded.path / manifest.float_twin.file
    twin = replace(
        shipped,
        path=path,
        precision="fp32",
        signature=manifest.float_twin.signature,
        size_bytes=size_of(path),
        sha256=sha256_of(path),
        unquantized_ops=(),
        emulation=None,
    )
    return Subject(shipped, twin, None, told)


def _told(recorded: Report) -> Told | None:
    """What the accelerator's tools said when the bundle was made: it follows from the file, not from this machine."""
    if recorded.placement is None:
        return None
    gates = {check.name for check in recorded.checks if check.name in ("accelerated", "cpu_operators", "latency_ms")}
    estimates = tuple(
        m for m in recorded.measurements if m.provenance == "estimated" and m.name not in gates - {"latency_ms"}
    )
    budgets = {m.name for m in estimates} - gates
    checks = tuple(check for check in recorded.checks if check.name in budgets and check.limit is not None)
    return Told(recorded.placement, estimates, checks)


def _how_to_measure(check: str) -> str:
    """Why a check was not repeated, and what would repeat it."""
    where = check.partition("@")[2]
    if check == "source_sqnr_db":
        needed = "needs the source model"
    elif where.startswith(PHONE):
        needed = f"give --verify-on {where}"
    elif where.startswith(DEVICE):
        needed = "see 'edgeopt device run'"
    else:
        needed = "give the data with --evaluation DATA"
    return f"not measured again: {needed}"


def _with_record(report: Report, golden: Check, recorded: Report) -> Report:
    """Add what could not be decided here as it stands on record, and say so."""
    judged = tuple(check for check in report.checks if check.limit is not None)
    fresh = {check.name for check in (golden, *judged)}
    kept = tuple(check for check in recorded.checks if check.limit is not None and check.name not in fresh)
    findings = tuple(Finding("kept-from-record", check.name, _how_to_measure(check.name)) for check in kept)
    names = {check.name for check in kept}
    checks = (golden, *(check for check in report.checks if check.name not in names), *kept)
    status: Literal["passed", "failed"] = "passed" if all(check.passed for check in checks) else "failed"
    return replace(report, checks=checks, status=status, findings=(*report.findings, *findings))
