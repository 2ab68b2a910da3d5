"""What training must keep to beside its loss: masks, penalties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


class Constraint(Protocol):
    """Holds a network to something while it is trained. All its state is in tensors of the module, or in its own."""

    def start(self, module: nn.Module) -> None:
        """Called once before the first step, with the network that is trained, on its device; may change its values.

        What it left is what is judged as epoch 0.
        """
        ...

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss of a batch, with its gradients; None adds nothing."""
        ...

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, to apply masks again, say; `step` counts from 1 to `steps`.

        A moving average of the weights, where there is one, is zero wherever the weights then are.
        """
        ...

    def state(self) -> Mapping[str, Tensor]:
        """What a resumed run needs beside the module's own tensors."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave, after `start`; the tensors are on the module's device."""
        ...


@runtime_checkable
class Tightening(Constraint, Protocol):
    """A constraint that grows over the steps. An epoch before it has settled is never kept as the best: it would win
    by what it need not yet keep to."""

    def is_settled(self) -> bool: ...
