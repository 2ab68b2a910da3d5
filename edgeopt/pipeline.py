"""The straight line from a trained model to proven bundles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING

from edgeopt.accelerators import load_accelerator
from edgeopt.accelerators.base import Compiled
from edgeopt.bundle import BundleContents, prepare_output, write_bundle
from edgeopt.calibration.health import check_inputs
from edgeopt.comparison import Comparison, compare
from edgeopt.compression.rewrites.apply import apply_rewrites, suggest
from edgeopt.compression.rewrites.base import Applied
from edgeopt.config import RunConfig
from edgeopt.datasets import match_labels, open_dataset, select
from edgeopt.errors import ConversionError, EdgeoptError
from edgeopt.generation_pipeline import WriterRun, check_writer, metric_for, tokenizer_for
from edgeopt.golden_vectors import golden_vectors
from edgeopt.plan import (
    Data,
    Job,
    bundle_path,
    load,
    metric_of,
    open_data,
    plan_jobs,
    with_example,
    with_preprocessing,
    with_training_data,
)
from edgeopt.prediction import find_calibration, predict
from edgeopt.progress import Progress, Silent
from edgeopt.report.steps import draw_steps
from edgeopt.revalidation import validate
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.reference import open_reference
from edgeopt.sources.structure_file import save_weights
from edgeopt.tuning.context import StepData
from edgeopt.tuning.quantize import quantize
from edgeopt.tuning.sparse_file import with_sparse_kernels
from edgeopt.tuning.step_figures import SAMPLES, Stage, figures
from edgeopt.tuning.steps import Made, check_steps, run_steps
from edgeopt.types import Artifact, Bundle, Finding, LayerRules, Measurement, Model, StepFigures
from edgeopt.validation.benchmark import subject_of
from edgeopt.validation.metrics import Metric
from edgeopt.validation.phones import Phones
from edgeopt.validation.prove import Subject, Terms, Told, prove
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    from edgeopt.datasets import DataSource
    from edgeopt.datasets.base import Dataset

__all__ = ["Comparison", "compare", "export", "validate"]

#: What to try where steps made the model smaller, and so lost most of what is missing.
_ADVICE = dict.fromkeys(
    ("accuracy_drop", "agreement"),
    "train longer (epochs) or remove less; the table of steps shows where it was lost. A distil step recovers without "
    "labels, a qat step what int8 costs",
)
#: What a prediction says of itself that its interval doesn't show.
_PREDICTED_OTHERWISE = frozenset({"dynamic-shape", "unknown-operators"})


def export(config: RunConfig, progress: Progress | None = None) -> tuple[Bundle, ...]:
    """Do the steps of the recipe, then build and prove one bundle per target. A bundle that misses a gate is written
    too, marked failed.

    Raises any `EdgeoptError` other than `GateError`; then nothing new stands in the output directory but the
    bundles of targets that were finished before, and finished steps in the cache.
    """
    progress = progress or Silent()
    config, findings = with_training_data(with_example(config))
    jobs = plan_jobs(config)
    check_steps(config, jobs)
    progress.step("Loading the model")
    model = load(config)
    if model.generation is not None:
        check_writer(config, jobs)
    for job in jobs:
        prepare_output(bundle_path(config, model, job))
    model = with_preprocessing(config, model)
    data = open_data(config, model, jobs)
    findings = (*data.findings, *findings)
    if data.calibration is not None:
        samples = progress.track(data.calibration, "Checking the data", len(data.calibration))
        findings = (*findings, *check_inputs(samples, model.inputs, len(data.calibration)))
    rules = LayerRules(config.keep_float, config.int16_activations)
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        workbench = Workbench(model, data.calibration, rules, config.seed, Path(folder), progress)
        if model.generation is not None:
            tokenizer = tokenizer_for(config, model)
            judged_by = metric_for(config, model.generation, data.evaluation, tokenizer)
            writer = WriterRun(config, model, data, findings, tokenizer, judged_by, workbench, Path(folder), progress)
            return tuple(writer.build(job) for job in jobs)
        metric = metric_of(config, model, data.evaluation)
        run = _Run(config, model, data, metric, findings, workbench, Path(folder), progress)
        return tuple(run.build(job) for job in jobs)


@dataclass(frozen=True, slots=True)
class _Run:
    """What the targets of one run share."""

    config: RunConfig
    model: Model
    data: Data
    metric: Callable[[], Metric] | None
    findings: tuple[Finding, ...]
    workbench: Workbench
    folder: Path
    progress: Progress

    def build(self, job: Job) -> Bundle:
        """Rewrite the model for the target's accelerator where that is wanted, then all the rest."""
        kind = job.target.accelerator
        if not self.config.apply_rewrites or kind is None:
            return self._build(job)
        self.progress.step("Rewriting the model")
        model = self.workbench.torch_model()
        names = [suggestion.name for suggestion in suggest(model, (kind,))]
        samples = iter(self.data.calibration) if self.data.calibration is not None else ()
        rewritten, applied = apply_rewrites(model, names, (kind,), samples, self.config.seed)
        findings = (*self.findings, *(_rewrite_finding(one) for one in applied))
        return replace(self, workbench=self.workbench.variant(rewritten), findings=findings)._build(job)

    def _build(self, job: Job) -> Bundle:
        """Make the model smaller where that is wanted, export, prove and pack one target."""
        config, twin = self.config, self.workbench.float_artifact(job.target.format)
        made, remarks = self._steps(job)
        model = made[-1].model if made else self.workbench.model
        bench = self.workbench.variant(model) if made else self.workbench
        portable, told = self._file(job, bench)
        compiled, artifact = self._compiled(job, portable), portable
        own_twin = None if portable is twin else twin
        if compiled is not None:
            artifact, told = compiled.artifact, (*told, *compiled.findings)
        subject = Subject(artifact, own_twin, open_reference(self.model, config.threads), _told(compiled))
        runtimes, instead = self._runtimes(job, artifact)
        terms = Terms(
            model=self.model.name,
            target=job.target.name,
            runtimes=runtimes,
            samples=lambda: iter(self.data.evaluation),
            count=len(self.data.evaluation),
            origin=self.data.origin,
            metric=self.metric,
            gates=job.gates,
            required_gates=config.gates_set,
            advice={**job.target.advice, **(_ADVICE if made else {})},
            threads=config.threads,
            phones=self._phones(),
        )
        report = prove(subject, terms, (*self.findings, *remarks, *told, *instead), self.progress)
        predicted, unknown = _predicted(job, artifact, own_twin, config.threads)
        report = replace(
            report,
            steps=self._figures(job, made, portable),
            measurements=(*report.measurements, *predicted),
            findings=(*report.findings, *unknown),
        )
        self.progress.step("Writing the bundle")
        contents = BundleContents(
            target=replace(job.target, runtimes=runtimes, gates=job.gates, scheme=job.scheme, estimator=job.estimator),
            device=job.device,
            model=self.model,
            artifact=artifact,
            float_artifact=subject.float_twin if config.float_twin else None,
            report=report,
            golden=tuple(golden_vectors(artifact, twin, self.data.evaluation, runtimes[0])),
            chart=draw_steps(report) if report.steps else None,
            device_files=compiled.extra_files if compiled is not None else (),
            licence=config.licence,
        )
        bundle = write_bundle(bundle_path(config, self.model, job), contents)
        if config.save_weights is not None:  # last: what it can't write must not cost the bundle
            save_weights(model, made[-1].base, config.save_weights)
        return bundle

    def _steps(self, job: Job) -> tuple[tuple[Made, ...], tuple[Finding, ...]]:
        if not self.config.step:
            return (), ()
        data = StepData(self._open(self.config.train), self._open(self.config.validation), self.data.calibration)
        return run_steps(self.config.step, job, self.config, data, self.workbench, self.progress)

    def _file(self, job: Job, bench: Workbench) -> tuple[Artifact, tuple[Finding, ...]]:
        """The file to ship, and what was found while making it."""
        told: tuple[Finding, ...] = ()
        if job.scheme.is_plain_float:
            artifact = bench.float_artifact(job.target.format)
        else:
            artifact, told = quantize(job, self.config, self.model, self.data, bench, self.workbench, self.progress)
        artifact, zeros = with_sparse_kernels(artifact, self.folder)
        return artifact, (*told, *zeros)

    def _compiled(self, job: Job, artifact: Artifact) -> Compiled | None:
        """What the accelerator's tools make of the file; None where it runs on the CPU."""
        npu = job.scheme.npu
        if npu is None:
            return None
        self.progress.step(f"Compiling for {npu.kind}")
        folder = Path(mkdtemp(prefix="compiled-", dir=self.folder))
        return load_accelerator(artifact.format, npu.kind).compile(artifact, npu, folder)

    def _runtimes(self, job: Job, artifact: Artifact) -> tuple[tuple[str, ...], tuple[Finding, ...]]:
        """What proves the file: the target's runtimes, or its emulators where those can't express an operator of it."""
        wanted, others = job.target.runtimes, job.target.emulators
        if wanted == others or not others or load_runtime(wanted[0]).emulates is None:
            return wanted, ()
        first = self.data.evaluation[0].inputs
        try:
            with load_runtime(wanted[0]).open(artifact.runnable, artifact.signature) as session:
                session.run(first)
        except ConversionError as error:
            told = f"{error.line()}; proven in {', '.join(others)} instead"
            return others, (Finding("proven-elsewhere", wanted[0], told),)
        return wanted, ()

    def _phones(self) -> Phones:
        """Where and on what the file is verified as well. The first samples may all be of one class: choose them."""
        if not self.config.verify_on:
            return Phones()
        chosen = select(self.data.evaluation, self.config.num_verification_samples, self.config.seed)
        return Phones(self.config.verify_on, lambda: iter(chosen), len(chosen))

    def _figures(self, job: Job, made: tuple[Made, ...], shipped: Artifact) -> tuple[StepFigures, ...]:
        """Every step's figures, the shipped file's last; none where nothing was done."""
        if not made:
            return ()
        start = Stage("start", self.workbench.torch_model(), self._plain(job, self.workbench))
        between = [Stage(m.step, m.model, self._plain(job, self.workbench.variant(m.model))) for m in made[:-1]]
        last = Stage(made[-1].step, made[-1].model, shipped)
        samples = select(self.data.evaluation, SAMPLES, self.config.seed)
        twin = self.workbench.float_artifact(job.target.format)
        stages = (start, *between, last)
        runtime = job.target.runtimes[0]
        threads, npu = self.config.threads, job.scheme.npu
        return figures(stages, twin, runtime, samples, self.metric, threads, self.progress, npu)

    def _plain(self, job: Job, bench: Workbench) -> Artifact:
        """The file without any pass of a recipe."""
        if job.scheme.is_plain_float:
            return bench.float_artifact(job.target.format)
        return bench.quantized_artifact(job.target.format, job.scheme, job.estimator)[0]

    def _open(self, source: DataSource | None) -> Dataset | None:
        if source is None:
            return None
        dataset = open_dataset(source, self.model.inputs, self.model.preprocessing)
        return match_labels(dataset, self.model.labels)


