"""The straight line from a trained model to proven bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.bundle import BundleContents, GoldenVector, prepare_output, write_bundle
from edgeopt.calibration.health import check_inputs
from edgeopt.comparison import Comparison, compare
from edgeopt.config import RunConfig
from edgeopt.plan import Data, Job, bundle_path, load, metric_of, open_data, plan_jobs, with_example, with_preprocessing
from edgeopt.progress import Progress, Silent
from edgeopt.revalidation import validate
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.reference import open_reference
from edgeopt.tuning.qat import QatConfig, trainer, with_training_data
from edgeopt.tuning.quantize import quantize
from edgeopt.types import Artifact, Bundle, Finding, LayerRules, Model
from edgeopt.validation.metrics import Metric
from edgeopt.validation.prove import Subject, Terms, prove
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset

__all__ = ["Comparison", "compare", "export", "qat", "validate"]

#: Each costs its inputs and outputs in bundle size.
GOLDEN_VECTORS = 4


#: Fine-tunes the model for one target, given the calibration samples.
Train = Callable[[Model, Job, "Dataset | None"], Model]


def export(config: RunConfig, progress: Progress | None = None) -> tuple[Bundle, ...]:
    """Build and prove one bundle per target. A bundle that misses a gate is written too, marked failed.

    Raises any `EdgeoptError` other than `GateError`; then nothing new stands in the output directory but the
    bundles of targets that were finished before.
    """
    return _export(config, None, (), progress or Silent())


def qat(config: RunConfig, settings: QatConfig, progress: Progress | None = None) -> tuple[Bundle, ...]:
    """`export` with quantization-aware training for each target before its conversion.

    Where the configuration names no data, the training data calibrate and the validation data prove the result.
    """
    progress = progress or Silent()
    config, findings = with_training_data(with_example(config), settings)
    rules = LayerRules(config.keep_float, config.int16_activations)
    train = trainer(settings, rules, config.num_calibration_samples, config.seed, progress)
    return _export(config, train, findings, progress)


def _export(
    config: RunConfig, train: Train | None, findings: tuple[Finding, ...], progress: Progress
) -> tuple[Bundle, ...]:
    config = with_example(config)
    jobs = plan_jobs(config)
    progress.step("Loading the model")
    model = load(config)
    for job in jobs:
        prepare_output(bundle_path(config, model, job))
    model = with_preprocessing(config, model)
    data = open_data(config, model, jobs)
    metric = metric_of(config, model, data.evaluation)
    findings = (*data.findings, *findings)
    if data.calibration is not None:
        samples = progress.track(data.calibration, "Checking the data", len(data.calibration))
        findings = (*findings, *check_inputs(samples, model.inputs, len(data.calibration)))
    rules = LayerRules(config.keep_float, config.int16_activations)
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        workbench = Workbench(model, data.calibration, rules, config.seed, Path(folder), progress)
        return tuple(_build(job, config, model, data, metric, findings, workbench, train, progress) for job in jobs)


def _build(
    job: Job,
    config: RunConfig,
    model: Model,
    data: Data,
    metric: Callable[[], Metric] | None,
    findings: tuple[Finding, ...],
    workbench: Workbench,
    train: Train | None,
    progress: Progress,
) -> Bundle:
    """Train where that is wanted, export, prove and pack one target."""
    twin = workbench.float_artifact(job.target.format)
    artifact: Artifact = twin
    remarks: tuple[Finding, ...] = ()
    if job.scheme.precision != "fp32":
        bench = workbench if train is None else workbench.variant(train(model, job, data.calibration))
        artifact, remarks = quantize(job, config, model, data, bench, workbench, progress)
    subject = Subject(artifact, None if artifact is twin else twin, open_reference(model, config.threads))
    terms = Terms(
        model=model.name,
        target=job.target.name,
        runtimes=job.target.runtimes,
        samples=lambda: iter(data.evaluation),
        count=len(data.evaluation),
        origin=data.origin,
        metric=metric,
        gates=job.gates,
        required_gates=config.gates_set,
        advice=job.target.advice,
        threads=config.threads,
    )
    report = prove(subject, terms, (*findings, *remarks), progress)
    progress.step("Writing the bundle")
    contents = BundleContents(
        target=replace(job.target, gates=job.gates, scheme=job.scheme, estimator=job.estimator),
        device=job.device,
        model=model,
        artifact=artifact,
        float_artifact=subject.float_twin if config.float_twin else None,
        report=report,
        golden=tuple(_golden(artifact, twin, data, job.target.runtimes[0])),
    )
    return write_bundle(bundle_path(config, model, job), contents)


def _golden(artifact: Artifact, twin: Artifact, data: Data, runtime_name: str) -> Iterator[GoldenVector]:
    """A handful of real inputs with what the shipped file and its float twin make of them, on one thread."""
    runtime = load_runtime(runtime_name)
    with runtime.open(artifact.path, artifact.signature) as shipped, runtime.open(twin.path, twin.signature) as float_:
        for sample in islice(data.evaluation, GOLDEN_VECTORS):
            native = shipped.encode(sample.inputs)
            yield GoldenVector(native, shipped.run_native(native), float_.run(sample.inputs), sample.label)
