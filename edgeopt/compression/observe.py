"""Activations next to weights, seen while the samples run through the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgeopt.compression.base import PassInputs, forward
from edgeopt.compression.cost import no_fused_layers
from edgeopt.types import Model

if TYPE_CHECKING:
    import torch

#: Told about one call of an operator: the activation that it read and the one that it wrote.
Visit = Callable[["torch.Tensor", "torch.Tensor"], None]

#: What convolutions and linear operators arrive as below autograd -> position of the activation and of the weight.
_OPERATORS = {
    "aten.convolution": (0, 1),
    "aten._convolution": (0, 1),
    "aten.linear": (0, 1),
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten.addmm": (1, 2),
    "aten.baddbmm": (1, 2),
}


def observe(model: Model, inputs: PassInputs, visits: Mapping[str, Visit], title: str) -> None:
    """Run all samples and call the visitor of each weight (by its name in the module) at each use.

    Linear operators show their activations as (rows, channels) or (batch, rows, channels), convolutions as they are.
    Only what a visitor keeps stays in memory.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    if model.module is None or inputs.samples is None:
        raise ValueError("needs a module and samples")
    tensors = {name: tensor for name, tensor in model.module.state_dict(keep_vars=True).items() if name in visits}
    by_storage = {tensor.untyped_storage().data_ptr(): visits[name] for name, tensor in tensors.items()}

    def dispatch(
        _: object, func: Callable[..., object], __: object, args: Sequence[object], kwargs: Mapping[str, object] | None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        positions = _OPERATORS.get(str(func).rpartition(".")[0])
        if positions is not None:
            value, weight = (args[position] for position in positions)
            assert isinstance(value, torch.Tensor)
            assert isinstance(weight, torch.Tensor)
            assert isinstance(result, torch.Tensor)
            if visit := by_storage.get(weight.untyped_storage().data_ptr()):
                visit(value, result)
        return result

    # Made at run time: torch's base class has no types to inherit from.
    watch = type("Watch", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})
    for sample in inputs.progress.track(inputs.samples(), title, inputs.count):
        with no_fused_layers(), torch.no_grad(), watch():
            forward(model, sample.inputs)
