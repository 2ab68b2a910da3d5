"""`edgeopt sensitivity`: from a configuration to the ranked layers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.plan import Job, load, metric_of, open_data, plan_jobs, with_example, with_preprocessing
from edgeopt.progress import Progress
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.tuning.layers import find_layers
from edgeopt.tuning.samples import Recording, tuning_samples
from edgeopt.tuning.sensitivity import Sensitivity, analyse
from edgeopt.tuning.trial import Terms, Trials
from edgeopt.types import LayerRules
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset
    from edgeopt.validation.metrics import Metric


def sensitivity_of(config: RunConfig, state: Path | None, progress: Progress) -> Sensitivity:
    """Analyse the model of a configuration for its one target.

    Args:
        state: folder where finished trials are kept, and taken from by the next run; None keeps none.

    Raises UsageError when several targets are named or the target does not quantize.
    """
    config = with_example(config)
    jobs = plan_jobs(config)
    if len(jobs) > 1:
        raise UsageError("looks at one target at a time", where="sensitivity", fix="give one --target")
    job = jobs[0]
    if not job.scheme.is_quantized:
        raise UsageError(
            f"target {job.target.name!r} quantizes nothing", where="sensitivity", fix="see edgeopt targets"
        )
    progress.step("Loading the model")
    model = with_preprocessing(config, load(config))
    data = open_data(config, model, jobs)
    samples, _ = tuning_samples(config, model, data, progress)  # there is no verdict here that they could flatter
    metric = metric_of(config, model, samples) if samples.is_labelled else None
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        bench = Path(folder) / "files"
        bench.mkdir()
        workbench = Workbench(model, data.calibration, LayerRules(config.keep_float), config.seed, bench, progress)
        terms = terms_of(job, workbench, samples, metric, config.threads, Path(folder), state, progress)
        trials = Trials(workbench, job.estimator, replace(terms, metric_source=metric_source(config.metric)))
        return analyse(trials, find_layers(workbench, trials.plain(), trials.rules), progress)


def terms_of(
    job: Job,
    workbench: Workbench,
    samples: Dataset,
    metric: Callable[[], Metric] | None,
    threads: int,
    directory: Path,
    state: Path | None,
    progress: Progress,
) -> Terms:
    """What the trials for a job share; runs the float file once over the samples and keeps the results in `directory`.

    Args:
        samples: see `tuning_samples`. metric: None where they have no labels.
    """
    twin = workbench.float_artifact(job.target.format)
    runtime = job.target.runtimes[0]
    recording = Path(mkdtemp(prefix="recording-", dir=directory))
    # An emulator of an accelerator would cost the float file its exactness.
    host = runtime if load_runtime(runtime).emulates is None else HOST_RUNTIMES[twin.format]
    with load_runtime(host).open(twin.path, twin.signature, threads) as session:
        tracked = progress.track(samples, "Running the float file", len(samples))
        recorded = Recording(tracked, session, recording)
    return Terms(job.target.format, job.scheme, runtime, recorded, metric, threads, state)


def metric_source(spec: str | None) -> str:
    """SHA-256 of the file that a user's metric (`file.py:name`, `package.module:name`) is in, which must have been
    loaded; "" for the built-in ones. Finished trials are of no use once it has changed."""
    location, _, _ = (spec or "").rpartition(":")
    file = location if location.endswith(".py") else getattr(sys.modules.get(location), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
