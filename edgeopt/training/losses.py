"""What training minimizes: a task loss, the distance to the float model, or a mixture.

Distillation follows Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.nn import functional

from edgeopt.errors import DataError, UsageError
from edgeopt.user_code import UserObject, load_user_object

LOSSES = ("distillation", "cross-entropy", "mse")

TaskLoss = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """alpha * task + (1 - alpha) * distillation.

    Attributes:
        task: None for distillation alone.
        alpha: weight of the task loss.
        temperature: of the softmax whose shares are compared; they are scaled by its square, as the paper has it.
    """

    task: TaskLoss | None
    alpha: float
    temperature: float

    @property
    def needs_teacher(self) -> bool:
        return self.task is None or self.alpha < 1

    def __call__(self, outputs: Sequence[Tensor], labels: Tensor | None, teacher: Sequence[Tensor]) -> Tensor:
        """The loss of one batch, a scalar. Raises DataError when a task loss meets a batch without labels."""
        total = torch.zeros((), device=outputs[0].device)
        if self.task is not None and self.alpha > 0:
            if labels is None:
                raise DataError("has samples without labels, which the loss needs", where="training data")
            total = total + self.alpha * self.task(outputs, labels)
        if self.needs_teacher:
            weight = 1.0 if self.task is None else 1 - self.alpha
            total = total + weight * distillation(outputs, teacher, self.temperature)
        return total


def load_loss(spec: str | None, is_labelled: bool, alpha: float, temperature: float) -> Loss:
    """The loss of that name, or `file.py:function`, called with the outputs (a tensor, or a tuple of several) and the
    labels, and returning a scalar tensor.

    Args:
        spec: None takes cross-entropy for labelled data, distillation for others.
        is_labelled: whether the training data have labels.

    Raises UsageError for an unknown name, and for a task loss without labels.
    """
    name = spec or ("cross-entropy" if is_labelled else "distillation")
    if name == "distillation":
        return Loss(None, 0.0, temperature)
    if not is_labelled:
        raise UsageError(
            f"the loss {name!r} needs labels, and the training data have none",
            fix="give labelled data, or take --loss distillation",
        )
    standard = {"cross-entropy": cross_entropy, "mse": mean_squared_error}.get(name)
    if standard is not None:
        return Loss(standard, alpha, temperature)
    if not re.search(r":[\w.]+$", name):
        near = get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(LOSSES)}, or file.py:function"
        raise UsageError("unknown loss", where=name, fix=hint)
    return Loss(_UserLoss(load_user_object(name, "loss")), alpha, temperature)


def cross_entropy(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of the first output with a class axis, which is the last; negative labels are skipped."""
    scores = class_scores(outputs)
    if scores is None or labels.is_floating_point() or labels.shape != scores.shape[:-1]:
        raise UsageError(
            f"cross-entropy needs class indices and class scores; labels have shape {tuple(labels.shape)}, outputs "
            f"{', '.join(str(tuple(o.shape)) for o in outputs)}",
            fix="take --loss mse, distillation, or your own file.py:function",
        )
    flat = _log_shares(scores, 1.0, _are_shares(scores)).reshape(-1, scores.shape[-1])
    targets = labels.reshape(-1)
    return functional.nll_loss(flat, torch.where(targets < 0, -100, targets))


def mean_squared_error(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of the first output against an array label of its shape."""
    if labels.numel() != outputs[0].numel():
        raise UsageError(
            f"mse needs labels of the output's shape {tuple(outputs[0].shape)}, and they have {tuple(labels.shape)}",
            fix="take --loss cross-entropy, distillation, or your own file.py:function",
        )
    return functional.mse_loss(outputs[0].float(), labels.reshape(outputs[0].shape).float())


def distillation(outputs: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """Distance to the float model's outputs: T^2 KL(teacher || student) of class scores, else the mean squared error
    in units of the teacher's variance. Mean over the outputs."""
    losses = []
    for mine, wanted in zip(outputs, teacher, strict=True):
        if not mine.is_floating_point():
            continue
        if mine.dim() == 2 and mine.shape[1] > 1:
            shares = _are_shares(wanted)
            log_mine, log_wanted = (_log_shares(scores, temperature, shares) for scores in (mine, wanted))
            divergence = functional.kl_div(log_mine, log_wanted, reduction="batchmean", log_target=True)
            losses.append(divergence * temperature**2)
        else:
            error = functional.mse_loss(mine.float(), wanted.float())
            losses.append(error / wanted.float().var(correction=0).clamp(min=1e-12))
    if not losses:
        raise UsageError("no output is real, so there is nothing to distill", fix="give --loss file.py:function")
    return torch.stack(losses).mean()


def class_scores(outputs: Sequence[Tensor]) -> Tensor | None:
    """The first real output with a batch and a class axis."""
    return next((o for o in outputs if o.is_floating_point() and o.dim() >= 2 and o.shape[-1] > 1), None)


def _are_shares(scores: Tensor) -> bool:
    """Whether the model ends in a softmax already, judged by the values."""
    with torch.no_grad():
        real = scores.float()
        return bool((real >= 0).all()) and bool(((real.sum(-1) - 1).abs() < 0.02).all())


def _log_shares(scores: Tensor, temperature: float, are_shares: bool) -> Tensor:
    # log softmax(log(p) / T) = log softmax(z / T) for p = softmax(z).
    logits = scores.float().clamp(min=1e-9).log() if are_shares else scores.float()
    return functional.log_softmax(logits / temperature, -1)


class _UserLoss:
    def __init__(self, function: UserObject) -> None:
        if not callable(function.value):
            raise UsageError("is not a function", where=function.where)
        self._function = function.value
        self._object = function

    def __call__(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        with self._object.running("the loss failed"):
            value = self._function(outputs[0] if len(outputs) == 1 else tuple(outputs), labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError("returned no scalar tensor", where=self._object.where)
        return value.reshape(())
