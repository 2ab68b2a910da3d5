"""Training a float network: fine-tuning after pruning, training with masks, distillation."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.errors import DataError, UsageError
from edgeopt.sources.digest import sha256_of
from edgeopt.training.calls import explained, outputs_of
from edgeopt.training.checkpoint import Checkpoints
from edgeopt.training.config import Score, Teaching, TrainingConfig, TrainingResult
from edgeopt.training.constraint import Constraint, Tightening
from edgeopt.training.data import Parts, TrainingData, parts, validation_batches
from edgeopt.training.judge import Judge
from edgeopt.training.loop import Trainer, frozen_copy
from edgeopt.training.losses import Loss, load_loss
from edgeopt.training.process import accelerator_for
from edgeopt.training.rehearsal import free_axes, takes_batches
from edgeopt.training.survey import survey
from edgeopt.training.trainable import Trainable
from edgeopt.types import Model, TensorSpec

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

#: Samples that show whether a network takes batches.
_TRIED = 4

__all__ = ["Constraint", "FitData", "Tightening", "class_count_of", "fit", "record_of", "score", "score_of"]


@dataclass(frozen=True, slots=True)
class FitData:
    """What is trained on.

    Attributes:
        training: shuffled anew in every epoch.
        validation: judges the epochs; None keeps the last one.
        inputs: of the network, one tensor each.
        class_count: classes that it tells apart; None where unknown.
        cache: folder that keeps the teacher's outputs, where `Teaching.teacher_cache` names none; see there.
    """

    training: Dataset
    validation: Dataset | None
    inputs: tuple[TensorSpec, ...]
    class_count: int | None
    cache: Path | None = None


def fit(
    module: nn.Module,
    teacher: nn.Module | None,
    data: FitData,
    teaching: Teaching,
    config: TrainingConfig,
    seed: int,
    progress: Progress,
    *,
    outputs: int | None = None,
    constraint: Constraint | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = True,
    fingerprint: str = "",
) -> TrainingResult:
    """Train a network in place. It then is in eval mode on the CPU, with the weights of the best epoch where there is
    validation data (those that it came with count as epoch 0), of the last one elsewhere; also when this raises.

    Parameters are trained if they want gradients; where none does, as in a model loaded for inference, all are.

    Args:
        module: takes one tensor per input, and returns any nest of tensors.
        teacher: likewise; not changed, and may be `module` itself, which then is taught by what it was. None trains on
            labels alone, whatever `teaching.alpha` is.
        teaching: what is minimized; its `features` and `attention` are the caller's business: see `outputs`.
        seed: the same one gives the same weights, on the same kind of machine.
        outputs: how many of the tensors that both networks return are outputs. Those behind them are features, equally
            many from both, whose distance is added with `teaching.feature_weight`. None: all are outputs.
        constraint: kept to all the way; its penalty is no part of the validation score.
        checkpoint_dir: keeps the state of the last finished epoch, the constraint's included; None keeps none.
        resume: continue from there; otherwise it must hold nothing yet.
        fingerprint: of what else decides the result, such as a constraint's settings.

    Raises:
        DataError: no samples, or ones that don't fit the network or one another.
        UsageError: a loss, a setting, a teacher or a checkpoint that doesn't fit.
        ConversionError: the network can't be trained, or the loss diverges.
    """
    if len(data.training) == 0:
        raise DataError("is empty", where="training data")
    loss = _loss(data, teaching, has_teacher=teacher is not None, outputs=outputs)
    checkpoints = None
    if checkpoint_dir is not None:
        checkpoints = Checkpoints(checkpoint_dir, resume=resume)
        fingerprint = _fingerprint(module, teacher, data, teaching, config, seed, loss, fingerprint)
    trainer = Trainer(
        Trainable(module, _sample_rows(data.training, data.inputs)),
        frozen_copy(teacher) if teacher is not None and loss.needs_teacher else None,
        TrainingData(data.training, data.validation, data.inputs, cache=teaching.teacher_cache or data.cache),
        loss,
        config,
        seed,
        progress,
        checkpoints,
        fingerprint,
        constraint,
    )
    return trainer.run()


def score(
    module: nn.Module, data: FitData, batch_size: int, progress: Progress, teacher: nn.Module | None = None
) -> float:
    """How good a network is on the validation data, higher being better; see `score_of`."""
    return score_of(module, data, batch_size, progress, teacher).value


def score_of(
    module: nn.Module, data: FitData, batch_size: int, progress: Progress, teacher: nn.Module | None = None
) -> Score:
    """Accuracy where the labels are class indices (negative ones don't count); elsewhere the negative distance to the
    teacher's outputs (`losses.distillation` at temperature 1), its mean over the samples.

    The network is left in eval mode on the CPU.

    Raises:
        DataError: no validation data, or ones that don't fit the network.
        UsageError: the labels are no class indices, and there is no teacher.
        ConversionError: the network can't run them.
    """
    if data.validation is None or len(data.validation) == 0:
        raise DataError("there are no validation data to score the model on", fix="give --validation DATA")
    known = survey(data.validation, data.inputs, progress)
    rows = _sample_rows(data.validation, data.inputs)
    networks = [Trainable(network, rows).eval() for network in (module, teacher) if network is not None]
    judged, taught = networks[0], networks[1] if len(networks) > 1 else None
    loss = Loss(None, 0.0, 1.0, data.class_count)
    with accelerator_for(TrainingConfig()) as accelerator:
        try:
            batch = next(iter(validation_batches(data.validation, data.inputs, min(batch_size, _TRIED))))
            first = parts(tuple(tensor.to(accelerator.device) for tensor in batch), data.inputs)
            for network in networks:
                network.to(accelerator.device)
                network.rows = None if takes_batches(network.network, first.arguments, rows) else rows
            if taught is None and loss.scores(_outputs(judged, first), first.labels, "validation data") is None:
                raise UsageError(
                    "has no class indices to score the model by",
                    where="validation data",
                    fix="give labelled data, or a teacher to compare with",
                )
            axes = free_axes(judged, first.arguments, data.inputs)
            judge = Judge(
                judged, taught, known.data, data.inputs, replace(loss, axes=axes), batch_size, progress,
                sizes=known.sizes,
            )  # fmt: skip
            return judge.score(accelerator)
        finally:
            for network in networks:
                network.to("cpu")


def class_count_of(model: Model) -> int | None:
    """Classes, or tokens, that the model is known to tell apart; None where it declares none."""
    return model.generation.vocabulary if model.generation is not None else len(model.labels) or None


def record_of(
    config: TrainingConfig, teaching: Teaching, training: Dataset, seed: int, result: TrainingResult
) -> dict[str, str | int | float | bool | None]:
    """A training run for a `StepRecord`: how, on what, and what came of it."""
    matched = {
        "features": ", ".join(teaching.features),
        "attention": teaching.attention,
        "feature_weight": teaching.feature_weight,
    }
    return {
        **asdict(config),
        "loss": None if teaching.loss is None else Path(teaching.loss).name,
        "alpha": teaching.alpha,
        "temperature": teaching.temperature,
        **({"label_smoothing": teaching.label_smoothing} if teaching.label_smoothing else {}),
        **(matched if teaching.features or teaching.attention else {}),
        "seed": seed,
        "samples": len(training),
        "data_sha256": training.fingerprint(),
        "epochs_run": result.epochs,
        "best_epoch": result.best_epoch,
    }


def _loss(data: FitData, teaching: Teaching, *, has_teacher: bool, outputs: int | None) -> Loss:
    labelled = data.training.is_labelled
    smoothing = teaching.label_smoothing
    loss = load_loss(teaching.loss, labelled, teaching.alpha, teaching.temperature, data.class_count, smoothing)
    if not has_teacher:
        if loss.task is None:
            raise UsageError("distillation needs a teacher", where="training", fix="give one, or labelled data")
        loss = replace(loss, alpha=1.0)
    return replace(loss, outputs=outputs, feature_weight=teaching.feature_weight)


def _sample_rows(data: Dataset, inputs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    """Entries of the first dimension that one sample has, per input."""
    sample = data[0]
    for spec in inputs:
        if spec.name not in sample.inputs:
            raise DataError(f"lacks the input {spec.name!r}", where=f"sample {sample.name!r}")
    return tuple(array.shape[0] if array.ndim else 1 for array in (sample.inputs[spec.name] for spec in inputs))


def _outputs(network: Trainable, batch: Parts) -> list[Tensor]:
    with torch.no_grad(), explained("the network can't run the validation samples"):
        return outputs_of(network, batch.arguments)


def _fingerprint(
    module: nn.Module,
    teacher: nn.Module | None,
    data: FitData,
    teaching: Teaching,
    config: TrainingConfig,
    seed: int,
    loss: Loss,
    more: str,
) -> str:
    """Of everything that decides the result."""
    sets = [None if items is None else (items.fingerprint(), len(items)) for items in (data.training, data.validation)]
    # Where the teacher's outputs are kept makes no difference.
    settings = (
        sha256_of((), module), None if teacher is None else sha256_of((), teacher), sets, data.inputs,
        data.class_count, replace(teaching, teacher_cache=None), config, seed, loss.source, loss.outputs, more,
    )  # fmt: skip
    return hashlib.sha256(repr(settings).encode()).hexdigest()
