"""The quantized file of one target, after the passes that its recipe names or finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.plan import Data, Job, metric_of
from edgeopt.tuning.analysis import terms_of
from edgeopt.tuning.budget import Budget
from edgeopt.tuning.findings import findings
from edgeopt.tuning.recipe import ESTIMATORS, apply_passes, tune
from edgeopt.tuning.samples import tuning_samples
from edgeopt.types import Artifact, Finding, Model

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress
    from edgeopt.validation.metrics import Metric
    from edgeopt.workbench import Workbench


def quantize(
    job: Job,
    config: RunConfig,
    model: Model,
    data: Data,
    workbench: Workbench,
    original: Workbench,
    progress: Progress,
) -> tuple[Artifact, tuple[Finding, ...]]:
    """Make the file, and tell what calibration and the recipe found.

    Args:
        workbench: of the model to quantize, which training may have changed.
        original: of the model as it came, which a search compares with.

    Raises ConversionError when a pass that the recipe names does not apply to this model.
    """
    if job.recipe == ("auto",):
        return _by_search(job, config, model, data, workbench, original, progress)
    bench = apply_passes(workbench, job.recipe, job.scheme, job.estimator, progress)
    return bench.quantized_artifact(job.target.format, job.scheme, job.estimator)


def _by_search(
    job: Job,
    config: RunConfig,
    model: Model,
    data: Data,
    workbench: Workbench,
    original: Workbench,
    progress: Progress,
) -> tuple[Artifact, tuple[Finding, ...]]:
    samples, remarks = tuning_samples(config, model, data, progress)
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        metric = _metric(config, model, samples)
        terms = terms_of(job, original, samples, metric, config.threads, Path(folder), None, progress)
        budget = Budget.from_gates(job.gates, config.gates_set)
        estimators = ESTIMATORS if config.estimator is None else ()
        tuned = tune(workbench, terms, job.estimator, budget, progress, estimators=estimators)
    best = tuned.workbench.quantized_artifact(job.target.format, job.scheme, tuned.estimator, tuned.rules)
    return best[0], (*best[1], *remarks, *findings(tuned))


def _metric(config: RunConfig, model: Model, samples: Dataset) -> Callable[[], Metric] | None:
    """As for the final verdict, where the tuning samples have labels at all."""
    return metric_of(config, model, samples) if samples.is_labelled else None
