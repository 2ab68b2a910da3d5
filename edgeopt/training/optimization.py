"""Steps and their sizes: the optimizer, and the learning rate over a training run."""

from __future__ import annotations

import math

import torch

from edgeopt.errors import UsageError
from edgeopt.training.config import TrainingConfig
from edgeopt.training.trainable import Trainable


class Schedule:
    """Learning rate by step: a linear warm-up, then half a cosine to zero (Loshchilov and Hutter 2017)."""

    def __init__(self, config: TrainingConfig, steps: int) -> None:
        self._peak = config.learning_rate
        self.steps = steps
        self._warmup = round(config.warmup * steps)
        self.freeze_at = math.inf if config.freeze_batch_norm_after >= 1 else config.freeze_batch_norm_after * steps

    def rate(self, step: int) -> float:
        if step < self._warmup:
            return self._peak * (step + 1) / self._warmup
        share = (step - self._warmup) / max(self.steps - self._warmup, 1)
        return self._peak * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def optimizer_of(module: Trainable, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of everything that can be trained; raises UsageError where nothing can."""
    scales = {id(parameter) for parameter in module.quantization_parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Only matrices and kernels are drawn to zero.
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in scales]
    rest = [p for p in trained if p.dim() <= 1 or id(p) in scales]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UsageError("the model has no parameters that can be trained", where="training")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate)
