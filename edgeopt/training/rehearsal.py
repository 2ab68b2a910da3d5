"""The first batch, tried before training: what can't be trained is told before any long work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeopt.training.calls import batched, explained, outputs_of
from edgeopt.training.losses import Axes, Loss
from edgeopt.training.padding import free_dims
from edgeopt.training.trainable import Trainable
from edgeopt.types import Dim, TensorSpec

#: Outputs for a batch that differ more than this, relatively, from those for its samples are no float rounding.
_TOLERANCE = 0.01
#: Samples of the batch that are run one by one to compare.
_COMPARED = 4


def takes_batches(network: nn.Module, arguments: tuple[Tensor, ...], rows: Sequence[int]) -> bool:
    """Whether the network gives for a batch what it gives for its samples.

    Exported graphs, and code such as `x.view(1, -1)`, often have a batch size of their own.

    Args:
        network: in eval mode.
        rows: see `outputs_of`.

    Raises ConversionError where it can't run the samples at all.
    """
    count = len(arguments[0]) // rows[0]
    few = min(count, _COMPARED)
    with torch.no_grad():
        with explained("the network can't run the training samples"):
            first = tuple(argument[: few * size] for argument, size in zip(arguments, rows, strict=True))
            single = outputs_of(network, first, rows)
        try:
            whole = outputs_of(network, arguments)
        except torch.OutOfMemoryError:
            return True  # that is no matter of shapes, and is told when the step is tried
        except Exception:  # a fixed batch size shows in whatever error the operator that trips over it has
            return False
    return len(whole) == len(single) and all(
        _same(many, one, count, few) for many, one in zip(whole, single, strict=True)
    )


def free_axes(network: nn.Module, arguments: tuple[Tensor, ...], inputs: tuple[TensorSpec, ...]) -> tuple[Axes, ...]:
    """For each tensor that the network returns and each of its axes behind the batch, which of the inputs' free
    dimensions it goes along: found by running one sample at several lengths.

    Args:
        network: in eval mode.

    Raises ConversionError where it can't run the samples at all.
    """
    dims = free_dims(inputs)
    if not dims:
        return ()
    first = tuple(argument[:1] for argument in arguments)
    with torch.no_grad():
        with explained("the network can't run the training samples"):
            shapes = [tuple(output.shape) for output in outputs_of(network, first)]
        axes: list[list[int | None]] = [[None] * (len(shape) - 1) for shape in shapes]
        for place, dim in enumerate(dims):
            other = [_resized(argument, spec, dim) for argument, spec in zip(first, inputs, strict=True)]
            with explained(f"the network can't run samples of different {dim}"):
                changed = [tuple(output.shape) for output in outputs_of(network, other)]
            for found, one, two in zip(axes, shapes, changed, strict=False):
                if len(one) == len(two):
                    pairs = enumerate(zip(one[1:], two[1:], strict=True))
                    found[:] = [place if a != b else found[axis] for axis, (a, b) in pairs]
    return tuple(map(tuple, axes))


def _resized(argument: Tensor, spec: TensorSpec, dim: str) -> Tensor:
    """One shorter along that dimension; one longer, where it is as short as can be."""
    for axis, size in enumerate(spec.shape):
        if axis and isinstance(size, Dim) and size.name == dim:
            length = argument.shape[axis]
            kept = argument.narrow(axis, 0, max(length - 1, 1))
            argument = kept if length > max(size.min, 1) else torch.cat([argument, argument.narrow(axis, 0, 1)], axis)
    return argument


def rehearse(
    module: Trainable,
    teacher: nn.Module | None,
    loss: Loss,
    arguments: tuple[Tensor, ...],
    labels: Tensor | None,
    sizes: Tensor | None = None,
) -> None:
    """Run one training step on this batch without taking it.

    Args:
        teacher: in eval mode; None where the loss needs none.
        arguments, labels, sizes: the first batch of training.

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
                taught = [] if teacher is None else outputs_of(teacher, arguments)
            torch.autograd.backward(loss(outputs, labels, taught, sizes))
    finally:
        module.eval()
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _same(whole: Tensor, single: Tensor, count: int, few: int) -> bool:
    """Whether an output for `count` samples begins with that for the first few, which were run one by one."""
    whole = batched(whole)
    is_alike = (len(whole) * few, *whole.shape[1:]) == (len(single) * count, *single.shape[1:])
    # `x.squeeze()` drops the batch axis of a single sample, which makes no difference to a batch.
    is_squeezed = len(whole) == count and whole.numel() * few == single.numel() * count
    if not (is_alike or is_squeezed):
        return False
    if not whole.is_floating_point():
        return True  # an index may go either way in a tie
    begin = whole[: len(whole) * few // count]
    single = single.reshape(begin.shape)
    error, size = (torch.nan_to_num(x.float()).norm() for x in (begin - single, single))
    return bool(error <= _TOLERANCE * size)
