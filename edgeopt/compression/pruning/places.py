"""Where the units of a group lie in the parameters of a network, to add up what is known of single weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.pruning.cuts import Channels, Cut, cuts_of, reading_cuts
from edgeopt.compression.pruning.groups import PruningGroup, Slice
from edgeopt.compression.pruning.removal import parameter_axis

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """A group's units along one dimension of one parameter.

    Attributes:
        parameter: that holds them.
        axis: dimension of it.
        at: (n,): indices along the axis.
        units: (n,): the unit that each of them belongs to.
        count: units of the group.
    """

    parameter: torch.Tensor
    axis: int
    at: torch.Tensor
    units: torch.Tensor
    count: int

    def along_axis(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of values of the parameter's shape over all its other dimensions, in float64."""
        others = [axis for axis in range(values.dim()) if axis != self.axis]
        return values.double().sum(others) if others else values.double()

    def per_unit(self, along_axis: torch.Tensor) -> torch.Tensor:
        """(units,): sums of what is given for every index of the axis."""
        import torch

        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.units, along_axis[self.at].double())


def reading_places(module: nn.Module, group: PruningGroup) -> tuple[Places, ...]:
    """Where weights take the group's units in. A network in which these are zero behaves as if the units were gone."""
    return tuple(_places(module, group, reading=True))


def all_places(module: nn.Module, group: PruningGroup) -> tuple[Places, ...]:
    """Every parameter that becomes smaller with the group: producers, normalizations and readers."""
    return tuple(_places(module, group, reading=False))


def _places(module: nn.Module, group: PruningGroup, *, reading: bool) -> Iterator[Places]:
    import torch

    for part in group.slices:
        layer = module.get_submodule(part.layer)
        parameters = {name: own for name, own in layer._parameters.items() if own is not None}
        found: dict[tuple[str, int], list[tuple[int, Channels]]] = defaultdict(list)
        for unit, channels in enumerate(part.indices):
            for cut in _cuts(layer, part, np.sort(channels), reading=reading):
                found[cut.tensor, cut.axis].append((unit, cut.places))
        for (name, axis), cuts in found.items():
            if name in parameters and parameters[name].is_floating_point():
                at = np.concatenate([places for _, places in cuts])
                units = np.concatenate([np.full(len(places), unit, np.int64) for unit, places in cuts])
                yield Places(parameters[name], axis, torch.from_numpy(at), torch.from_numpy(units), group.units)


def _cuts(layer: nn.Module, part: Slice, channels: Channels, *, reading: bool) -> Iterable[Cut]:
    if part.parameter:
        axis = parameter_axis(layer.get_parameter(part.parameter))
        return () if reading else (Cut(part.parameter, axis, channels),)
    return reading_cuts(layer, part.side, channels) if reading else cuts_of(layer, part.side, channels)
