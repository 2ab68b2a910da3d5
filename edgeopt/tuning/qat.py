"""Quantization-aware training between loading a model and exporting it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.qat import QuantizationAwareTraining
from edgeopt.datasets import match_labels, open_dataset, select
from edgeopt.errors import UsageError
from edgeopt.sources import as_torch
from edgeopt.training.config import TrainingConfig
from edgeopt.types import WRAPPED_ATTRIBUTE, Finding, LayerRules, Model, Sample

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets import DataSource
    from edgeopt.datasets.base import Dataset
    from edgeopt.plan import Job
    from edgeopt.progress import Progress


@dataclass(frozen=True, slots=True)
class QatConfig:
    """What `edgeopt qat` was asked to do beside exporting.

    Attributes:
        train, validation: data sets, as for calibration.
        training: the loop's settings.
        loss, alpha, temperature, learned, checkpoint_dir, resume: see `QuantizationAwareTraining`.
        save_weights: .safetensors file for the trained weights, under the names of the user's own module.
    """

    train: DataSource
    validation: DataSource | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: str | None = None
    alpha: float = 0.5
    temperature: float = 2.0
    learned: bool = False
    checkpoint_dir: Path | None = None
    resume: bool = False
    save_weights: Path | None = None


#: The best epoch is the one that did best on these samples, by luck too.
_EVALUATED_ON_VALIDATION_DATA = Finding(
    "evaluated-on-validation-data",
    "evaluation",
    "the result is proven on the samples that chose its best epoch, which flatters it; give --evaluation DATA",
)
_EVALUATED_ON_TRAINING_DATA = Finding(
    "evaluated-on-training-data",
    "evaluation",
    "the result is proven on samples that it was trained on; give --validation DATA or --evaluation DATA",
)


def with_training_data(config: RunConfig, settings: QatConfig) -> tuple[RunConfig, tuple[Finding, ...]]:
    """The configuration with the training data for calibration and the validation data for evaluation where it names
    none of its own, and what that makes of the proof."""
    calibration = settings.train if config.calibration is None else config.calibration
    evaluation = settings.validation if config.evaluation is None else config.evaluation
    proof = calibration if evaluation is None else evaluation
    findings: tuple[Finding, ...] = ()
    if _same(proof, settings.train):
        findings = (_EVALUATED_ON_TRAINING_DATA,)
    elif _same(proof, settings.validation):
        findings = (_EVALUATED_ON_VALIDATION_DATA,)
    return replace(config, calibration=calibration, evaluation=evaluation), findings


def _same(one: DataSource, other: DataSource | None) -> bool:
    return one is other or (isinstance(one, str) and one == other)


def train(
    model: Model,
    job: Job,
    calibration: Dataset | None,
    settings: QatConfig,
    rules: LayerRules,
    num_calibration_samples: int,
    seed: int,
    progress: Progress,
) -> Model:
    """The model, trained for one target.

    Args:
        calibration: samples that set activation ranges; None takes some of the training data.
        num_calibration_samples: how many, in that case.

    Raises:
        any error of `QuantizationAwareTraining`; UsageError where the target is not quantized, or its recipe names
        passes.
        SystemExit: in every process but the first of an `accelerate launch`: one is enough to export.
    """
    if not job.scheme.is_quantized:
        raise UsageError(
            f"target {job.target.name!r} is not quantized, so there is nothing to train for",
            fix="take an int8 target, such as android-int8",
        )
    if job.recipe not in ((), ("auto",)):
        # They would run after training, and rescale or round anew the weights that it fitted to the file's grid.
        raise UsageError(
            f"the recipe's passes ({', '.join(job.recipe)}) would undo what training fits to the int8 grid",
            where=f"target {job.target.name!r}",
            fix='set recipe = "none", or "auto", which keeps a pass only where the file gets better',
        )
    training = _open(settings.train, model)
    validation = _open(settings.validation, model) if settings.validation is not None else None
    ranges = calibration if calibration is not None else select(training, num_calibration_samples, seed)

    def samples() -> Iterator[Sample]:
        return iter(ranges)

    pass_ = QuantizationAwareTraining(
        format=job.target.format,
        training=training,
        config=settings.training,
        validation=validation,
        loss=settings.loss,
        alpha=settings.alpha,
        temperature=settings.temperature,
        learned=settings.learned,
        checkpoint_dir=settings.checkpoint_dir,
        resume=settings.resume,
    )
    inputs = PassInputs(job.scheme, samples, len(ranges), seed, progress, job.estimator, rules)
    trained = run_pass(pass_, as_torch(model), inputs)
    if int(os.environ.get("RANK", "0")) != 0:
        raise SystemExit(0)
    if settings.save_weights is not None:
        save_weights(trained, settings.save_weights)
    return trained


def trainer(
    settings: QatConfig, rules: LayerRules, num_calibration_samples: int, seed: int, progress: Progress
) -> Callable[[Model, Job, Dataset | None], Model]:
    """`train` with everything given but what differs from target to target."""

    def run(model: Model, job: Job, calibration: Dataset | None) -> Model:
        own = settings
        if settings.checkpoint_dir is not None:
            # Every target has its own arithmetic, and so its own training.
            own = replace(settings, checkpoint_dir=settings.checkpoint_dir / job.target.name)
        return train(model, job, calibration, own, rules, num_calibration_samples, seed, progress)

    return run


def save_weights(model: Model, path: Path) -> None:
    """Write the state of the user's own module as safetensors, beside and then renamed; shared tensors once.

    Raises UsageError when the file can't be written.
    """
    from safetensors.torch import save_model

    if model.module is None:
        raise ValueError("a trained model has a module")
    module = getattr(model.module, WRAPPED_ATTRIBUTE, model.module)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            partial = Path(scratch) / path.name
            save_model(module, str(partial))
            partial.replace(path)
    except OSError as error:
        raise UsageError(f"can't be written: {error.strerror}", where=f"--save-weights {path}") from error


def _open(source: DataSource, model: Model) -> Dataset:
    return match_labels(open_dataset(source, model.inputs, model.preprocessing), model.labels)
