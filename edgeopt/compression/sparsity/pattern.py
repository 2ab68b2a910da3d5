"""Two of every four weights: the pattern that sparse matrix units take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GROUP, _KEPT = 4, 2


def two_of_four(scores: torch.Tensor, axis: int) -> torch.Tensor:
    """The mask that keeps the two best of every four consecutive weights.

    Consecutive means along the dimension that is summed over, each output, and each position of a convolution's
    kernel, for itself: a convolution as a matrix product over channel-last pictures has the input channels innermost
    (Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021). A last group with fewer than four weights counts
    as filled up with zeros, as hardware fills it, and keeps at most two.

    Args:
        scores: of the weight's shape, higher = keep; the first of equal ones stays.
        axis: of the input channels.

    Returns:
        Bool tensor of the same shape, true where the weight stays.
    """
    import torch

    groups = _groups(scores, axis, -torch.inf)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :_KEPT]
    stays = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
    return stays.flatten(-2)[..., : scores.shape[axis]].movedim(-1, axis)


def is_two_of_four(weight: torch.Tensor, axis: int) -> bool:
    """Whether no group of four has more than two weights that are not zero."""
    return bool(((_groups(weight.detach(), axis, 0.0) != 0).sum(-1) <= _KEPT).all())


def takes_pattern(shape: torch.Size, axis: int | None) -> bool:
    """Whether a weight has whole groups; one with fewer than four inputs (a first convolution on pictures) has none."""
    return axis is not None and shape[axis] >= _GROUP


def _groups(values: torch.Tensor, axis: int, filling: float) -> torch.Tensor:
    """That dimension last and in groups: (..., groups, 4)."""
    import torch

    last = values.movedim(axis, -1)
    padded = torch.nn.functional.pad(last, (0, -last.shape[-1] % _GROUP), value=filling)
    return padded.reshape(*padded.shape[:-1], -1, _GROUP)
