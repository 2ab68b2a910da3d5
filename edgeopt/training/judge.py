"""The score by which epochs are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.errors import DataError
from edgeopt.training.calls import explained, outputs_of
from edgeopt.training.data import parts, validation_batches
from edgeopt.training.losses import Loss, labelled_scores
from edgeopt.training.quantized_module import QuantizedModule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress
    from edgeopt.types import TensorSpec


class Judge:
    """Scores a module on validation data, as the file will compute: in eval mode, with fake quantization.

    Args:
        module: with its ranges set.
        teacher: the float network, in eval mode.
    """

    def __init__(
        self,
        module: QuantizedModule,
        teacher: nn.Module,
        data: Dataset,
        inputs: tuple[TensorSpec, ...],
        loss: Loss,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._module = module
        self._teacher = teacher
        self._data = data
        self._inputs = inputs
        self._loss = loss
        self._batch_size = batch_size
        self._progress = progress

    def score(self, accelerator: Accelerator) -> float:
        """Accuracy where labels are class indices, else the negative loss; the same in every process.

        Raises DataError where no label counts, or one names a class that the network does not score.
        """
        batches = validation_batches(self._data, self._inputs, self._batch_size)
        good = torch.zeros((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        was_training = self._module.training
        self._module.eval()
        try:
            with torch.no_grad():
                for index, batch in enumerate(self._progress.track(batches, "Validating", len(batches))):
                    if index % accelerator.num_processes != accelerator.process_index:
                        continue
                    on_device = tuple(tensor.to(accelerator.device) for tensor in batch)
                    value, weight = self._score_batch(*parts(on_device, self._inputs))
                    good, total = good + value, total + weight
        finally:
            self._module.train(was_training)
        sums = accelerator.reduce(torch.stack([good, total]).float().to(accelerator.device), "sum")
        if not float(sums[1]):
            raise DataError("has no sample with a label that counts", where="validation data")
        return float(sums[0] / sums[1])

    def _score_batch(self, arguments: tuple[Tensor, ...], labels: Tensor | None) -> tuple[float, float]:
        """Sum and count."""
        with explained("the network can't run the validation samples"):
            outputs = outputs_of(self._module, arguments)
            index = labelled_scores(outputs, labels, "validation data")
            if index is not None and labels is not None:
                counted = labels >= 0
                return float(((outputs[index].argmax(-1) == labels) & counted).sum()), float(counted.sum())
            teacher = outputs_of(self._teacher, arguments, self._module.rows) if self._loss.needs_teacher else []
            count = len(arguments[0])
            return -float(self._loss(outputs, labels, teacher)) * count, count
