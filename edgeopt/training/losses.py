"""What training minimizes: a task loss, the distance to the teacher, or a mixture, and the distance of features.

Distillation follows Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from edgeopt.errors import DataError, UsageError
from edgeopt.training.padding import real_positions
from edgeopt.user_code import UserObject, load_user_object

#: For each axis behind the batch, the place of a free dimension among the inputs' or None.
Axes = tuple[int | None, ...]

LOSSES = ("distillation", "cross-entropy", "mse")

#: Rows of scores that tell whether they are shares.
_LOOKED_AT = 8

TaskLoss = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """alpha * task + (1 - alpha) * distillation + feature_weight * features.

    Attributes:
        task: None for distillation alone.
        alpha: weight of the task loss.
        temperature: of the softmax whose shares are compared; they are scaled by its square, as the paper has it.
        class_count: classes that the model is known to tell apart; None where it declares none.
        outputs: how many of the tensors that the networks return are outputs; those behind them are features, which
            are compared pair by pair with `relative_error`. None where all are outputs.
        feature_weight: of the mean over these pairs.
        axes: for each of these tensors and each of its axes behind the batch, which of the inputs' free dimensions it
            goes along (see `edgeopt.training.padding`); what was filled in there doesn't count. Empty where unknown.
    """

    task: TaskLoss | None
    alpha: float
    temperature: float
    class_count: int | None = None
    outputs: int | None = None
    feature_weight: float = 1.0
    axes: tuple[Axes, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        return self.task is None or self.alpha < 1 or self.outputs is not None

    @property
    def source(self) -> bytes:
        """Text of the file with the user's own loss; empty for one of ours."""
        return self.task.source() if isinstance(self.task, _UserLoss) else b""

    def __call__(
        self,
        outputs: Sequence[Tensor],
        labels: Tensor | None,
        teacher: Sequence[Tensor],
        sizes: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            sizes: (samples, free dimensions), how long each sample is; None where all are alike.

        Raises:
            DataError: a task loss meets a batch without labels.
            UsageError: the teacher returns other tensors than the network.
        """
        total = torch.zeros((), device=outputs[0].device)
        real = self._real(outputs, sizes)
        outputs, features = self._split(outputs)
        teacher, wanted = self._split(teacher)
        if self.task is not None and self.alpha > 0:
            if labels is None:
                raise DataError("has samples without labels, which the loss needs", where="training data")
            total = total + self.alpha * self.task(outputs, labels)
        weight = 1.0 if self.task is None else 1 - self.alpha
        if weight > 0:
            check_same_shapes("output", outputs, teacher)
            classes, counted = self._class_outputs(outputs, labels)
            total = total + weight * distillation(outputs, teacher, self.temperature, classes, real | counted)
        if features or wanted:
            check_same_shapes("feature", features, wanted)
            errors = [
                relative_error(mine, goal, real.get(index))
                for index, (mine, goal) in enumerate(zip(features, wanted, strict=True), start=len(outputs))
            ]
            total = total + self.feature_weight * torch.stack(errors).mean()
        return total

    def scores(self, outputs: Sequence[Tensor], labels: Tensor | None, checked: str) -> Tensor | None:
        """The class scores that the labels are classes of; see `labelled_scores`."""
        index = labelled_scores(self._split(outputs)[0], labels, checked)
        return None if index is None else outputs[index]

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Outputs and features."""
        return (tensors, ()) if self.outputs is None else (tensors[: self.outputs], tensors[self.outputs :])

    def _real(self, tensors: Sequence[Tensor], sizes: Tensor | None) -> dict[int, Tensor]:
        """Place -> which positions of that tensor are not filled in; without those of which all count."""
        found: dict[int, Tensor] = {}
        if sizes is not None:
            for index, (tensor, axes) in enumerate(zip(tensors, self.axes, strict=False)):
                last = max((axis for axis, dim in enumerate(axes) if dim is not None), default=-1) + 1
                if last and len(tensor) == len(sizes) and tensor.dim() == len(axes) + 1:
                    found[index] = real_positions(sizes, tensor.shape[1 : last + 1], axes[:last])
        return found

    def _class_outputs(
        self, outputs: Sequence[Tensor], labels: Tensor | None
    ) -> tuple[frozenset[int], dict[int, Tensor]]:
        """Places of the outputs that are known to be class scores: class indices go with them, or there is one for
        each class of the model. An embedding has the same shape, and would drift where only a softmax is compared.

        And which positions count, of outputs with several for a sample.
        """
        found = {
            i
            for i, output in enumerate(outputs)
            if output.is_floating_point() and output.dim() >= 2 and output.shape[-1] == self.class_count
        }
        labelled = labelled_scores(outputs, labels)
        if labels is None or labelled is None:
            return frozenset(found), {}
        # A sample without a class is one that only the teacher knows; a position without one is padding.
        return frozenset(found | {labelled}), {labelled: labels >= 0} if labels.dim() > 1 else {}


def load_loss(
    spec: str | None,
    is_labelled: bool,
    alpha: float,
    temperature: float,
    class_count: int | None = None,
    label_smoothing: float = 0.0,
) -> Loss:
    """The loss of that name, or `file.py:function`, called with the outputs (a tensor, or a tuple of several) and the
    labels, and returning a scalar tensor.

    Args:
        spec: None takes cross-entropy for labelled data, distillation for others.
        is_labelled: whether the training data have labels.
        class_count: see `Loss`.
        label_smoothing: see `cross_entropy`.

    Raises UsageError for an unknown name, a task loss without labels, and smoothing that the loss has no use for.
    """
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"{label_smoothing} is not from 0 to below 1", where="label-smoothing")
    name = spec or ("cross-entropy" if is_labelled else "distillation")
    if label_smoothing and name != "cross-entropy":
        raise UsageError(
            f"goes with cross-entropy, and the loss is {name!r}",
            where="label-smoothing",
            fix="leave it out, or take --loss cross-entropy",
        )
    if name == "distillation":
        return Loss(None, 0.0, temperature, class_count)
    if not is_labelled:
        raise UsageError(
            f"the loss {name!r} needs labels, and the training data have none",
            fix="give labelled data, or take --loss distillation",
        )
    smoothed = partial(cross_entropy, smoothing=label_smoothing) if label_smoothing else cross_entropy
    standard = {"cross-entropy": smoothed, "mse": mean_squared_error}.get(name)
    if standard is not None:
        return Loss(standard, alpha, temperature, class_count)
    if not re.search(r":[\w.]+$", name):
        near = get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(LOSSES)}, or file.py:function"
        raise UsageError("unknown loss", where=name, fix=hint)
    return Loss(_UserLoss(load_user_object(name, "loss")), alpha, temperature, class_count)


