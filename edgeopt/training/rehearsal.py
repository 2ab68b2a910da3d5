"""The first batch, tried before training: what can't be trained is told before any long work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeopt.training.calls import batched, explained, outputs_of
from edgeopt.training.losses import Loss
from edgeopt.training.quantized_module import QuantizedModule

#: Outputs for a batch that differ more than this, relatively, from those for its samples are no float rounding.
_TOLERANCE = 0.01


def takes_batches(network: nn.Module, arguments: tuple[Tensor, ...], rows: Sequence[int]) -> bool:
    """Whether the network gives for a batch what it gives for its samples.

    Exported graphs, and code such as `x.view(1, -1)`, often have a batch size of their own.

    Args:
        network: in eval mode.
        rows: see `outputs_of`.

    Raises ConversionError where it can't run the samples at all.
    """
    with torch.no_grad():
        with explained("the network can't run the training samples"):
            single = outputs_of(network, arguments, rows)
        try:
            whole = outputs_of(network, arguments)
        except torch.OutOfMemoryError:
            return True  # that is no matter of shapes, and is told when the step is tried
        except Exception:  # a fixed batch size shows in whatever error the operator that trips over it has
            return False
    count = len(arguments[0]) // rows[0]
    return len(whole) == len(single) and all(_same(one, many, count) for one, many in zip(whole, single, strict=True))


def rehearse(
    module: QuantizedModule, teacher: nn.Module, loss: Loss, arguments: tuple[Tensor, ...], labels: Tensor | None
) -> None:
    """Run one training step on this batch without taking it.

    Args:
        teacher: the float network, in eval mode.
        arguments, labels: the first batch of training.

    Raises:
        DataError, UsageError: labels or a loss that don't fit the network; batch statistics of one sample.
        ConversionError: the network can't run in training mode, or no gradient can be found.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    module.train()
    try:
        with explained("the network can't be trained"):
            outputs = outputs_of(module, arguments)
            with torch.no_grad():
                taught = outputs_of(teacher, arguments, module.rows) if loss.needs_teacher else []
            torch.autograd.backward(loss(outputs, labels, taught))
    finally:
        module.eval()
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _same(whole: Tensor, single: Tensor, count: int) -> bool:
    whole = batched(whole)
    if whole.shape != single.shape:
        # `x.squeeze()` drops the batch axis of a single sample, which makes no difference to a batch.
        if len(whole) != count or whole.numel() != single.numel():
            return False
        single = single.reshape(whole.shape)
    if not whole.is_floating_point():
        return True  # an index may go either way in a tie
    error, size = (torch.nan_to_num(x.float()).norm() for x in (whole - single, single))
    return bool(error <= _TOLERANCE * size)
