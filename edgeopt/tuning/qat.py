"""Quantization-aware training as a step of a recipe."""

from __future__ import annotations

from edgeopt.compression.base import run_pass
from edgeopt.compression.qat import QuantizationAwareTraining
from edgeopt.compression.sparsity.constraints import kept_zeros
from edgeopt.compression.steps import Qat
from edgeopt.tuning.context import StepContext
from edgeopt.types import Model


def qat(model: Model, settings: Qat, context: StepContext) -> Model:
    """The model, trained for the target's file; an interrupted training goes on after its last epoch.

    Raises any error of `QuantizationAwareTraining`.
    """
    if context.training is None:
        raise ValueError("check_steps asks for training data")
    pass_ = QuantizationAwareTraining(
        format=context.job.target.format,
        training=context.training,
        config=settings.training,
        validation=context.validation,
        loss=settings.teaching.loss,
        alpha=settings.teaching.alpha,
        temperature=settings.teaching.temperature,
        label_smoothing=settings.teaching.label_smoothing,
        learned=settings.learned,
        checkpoint_dir=context.state_dir / "checkpoints",
        resume=True,
        constraint=kept_zeros(model),
    )
    return run_pass(pass_, model, context.inputs)
