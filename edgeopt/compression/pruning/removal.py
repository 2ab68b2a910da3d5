"""Removing units from a network: every tensor becomes smaller, and every number that tells its size follows."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.compression.pruning.cuts import Cut, cuts_of, reading_cuts, set_width
from edgeopt.compression.pruning.groups import Plan, Prunable, PruningGroup
from edgeopt.compression.pruning.multihead import split_attentions
from edgeopt.errors import ConversionError
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn

#: (layer, bare parameter or "", side) -> channels of it that go.
_Removed = Mapping[tuple[str, str, Literal["out", "in"]], set[int]]


def remove_units(model: Model, prunable: Prunable, plan: Plan) -> Model:
    """A model without these units; the old one is untouched.

    Raises:
        ValueError: the plan names a group or a unit that there is none of, or all units of a group.
        ConversionError: a tensor that two layers share can't become smaller in both alike.
    """
    if model.module is None:
        raise ValueError("pruning takes a model with a torch module; see sources.as_torch")
    module = copy.deepcopy(model.module)
    remove_in_place(module, chosen(prunable, plan))
    return replace(model, module=module.eval(), native=None, input_ranges={})


def chosen(prunable: Prunable, plan: Plan) -> tuple[tuple[PruningGroup, tuple[int, ...]], ...]:
    """The plan's groups with the units that go.

    Raises ValueError when the plan names what is not there, or leaves a layer without channels.
    """
    groups = {group.name: group for group in prunable.groups}
    pairs = []
    for name, units in plan.items():
        if name not in groups:
            raise ValueError(f"no group {name!r}")
        group = groups[name]
        if len(set(units)) != len(units) or not all(0 <= unit < group.units for unit in units):
            raise ValueError(f"group {name!r} has units 0 to {group.units - 1}, each once")
        if len(units) == group.units and group.kind != "blocks":
            raise ValueError(f"group {name!r} would lose all its units")
        if units:
            pairs.append((group, tuple(units)))
    return tuple(pairs)


def remove_in_place(module: nn.Module, pairs: Iterable[tuple[PruningGroup, tuple[int, ...]]]) -> None:
    """`remove_units` on the module itself."""
    from edgeopt.sources.structure import PassThrough

    pairs = tuple(pairs)
    bypassed = tuple(group.name for group, _ in pairs if group.kind == "blocks")
    removed = split_attentions(module, _removed(pairs, bypassed))
    parts = dict(module.named_modules())
    _shrink(module, list(_cuts(parts, removed)))
    for (layer, parameter, side), channels in removed.items():
        if not parameter:
            set_width(parts[layer], side, channels)
    for group, units in pairs:
        for attribute in group.attributes:
            if not _lies_in(attribute.module, bypassed):
                owner = parts[attribute.module]
                setattr(owner, attribute.name, getattr(owner, attribute.name) - len(units) * attribute.per_unit)
    for group, _ in pairs:
        if group.kind == "blocks":
            module.set_submodule(group.name, PassThrough(group.returns, group.handed))


def silence_in_place(module: nn.Module, pairs: Iterable[tuple[PruningGroup, tuple[int, ...]]]) -> None:
    """Make whatever reads these units deaf to them: the weights that take them in become zero, in new tensors."""
    import torch

    parts = dict(module.named_modules())
    made: dict[int, torch.Tensor] = {}
    for (layer, parameter, side), channels in _removed(tuple(pairs), ()).items():
        if not parameter:
            for cut in reading_cuts(parts[layer], side, _ordered(channels)):
                tensor = parts[layer].get_parameter(cut.tensor)
                values = made.setdefault(id(tensor), tensor.detach().clone())
                values.index_fill_(cut.axis, torch.from_numpy(cut.places), 0.0)
    for owner, name, tensor in list(_tensors(parts.values())):
        if id(tensor) in made:
            setattr(owner, name, torch.nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad))


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy with the same tensors, which removal and silencing replace but never write to."""
    return copy.deepcopy(module, {id(tensor): tensor for _, _, tensor in _tensors(module.modules())})


def _tensors(parts: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Parameters and buffers with their owners, as often as they are owned."""
    for part in parts:
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                yield part, name, tensor


def parameter_axis(tensor: torch.Tensor) -> int:
    """Dimension of a bare parameter that has the channels: the last that is longer than 1."""
    return max(axis for axis, size in enumerate(tensor.shape) if size > 1)


def _removed(pairs: tuple[tuple[PruningGroup, tuple[int, ...]], ...], bypassed: tuple[str, ...]) -> _Removed:
    removed: dict[tuple[str, str, Literal["out", "in"]], set[int]] = defaultdict(set)
    for group, units in pairs:
        for part in group.slices:
            if not _lies_in(part.layer, bypassed):
                removed[part.layer, part.parameter, part.side].update(part.indices[list(units)].reshape(-1).tolist())
    return removed


def _lies_in(path: str, containers: Iterable[str]) -> bool:
    return any(path == container or path.startswith(f"{container}.") for container in containers)


def _ordered(channels: set[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(sorted(channels), dtype=np.int64)


def _cuts(parts: Mapping[str, nn.Module], removed: _Removed) -> Iterator[tuple[str, Cut]]:
    for (layer, parameter, side), channels in removed.items():
        owner = parts[layer]
        if parameter:
            axis = parameter_axis(getattr(owner, parameter))
            yield layer, Cut(parameter, axis, _ordered(channels))
        else:
            for cut in cuts_of(owner, side, _ordered(channels)):
                yield layer, cut


def _shrink(module: nn.Module, cuts: Iterable[tuple[str, Cut]]) -> None:
    """Cut the tensors of the module, each once, however many layers share it."""
    wanted: dict[tuple[str, str], dict[int, frozenset[int]]] = defaultdict(dict)
    for layer, cut in cuts:
        wanted[layer, cut.tensor][cut.axis] = frozenset(cut.places.tolist())
    made: dict[int, torch.Tensor] = {}
    asked: dict[int, tuple[str, dict[int, frozenset[int]]]] = {}
    kept: list[torch.Tensor] = []  # as long as they live, no other tensor has their identity
    for layer, part in module.named_modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None:
                continue
            axes = wanted.pop((layer, name), {})
            first, others = asked.setdefault(id(tensor), (layer, axes))
            if others != axes:
                raise ConversionError(
                    f"shares its {name!r} with layer {strip_wrapper(first)!r}, which would not lose the same of it",
                    where=f"layer {strip_wrapper(layer)!r}",
                )
            if axes:
                kept.append(tensor)
                if id(tensor) not in made:
                    made[id(tensor)] = _without(tensor, axes)
                # setattr, as recurrent layers keep a list of their weights up to date with it.
                setattr(part, name, made[id(tensor)])
    for layer, name in wanted:
        raise ConversionError(
            f"computes its {name!r} from other tensors (a parametrization)", where=f"layer {strip_wrapper(layer)!r}"
        )


def _without(tensor: torch.Tensor, axes: Mapping[int, frozenset[int]]) -> torch.Tensor:
    import torch

    values = tensor.detach()
    for axis, places in axes.items():
        left = [place for place in range(values.shape[axis]) if place not in places]
        values = values.index_select(axis, torch.tensor(left, device=values.device))
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values
