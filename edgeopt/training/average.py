"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a module's parameters and buffers.

    Args:
        module: what is averaged.
        decay: of the average; None keeps none, and then nothing here has an effect.
        keep_zeros: what is zero in the module is zero in the average too, however lately it became so.

    Attributes:
        tensors: the average under the names of the module's state; empty until `start`.
    """

    def __init__(self, module: nn.Module, decay: float | None, *, keep_zeros: bool = False) -> None:
        self._module = module
        self._decay = decay
        self._keep_zeros = keep_zeros
        self.tensors: dict[str, Tensor] = {}

    def start(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Begin with the module as it is, or with what an earlier run had."""
        if self._decay is not None:
            start = self._module.state_dict() if tensors is None else tensors
            self.tensors = {name: tensor.detach().clone() for name, tensor in start.items()}

    def update(self, step: int) -> None:
        """Take the module in, as it is after `step` steps."""
        if self._decay is None:
            return
        # Early steps forget faster, so that the average does not stay at the start.
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, tensor in self._module.state_dict().items():
                average = self.tensors[name]
                if not tensor.is_floating_point():
                    average.copy_(tensor)
                    continue
                average.lerp_(tensor, 1 - decay)
                if self._keep_zeros:
                    average.masked_fill_(tensor == 0, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averaged weights in the module, inside the block."""
        if not self.tensors:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._module.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self._module.load_state_dict(own)
