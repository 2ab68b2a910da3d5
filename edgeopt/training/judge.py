"""The score by which epochs are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.errors import DataError
from edgeopt.training.calls import explained, outputs_of
from edgeopt.training.config import Score
from edgeopt.training.data import Kept, Parts, parts, validation_batches
from edgeopt.training.losses import Loss

if TYPE_CHECKING:
    from accelerate import Accelerator

    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress
    from edgeopt.types import Array, TensorSpec


class Judge:
    """Scores a module on validation data, as the file will compute: in eval mode, with fake quantization if any.

    Args:
        module: with its ranges set.
        teacher: in eval mode; None where the loss needs none.
        kept: the teacher's outputs for these data.
        sizes: how long the samples are, where they differ: they are judged in that order.
    """

    def __init__(
        self,
        module: nn.Module,
        teacher: nn.Module | None,
        data: Dataset,
        inputs: tuple[TensorSpec, ...],
        loss: Loss,
        batch_size: int,
        progress: Progress,
        kept: Kept | None = None,
        sizes: Array | None = None,
    ) -> None:
        self._module = module
        self._teacher = teacher
        self._data = data
        self._inputs = inputs
        self._loss = loss
        self._batch_size = batch_size
        self._progress = progress
        self._kept = kept
        self._sizes = sizes

    def score(self, accelerator: Accelerator) -> Score:
        """Accuracy where labels are class indices, else the negative loss; the same in every process.

        Raises DataError where no label counts, or one names a class that the network does not score.
        """
        batches = validation_batches(self._data, self._inputs, self._batch_size, self._kept, self._sizes)
        good = torch.zeros((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        is_accuracy = True
        was_training = self._module.training
        self._module.eval()
        try:
            with torch.no_grad():
                for index, batch in enumerate(self._progress.track(batches, "Validating", len(batches))):
                    if index % accelerator.num_processes != accelerator.process_index:
                        continue
                    on_device = tuple(tensor.to(accelerator.device) for tensor in batch)
                    value, weight, counts_classes = self._score_batch(parts(on_device, self._inputs, self._kept))
                    good, total, is_accuracy = good + value, total + weight, counts_classes
        finally:
            self._module.train(was_training)
        sums = accelerator.reduce(torch.stack([good, total]).float().to(accelerator.device), "sum")
        if not float(sums[1]):
            raise DataError("has no sample with a label that counts", where="validation data")
        return Score(float(sums[0] / sums[1]), int(sums[1]), is_accuracy)

    def _score_batch(self, batch: Parts) -> tuple[float, float, bool]:
        """Sum and count, and whether it is one of right answers."""
        arguments, labels = batch.arguments, batch.labels
        with explained("the network can't run the validation samples"):
            outputs = outputs_of(self._module, arguments)
            scores = self._loss.scores(outputs, labels, "validation data")
            if scores is not None and labels is not None:
                counted = labels >= 0
                return float(((scores.argmax(-1) == labels) & counted).sum()), float(counted.sum()), True
            taught: Sequence[Tensor] = batch.taught or ()
            if batch.taught is None and self._teacher is not None:
                taught = outputs_of(self._teacher, arguments)
            count = len(arguments[0])
            return (
                -float(self._loss_of(labels, bool(taught))(outputs, labels, taught, batch.sizes)) * count,
                count,
                False,
            )

    def _loss_of(self, labels: Tensor | None, has_teacher: bool) -> Loss:
        """What can be said without labels is the distance to the teacher."""
        if labels is not None or self._loss.task is None:
            return self._loss
        if not has_teacher:
            raise DataError("has no labels to judge the model by", where="validation data", fix="give labelled data")
        return replace(self._loss, task=None)
