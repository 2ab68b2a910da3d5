"""Calling the user's network: its outputs as a flat list, and what goes wrong in it as one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from edgeopt.errors import ConversionError, EdgeoptError, UsageError

Network = Callable[..., object]


def outputs_of(network: Network, arguments: Sequence[Tensor], rows: Sequence[int] | None = None) -> list[Tensor]:
    """The tensors that the network returns for a batch.

    Args:
        rows: entries of the first dimension that one sample has, per argument, for a network that takes one sample at
            a time: it then is called for each of them, and the results are joined. None hands the batch over whole.
    """
    if rows is None:
        return [leaf for leaf in tree_leaves(network(*arguments)) if isinstance(leaf, Tensor)]
    samples = zip(*(torch.split(a, count) for a, count in zip(arguments, rows, strict=True)), strict=True)
    results = [outputs_of(network, sample) for sample in samples]
    return [torch.cat([batched(part) for part in parts]) for parts in zip(*results, strict=True)]


def batched(output: Tensor) -> Tensor:
    """The same with a batch axis: a scalar counts as a batch of one."""
    return output if output.dim() else output.reshape(1)


@contextmanager
def explained(what: str, fix: str | None = None) -> Iterator[None]:
    """Run a block that executes the user's network.

    Args:
        what: the problem that a failure is, such as "the network can't be trained".
        fix: how to mend it, where torch's own words don't tell.

    Raises:
        UsageError: out of memory; batch statistics of a single value.
        ConversionError: any other failure.
    """
    try:
        yield
    except EdgeoptError:
        raise
    except torch.OutOfMemoryError as error:
        raise UsageError(
            "the accelerator's memory is full",
            where="training",
            fix="take a smaller --batch-size with --gradient-accumulation, or --gradient-checkpointing",
        ) from error
    except Exception as error:  # the network's own Python, and torch inside it, may raise anything
        text = next(iter(str(error).strip().splitlines()), "")
        if "more than 1 value per channel" in text:
            raise UsageError(
                "batch normalization can't be trained on one sample at a time",
                where="training",
                fix="give more training samples and a larger --batch-size, or keep its statistics: "
                "--freeze-batch-norm-after 0",
            ) from error
        detail = f"{type(error).__name__}: {text}".rstrip(": ")
        raise ConversionError(f"{what}: {detail}", where="training", fix=fix) from error