def cross_entropy(outputs: Sequence[Tensor], labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of the first output with a class axis, which is the last; negative labels are skipped.

    Args:
        smoothing: share of a label that is spread evenly over all classes (Szegedy et al. 2016).
    """
    index = labelled_scores(outputs, labels, "training data")
    if index is None:
        raise UsageError(
            f"cross-entropy needs class indices and class scores; labels have shape {tuple(labels.shape)}, outputs "
            f"{', '.join(str(tuple(o.shape)) for o in outputs)}",
            fix="take --loss mse, distillation, or your own file.py:function",
        )
    # What doesn't count is left out first: it may be half of all scores, of which there are thousands a position.
    flat, counted = outputs[index].flatten(0, -2), labels.flatten() >= 0
    targets = labels.flatten()
    if not bool(counted.all()):
        flat, targets = flat[counted], targets[counted]
    # A batch in which no label counts says nothing.
    total = functional.cross_entropy(
        _logits(flat, _are_shares(flat)), targets, reduction="sum", label_smoothing=smoothing
    )
    return total / max(len(targets), 1)


def mean_squared_error(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of the first output against an array label of its shape."""
    if labels.numel() != outputs[0].numel():
        raise UsageError(
            f"mse needs labels of the output's shape {tuple(outputs[0].shape)}, and they have {tuple(labels.shape)}",
            fix="take --loss cross-entropy, distillation, or your own file.py:function",
        )
    return functional.mse_loss(outputs[0].float(), labels.reshape(outputs[0].shape).float())


def distillation(
    outputs: Sequence[Tensor],
    teacher: Sequence[Tensor],
    temperature: float,
    classes: Container[int],
    counted: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Distance to the teacher's outputs, mean over the outputs.

    T^2 KL(teacher || student) of class scores; elsewhere the `relative_error`.

    Args:
        classes: places of the outputs that are class scores, with the classes along the last axis.
        counted: place -> bool tensor of that output's first axes: which positions count. All do, of outputs that are
            not in it.
    """
    losses = []
    for index, (mine, wanted) in enumerate(zip(outputs, teacher, strict=True)):
        if not mine.is_floating_point():
            continue
        mask = (counted or {}).get(index)
        if index in classes:
            one, other = (_chosen(scores, mask).flatten(0, -2) for scores in (mine, wanted))
            # One of the two networks may end in a softmax, and the other one not.
            log_mine, log_wanted = (_log_shares(scores, temperature, _are_shares(scores)) for scores in (one, other))
            divergence = functional.kl_div(log_mine, log_wanted, reduction="sum", log_target=True)
            losses.append(divergence / max(len(one), 1) * temperature**2)
        else:
            losses.append(relative_error(mine, wanted, mask))
    if not losses:
        raise UsageError("no output is real, so there is nothing to distill", fix="give --loss file.py:function")
    return torch.stack(losses).mean()


def relative_error(found: Tensor, wanted: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean squared error in units of the variance of what is wanted over the batch (of its mean square, where all its
    values are the same); a scalar.

    Args:
        counted: which positions of the first axes are compared; None for all.
    """
    found, goal = _chosen(found, counted).float(), _chosen(wanted, counted).float()
    spread, size = goal.var(correction=0), goal.square().mean()
    unit = torch.where(spread > 1e-6 * size, spread, size).clamp(min=1e-12)
    return functional.mse_loss(found, goal) / unit


def _chosen(values: Tensor, counted: Tensor | None) -> Tensor:
    return values if counted is None or bool(counted.all()) else values[counted]


def check_same_shapes(what: str, mine: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises UsageError unless both networks returned tensors of the same shapes."""
    shapes, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (mine, teacher))
    if shapes != wanted:
        raise UsageError(
            f"the teacher's {what}s have shapes {', '.join(map(str, wanted)) or 'none'}, the model's "
            f"{', '.join(map(str, shapes)) or 'none'}",
            where="training",
            fix="give a teacher that answers in the model's form, or train on labels alone (alpha = 1)",
        )


def labelled_scores(outputs: Sequence[Tensor], labels: Tensor | None, checked: str | None = None) -> int | None:
    """Place of the class scores that the labels are classes of: of the first real output with a batch and a class
    axis, the last. None where the labels are no class indices, or there is no such output.

    Args:
        checked: name of the data for the DataError that a label beyond the last class raises; None lets it pass.
    """
    index = next((i for i, o in enumerate(outputs) if o.is_floating_point() and o.dim() >= 2 and o.shape[-1] > 1), None)
    if labels is None or index is None or labels.is_floating_point() or labels.shape != outputs[index].shape[:-1]:
        return None
    count, highest = outputs[index].shape[-1], int(labels.max())
    if checked is not None and highest >= count:
        raise DataError(
            f"has the label {highest}, and the model has {count} classes, 0 to {count - 1}",
            where=checked,
            fix="number the classes from 0; negative labels are skipped",
        )
    return index


def _are_shares(scores: Tensor) -> bool:
    """Whether the model ends in a softmax already, judged by the values, (rows, classes)."""
    with torch.no_grad():
        # Hardly a row of logits looks like shares, so that a few tell.
        return len(scores) > 0 and _sum_to_one(scores[:_LOOKED_AT]) and _sum_to_one(scores)


def _sum_to_one(scores: Tensor) -> bool:
    real = scores.float()
    return bool((real >= 0).all()) and bool(((real.sum(-1) - 1).abs() < 0.02).all())


def _logits(scores: Tensor, are_shares: bool) -> Tensor:
    return scores.float().clamp(min=1e-9).log() if are_shares else scores.float()


def _log_shares(scores: Tensor, temperature: float, are_shares: bool) -> Tensor:
    # log softmax(log(p) / T) = log softmax(z / T) for p = softmax(z).
    logits = _logits(scores, are_shares)
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, -1)


class _UserLoss:
    def __init__(self, function: UserObject) -> None:
        if not callable(function.value):
            raise UsageError("is not a function", where=function.where)
        self._function = function.value
        self._object = function

    def source(self) -> bytes:
        file = getattr(self._object.module, "__file__", None)
        return Path(file).read_bytes() if file is not None else b""

    def __call__(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        with self._object.running("the loss failed"):
            value = self._function(outputs[0] if len(outputs) == 1 else tuple(outputs), labels)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError("returned no scalar tensor", where=self._object.where)
        return value.reshape(())
