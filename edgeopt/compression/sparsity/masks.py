"""Which weights may become zero, and which of them are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from edgeopt.compression.sparsity.products import Product, products_of
from edgeopt.errors import UsageError
from edgeopt.layer_names import layer_is_exempt

if TYPE_CHECKING:
    import torch

    from edgeopt.types import Model

#: Name of a parameter -> bool tensor of its shape, true where the weight stays.
Masks = Mapping[str, "torch.Tensor"]


def sparsifiable(model: Model, protect: Sequence[str] = ()) -> tuple[Product, ...]:
    """The weights that may become zero, in execution order, each once.

    These are the parameters that the example input is multiplied by: of linear layers, convolutions, recurrent layers,
    attention and plain matrix products. Biases and normalizations stay as they are, and so do embeddings, which no
    arithmetic is spent on, also where they are tied to an output layer, and convolutions with one input channel per
    group (depthwise ones), whose few weights are each a large part of their channel (Zhu and Gupta 2017).

    Args:
        protect: shell patterns of layers that stay dense, as `LayerRules` has them.

    Raises:
        UsageError: a pattern matches no layer with weights, or nothing is left.
    """
    found = products_of(model)
    for pattern in protect:
        if not any(layer_is_exempt(weight.layer, (pattern,)) for weight in found):
            near = get_close_matches(pattern, sorted({weight.layer for weight in found}), n=3, cutoff=0.0)
            raise UsageError(
                "matches no layer with weights that may become zero",
                where=f"protect {pattern!r}",
                fix=f"did you mean {' or '.join(map(repr, near))}?" if near else None,
            )
    left = tuple(weight for weight in found if not layer_is_exempt(weight.layer, protect))
    if not left:
        raise UsageError(
            "the model has no weights that may become zero"
            if not found
            else "every layer with weights is protected, so none may become zero",
            where="sparsify",
        )
    return left


def apply_masks(module: torch.nn.Module, masks: Masks) -> None:
    """Set the weights that go to zero, in place."""
    import torch

    with torch.no_grad():
        for name, mask in masks.items():
            # Not a product: that would keep the sign of a zero, and NaN.
            parameter = module.get_parameter(name)
            parameter.masked_fill_(~mask.to(parameter.device), 0.0)


def nonzero_masks(module: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The masks that keep a module's zeros where they are."""
    return {name: module.get_parameter(name).detach() != 0 for name in names}


@dataclass(frozen=True, slots=True)
class Zeros:
    """Shares of weights that are exactly zero, 0..1.

    Attributes:
        share: among all the weights that were to become sparse.
        lowest, highest: of the layers with the fewest and the most.
        of_all: the same zeros, among all parameters of the model, biases and embeddings included.
    """

    share: float
    lowest: float
    highest: float
    of_all: float


def count_zeros(module: torch.nn.Module, names: Sequence[str]) -> Zeros:
    """Of those parameters; `names` must not be empty."""
    weights = [module.get_parameter(name).detach() for name in names]
    zeros = [int((weight == 0).sum()) for weight in weights]
    sizes = [weight.numel() for weight in weights]
    shares = [count / size for count, size in zip(zeros, sizes, strict=True)]
    everything = sum(parameter.numel() for parameter in module.parameters())
    return Zeros(sum(zeros) / sum(sizes), min(shares), max(shares), sum(zeros) / everything)
