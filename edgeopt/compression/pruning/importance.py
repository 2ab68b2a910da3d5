"""How much each unit is worth, on one scale for the whole network.

Scores are sums over a unit's channels, so that a head weighs as much as its channels together, and a block as much as
the prunable channels within it:

- "taylor" and "hessian" estimate how a loss changes without the unit, for units of every kind: they stay as they are.
- "l1", "l2", "gradient" and "activation" depend on how large a layer's weights happen to be: each group's scores are
  divided by their mean, so that its average channel scores 1.
- "mean-abs" and "batch-norm-scale" compare over layers by themselves; groups without batch normalization take their
  "l2" scores, brought to the mean of those that have it.
- "random" is uniform.

Where a criterion says nothing about blocks, a block scores what the average channel does, times the channels within it,
times how much the model's outputs change without the block in units of the mean over all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.pruning.activations import activation_scores
from edgeopt.compression.pruning.block_effects import block_influence
from edgeopt.compression.pruning.gradients import gradient_scores
from edgeopt.compression.pruning.groups import Prunable, PruningGroup
from edgeopt.compression.pruning.places import all_places
from edgeopt.compression.pruning.selection import channels_inside
from edgeopt.compression.pruning.statistics import ScoringData, layered_of, module_of
from edgeopt.compression.steps import Importance
from edgeopt.errors import ConversionError, UsageError
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    from torch import nn

    from edgeopt.progress import Progress

#: Criteria that can't do without samples.
DATA_DRIVEN: frozenset[Importance] = frozenset({"gradient", "taylor", "hessian", "activation"})
#: Criteria that estimate a loss: only their scores can be weighed against what a unit costs (`saved` of `choose`). The
#: others make the average channel of a costly layer worth no more than that of a cheap one, so it would always go.
ESTIMATE_LOSS: frozenset[Importance] = frozenset({"taylor", "hessian"})


def unit_scores(
    model: Model, prunable: Prunable, importance: Importance, data: ScoringData, seed: int, progress: Progress
) -> dict[str, Array]:
    """Group -> (units,) float64; higher is kept. The model is untouched, and equal arguments give equal scores.

    Magnitudes (l1, l2: norms; mean-abs: mean) go over all weights, without biases and normalizations, that leave the
    network with the unit, whichever side of a layer they are on (Fang et al. 2023, DepGraph). "batch-norm-scale" is
    |gamma| (Liu et al. 2017), the mean over a group's batch normalizations. The others: see `gradient_scores` and
    `activation_scores`.

    Raises:
        ConversionError: the network can't be run, or not be differentiated, or the scores aren't finite.
        DataError, UsageError: a criterion has no samples, labels or a loss that don't fit the model, or no batch
            normalization to go by.
    """
    if importance in DATA_DRIVEN and data.is_empty:
        raise UsageError(
            f"the importance {importance!r} needs samples",
            where="pruning",
            fix="give training or calibration data, or take l1, l2, mean-abs or batch-norm-scale",
        )
    if importance == "random":
        scores = _random_scores(prunable, seed)
    elif importance == "taylor" or importance == "hessian":
        scores = gradient_scores(model, prunable, importance, data, seed, progress)
    else:
        scores = _channel_scores(model, prunable, importance, data, seed, progress)
        influence = block_influence(model, prunable, data, seed, progress)
        scores |= _block_scores(prunable, scores, influence)
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise ConversionError(
                f"the importance {importance!r} of its units is not finite: weights or activations are not",
                where=f"layer {name!r}",
            )
    return {group.name: scores[group.name] for group in prunable.groups}


def _random_scores(prunable: Prunable, seed: int) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    return {
        group.name: draw.random(group.units)
        * (channels_inside(prunable, group.name) if group.kind == "blocks" else group.width)
        for group in prunable.groups
    }


def _channel_scores(
    model: Model, prunable: Prunable, importance: Importance, data: ScoringData, seed: int, progress: Progress
) -> dict[str, Array]:
    """Of all groups but blocks, by criteria that don't estimate a loss."""
    groups, module = layered_of(prunable), module_of(model)
    if importance == "batch-norm-scale":
        return _batch_norm_scores(module, groups)
    if importance == "mean-abs":
        return {group.name: _magnitude(module, group, importance) * group.width for group in groups}
    found: Mapping[str, Array | None]
    if importance == "gradient":
        found = gradient_scores(model, prunable, importance, data, seed, progress)
    elif importance == "activation":
        found = activation_scores(model, prunable, data, seed, progress)
    else:
        found = {group.name: _magnitude(module, group, importance) for group in groups}
    return {
        # Where no reader ever ran, the weights are all there is to go by.
        group.name: _even(group, values if (values := found[group.name]) is not None else _magnitude(module, group))
        for group in groups
    }


def _block_scores(prunable: Prunable, scores: Mapping[str, Array], influence: Mapping[str, float]) -> dict[str, Array]:
    mean = float(np.mean(list(influence.values()))) if influence else 0.0
    channels = sum(group.units * group.width for group in layered_of(prunable))
    per_channel = sum(float(values.sum()) for values in scores.values()) / channels if channels else 1.0
    return {
        name: np.array([per_channel * channels_inside(prunable, name) * (value / mean if mean > 0 else 1.0)])
        for name, value in influence.items()
    }


def _magnitude(module: nn.Module, group: PruningGroup, importance: Importance = "l2") -> Array:
    import torch

    every = all_places(module, group)
    places = [part for part in every if part.parameter.dim() > 1] or every
    if not places:
        raise ConversionError("has no weights to judge its units by", where=f"layer {group.name!r}")
    total, count = (torch.zeros(group.units, dtype=torch.float64) for _ in range(2))
    for part in places:
        weight = part.parameter.detach().double()
        total += part.per_unit(part.along_axis(weight.square() if importance == "l2" else weight.abs()))
        count += part.per_unit(part.along_axis(torch.ones_like(weight)))
    if importance == "l2":
        total = total.sqrt()
    return np.asarray((total / count if importance == "mean-abs" else total).numpy())


def _batch_norm_scores(module: nn.Module, groups: list[PruningGroup]) -> dict[str, Array]:
    scales = {group.name: _scales(module, group) for group in groups}
    known = [values for values in scales.values() if values is not None]
    if groups and not known:
        raise UsageError(
            "no layer that may be pruned has a batch normalization",
            where="importance 'batch-norm-scale'",
            fix="take another importance, such as l2",
        )
    mean = float(np.concatenate(known).mean()) if known else 1.0
    return {
        group.name: _even(group, _magnitude(module, group)) * mean if values is None else values * group.width
        for group in groups
        for values in (scales[group.name],)
    }


def _scales(module: nn.Module, group: PruningGroup) -> Array | None:
    """(units,): mean |gamma| of the group's batch normalizations; None where it has none with a scale."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [norm for path in group.layers if isinstance(norm := module.get_submodule(path), _BatchNorm)]
    scales = {id(norm.weight) for norm in norms}
    places = [part for part in all_places(module, group) if id(part.parameter) in scales]
    if not places:
        return None
    total, count = (torch.zeros(group.units, dtype=torch.float64) for _ in range(2))
    for part in places:
        scale = part.parameter.detach().abs()
        total += part.per_unit(scale)
        count += part.per_unit(torch.ones_like(scale))
    return np.asarray((total / count).numpy())


def _even(group: PruningGroup, values: Array) -> Array:
    """Such that the average unit scores as many as it has channels."""
    mean = float(values.mean())
    return values / mean * group.width if mean > 0 else values
