"""A copy of a network that Torch-Pruning can trace: autograd must reach every weight, by operators that it knows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING

from edgeopt.compression.pruning.cuts import out_width

if TYPE_CHECKING:
    import torch
    from torch import nn


def traceable(module: nn.Module) -> nn.Module:
    """A copy whose every float tensor asks for gradients, and whose recurrent layers are one operator each.

    Constant buffers (sinusoidal positions) become parameters, as they must lose channels as well. Torch expands
    recurrent layers into operators per time step and gate, in which channels can't be followed.
    """
    from torch import nn

    traced = copy.deepcopy(module).eval()
    for part in traced.modules():
        if out_width(part) is None:
            for name, buffer in list(part._buffers.items()):
                if buffer is not None and buffer.is_floating_point() and buffer.ndim > 0:
                    del part._buffers[name]
                    part.register_parameter(name, nn.Parameter(buffer.detach().clone()))
        if isinstance(part, nn.RNNBase):
            part.forward = _one_operator(part)
        elif out_width(part) is not None and (plain := inspect.unwrap(type(part).forward)) is not type(part).forward:
            # Tables that never learn (Marian's positions) run under no_grad, where nothing can be followed.
            part.forward = MethodType(plain, part)
        part.training = False
    for tensor in traced.parameters():
        tensor.requires_grad_(tensor.is_floating_point())
    return traced


def _one_operator(layer: nn.RNNBase) -> Callable[..., object]:
    """Stands for the forward of a recurrent layer: the same shapes, and the same channels depend on one another."""
    import torch
    from torch import nn

    width = out_width(layer)
    assert width is not None
    weight = torch.full((width, layer.input_size), 0.1, requires_grad=True)

    def forward(input_: torch.Tensor, state: object = None) -> object:
        del state
        output = torch.nn.functional.linear(input_, weight)
        last = output[:, -1] if layer.batch_first or input_.ndim == 2 else output[-1]
        halves = torch.split(last, layer.hidden_size, dim=1) if layer.bidirectional else (last,)
        final = torch.stack([half for _ in range(layer.num_layers) for half in halves])
        return output, ((final, final) if isinstance(layer, nn.LSTM) else final)

    return forward
