"""What a network loses without one of its blocks: measured on its outputs, or estimated from gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from math import sqrt
from typing import TYPE_CHECKING

from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.groups import Prunable, PruningGroup
from edgeopt.compression.pruning.statistics import ScoringData, blocks_of, explained, thawed
from edgeopt.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgeopt.progress import Progress

#: Samples on which networks without one block each are compared with the whole one.
_BLOCK_SAMPLES = 32


def block_influence(
    model: Model, prunable: Prunable, data: ScoringData, seed: int, progress: Progress
) -> dict[str, float]:
    """Block -> root of the mean squared change of the model's outputs without it, each output in units of its own mean
    square; on the example input where there are no samples."""
    import torch

    from edgeopt.training.calls import outputs_of

    blocks = blocks_of(prunable)
    if not blocks:
        return {}
    module = thawed(model)
    inputs = [model.example_inputs]
    if not data.is_empty:
        inputs = [sample.inputs for sample in islice(data.stream(seed), _BLOCK_SAMPLES)]
    totals = dict.fromkeys((block.name for block in blocks), 0.0)
    for arrays in progress.track(inputs, "Scoring blocks by what the model is without them", len(inputs)):
        arguments = arguments_of(model.inputs, arrays)
        with explained("importance of blocks"), torch.no_grad():
            whole = outputs_of(module, arguments)
            for block in blocks:
                with _bypassed(module.get_submodule(block.name)):
                    totals[block.name] += _change(whole, outputs_of(module, arguments))
    return {name: sqrt(total / len(inputs)) for name, total in totals.items()}


def _change(whole: Sequence[torch.Tensor], without: Sequence[torch.Tensor]) -> float:
    changes = [
        float((one.double() - other.double()).square().mean() / one.double().square().mean().clamp(min=1e-12))
        for one, other in zip(whole, without, strict=True)
        if one.is_floating_point()
    ]
    return sum(changes) / max(len(changes), 1)


def first_tensor(values: object) -> torch.Tensor:
    import torch
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


@contextmanager
def _bypassed(block: nn.Module) -> Iterator[None]:
    """The block's first output is its first input."""

    entered: list[torch.Tensor] = []

    def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        # A copy, as the block may work in place.
        entered.append(first_tensor((args, kwargs)).clone())

    def leave(_: nn.Module, __: object, output: object) -> object:
        passed = entered.pop()
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockEffects:
    """First-order changes of a loss without single blocks, found in the backward pass.

    `changes`: block -> change, of the last sample.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[PruningGroup]) -> None:
        self._module = module
        self._blocks = blocks
        self._entered: dict[str, list[torch.Tensor]] = {}
        self.changes: dict[str, float] = {}

    def named(self, others: Sequence[PruningGroup]) -> dict[str, PruningGroup]:
        """These blocks and other groups by their names."""
        return {group.name: group for group in (*others, *self._blocks)}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context for one sample's forward and backward pass."""
        self.changes = dict.fromkeys((block.name for block in self._blocks), 0.0)
        self._entered = {block.name: [] for block in self._blocks}
        handles = [handle for block in self._blocks for handle in self._hooks(block.name)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        from torch.autograd.graph import register_multi_grad_hook

        def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self._entered[name].append(first_tensor((args, kwargs)).detach().clone())

        def leave(_: nn.Module, __: object, output: object) -> None:
            found = first_tensor(output)
            lost = self._entered[name].pop() - found.detach()

            def note(gradient: torch.Tensor) -> None:
                self.changes[name] += float((gradient * lost).sum())

            if found.requires_grad:
                register_multi_grad_hook((found,), note, mode="any")

        block = self._module.get_submodule(name)
        return (block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave))