def _rewrite_finding(one: Applied) -> Finding:
    count = len(one.suggestion.layers)
    if one.refused is not None:
        return Finding("rewrite-refused", one.suggestion.name, one.refused)
    kept = "equal" if one.sqnr_db == math.inf else f"{one.sqnr_db:.0f} dB"
    told = f"{one.suggestion.summary}: {count} layer{'s' if count != 1 else ''}, {kept} to the model before"
    return Finding("rewrite", one.suggestion.name, told)


def _told(compiled: Compiled | None) -> Told | None:
    return Told(compiled.placement, compiled.measurements, compiled.checks) if compiled is not None else None


def _predicted(
    job: Job, artifact: Artifact, twin: Artifact | None, threads: int
) -> tuple[tuple[Measurement, ...], tuple[Finding, ...]]:
    """What the file and its float twin should take on the device's CPU; nothing of a file for an accelerator."""
    if job.scheme.npu is not None:
        return (), ()
    figures: list[Measurement] = []
    notes: dict[str, Finding] = {}
    for subject, file in (("float", twin), (subject_of(artifact, twin), artifact)):
        if file is not None:
            try:
                own = find_calibration(job.device)
                prediction = predict(file.path, file.format, job.device, threads, own)
            except EdgeoptError as error:
                return (), (Finding("not-predicted", f"latency on {job.device.name}", error.problem),)
            figures += prediction.measurements(subject)
            notes |= {note.code: note for note in prediction.findings if note.code in _PREDICTED_OTHERWISE}
    return tuple(figures), tuple(notes.values())
