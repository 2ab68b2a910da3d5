"""What a network will cost once a plan's units are gone, for very many plans: counted, not made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.cost import estimate_macs, is_inside, layer_shapes, macs_by_module
from edgeopt.compression.pruning.groups import Plan, Prunable
from edgeopt.compression.pruning.places import all_places
from edgeopt.compression.pruning.statistics import module_of
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    import torch
    from torch import nn


def planned_parameters(model: Model, prunable: Prunable) -> Callable[[Plan], int]:
    """Plan -> parameters of the network without its units, as `parameters_of` counts them."""
    tensors = _Tensors(module_of(model), prunable)
    return lambda plan: sum(tensors.left(plan).values())


def planned_macs(model: Model, prunable: Prunable) -> Callable[[Plan], int]:
    """Plan -> multiply-accumulates of the network without its units, as `macs_of` counts them.

    Convolutions and linear layers go by their shapes, recurrent ones (and others with several weights) by how many
    weights they keep, the products of an attention by its heads. All else stays until its block goes.
    """
    module = module_of(model)
    shapes, counts = layer_shapes(model), macs_by_module(model)
    tensors = _Tensors(module, prunable)
    shaped = {path: sum(s.macs for name, s in shapes.items() if _within(name, strip_wrapper(path))) for path in counts}
    several = {
        path: _Several(counts[path], tuple(names))
        for path, names in _weights(module).items()
        if path in counts and strip_wrapper(path) not in shapes
    }
    free = {path: counts[path] - shaped[path] for path in counts}
    for path in free:
        free[path] -= sum(layer.macs for name, layer in several.items() if _within(name, path))
    attentions = {
        group.name: owner
        for group in prunable.groups
        if group.kind == "heads" and (owner := _owner([a.module for a in group.attributes], free)) is not None
    }

    def macs(plan: Plan) -> int:
        blocks = _removed_blocks(prunable, plan)
        total = estimate_macs(shapes, prunable, plan) + free[""] - sum(free.get(block, 0) for block in blocks)
        left = tensors.left(plan)
        for path, layer in several.items():
            if not any(is_inside(path, block) for block in blocks):
                now = sum(left[name] for name in layer.weights)
                total += layer.macs * now // sum(tensors.sizes[name] for name in layer.weights)
        for name, owner in attentions.items():
            if plan.get(name) and not any(is_inside(owner, block) for block in blocks):
                total -= free[owner] * len(plan[name]) // prunable.group(name).units
        return total

    return macs


@dataclass(frozen=True, slots=True)
class _Several:
    """A layer with several weights, all of which work equally often: its multiply-accumulates and their names."""

    macs: int
    weights: tuple[str, ...]


class _Tensors:
    """Sizes of parameters as plans leave them; those that several layers share are there once.

    `sizes`: name of a parameter -> its elements, before.
    """

    def __init__(self, module: nn.Module, prunable: Prunable) -> None:
        self._prunable = prunable
        self._shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self.sizes = {name: prod(shape) for name, shape in self._shapes.items()}
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._owners = _owners(module, names)
        #: Group -> (parameter, axis, indices along it, the unit that each belongs to).
        self._places: dict[str, list[tuple[str, int, Array, Array]]] = {
            group.name: [
                (names[id(part.parameter)], part.axis, part.at.numpy(), part.units.numpy())
                for part in all_places(module, group)
            ]
            for group in prunable.groups
        }

    def left(self, plan: Plan) -> dict[str, int]:
        """Name -> elements that remain; 0 where the only owners were removed blocks."""
        lost: dict[str, dict[int, list[Array]]] = defaultdict(lambda: defaultdict(list))
        for group, units in plan.items():
            for name, axis, at, of_unit in self._places[group]:
                lost[name][axis].append(at[np.isin(of_unit, units)])
        sizes = dict(self.sizes)
        for name, axes in lost.items():
            shape = list(self._shapes[name])
            for axis, parts in axes.items():
                shape[axis] -= len(np.unique(np.concatenate(parts)))
            sizes[name] = prod(shape)
        if blocks := _removed_blocks(self._prunable, plan):
            for name, owners in self._owners.items():
                if all(any(is_inside(owner, block) for block in blocks) for owner in owners):
                    sizes[name] = 0
        return sizes


def _owners(module: nn.Module, names: Mapping[int, str]) -> dict[str, list[str]]:
    """Name of a parameter -> paths of all modules that own it."""
    owners: dict[str, list[str]] = defaultdict(list)
    for path, part in module.named_modules():
        for own in _own(part):
            owners[names[id(own)]].append(path)
    return owners


def _weights(module: nn.Module) -> dict[str, list[str]]:
    """Path of a layer -> names of the matrices that it owns, for those with more than one. Modules that hold others
    own tokens and positions, which multiply nothing."""
    found: dict[str, list[str]] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for path, part in module.named_modules():
        matrices = [names[id(own)] for own in _own(part) if own.dim() > 1]
        if len(matrices) > 1 and next(part.children(), None) is None:
            found[path] = matrices
    return found


def _own(part: nn.Module) -> Iterable[torch.nn.Parameter]:
    return (own for own in part._parameters.values() if own is not None)


def _within(path: str, container: str) -> bool:
    return not container or is_inside(path, container)


def _owner(modules: Sequence[str], free: Mapping[str, int]) -> str | None:
    """The innermost of the modules that multiplies activations with one another."""
    return max((path for path in modules if free.get(path, 0) > 0), key=len, default=None)


def _removed_blocks(prunable: Prunable, plan: Plan) -> list[str]:
    return [group.name for group in prunable.groups if group.kind == "blocks" and plan.get(group.name)]
