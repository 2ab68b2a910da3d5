"""From the worth of every weight to those that go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Scope = Literal["global", "per-layer"]


def masks_for_share(scores: Mapping[str, torch.Tensor], share: float, scope: Scope) -> dict[str, torch.Tensor]:
    """Masks without the weights of lowest score.

    Args:
        scores: parameter -> the worth of each of its weights.
        share: of all these weights, 0..1, that at least goes; of each parameter's where the scope is "per-layer".
        scope: whether a weight is compared with all others, or with those of its own parameter.

    Returns:
        Parameter -> bool tensor, true where the weight stays. Exactly as many go as the share says, rounded up: among
        equal scores those go that come first.
    """
    if scope == "per-layer":
        return {name: part for key, score in scores.items() for name, part in _without({key: score}, share).items()}
    return _without(scores, share)


def magnitude_scores(weights: Mapping[str, torch.Tensor], scope: Scope) -> dict[str, torch.Tensor]:
    """The worth of weights by their size.

    Within a layer it is the magnitude. Magnitudes of different layers don't compare, least of all where a
    normalization follows and takes any scale out again, and a single threshold for them can empty a whole layer; so
    "global" takes the score of Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (LAMP, 2021):
    w^2 over the sum of w^2 of all weights of the layer that are no smaller. A layer's largest weight then scores 1.
    """
    import torch

    if scope == "per-layer":
        return {name: weight.detach().abs() for name, weight in weights.items()}
    scores = {}
    for name, weight in weights.items():
        magnitude, order = weight.detach().abs().flatten().sort()
        energy = magnitude.double().square()
        no_smaller = energy.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        score = torch.empty_like(energy)
        score[order] = energy / no_smaller
        scores[name] = score.reshape(weight.shape)
    return scores


def _without(scores: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    import math

    import torch

    flat = torch.cat([score.flatten() for score in scores.values()])
    # A share that was a count once must give this count again, in spite of its rounding.
    count = min(math.ceil(share * flat.numel() - 1e-6), flat.numel())
    stays = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    if count > 0:
        threshold = flat.kthvalue(count).values
        stays = flat > threshold
        equal = (flat == threshold).nonzero().flatten()
        stays[equal[count - int((flat < threshold).sum()) :]] = True
    parts = torch.split(stays, [score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
