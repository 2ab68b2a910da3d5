"""A penalty that draws whole units to zero while a network is trained, so that removing them costs less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgeopt.compression.pruning.places import Places, all_places

if TYPE_CHECKING:
    from edgeopt.compression.pruning.groups import Prunable
    from edgeopt.training.constraint import Constraint


class GroupLasso:
    """strength * sum over units of sqrt(weights of a unit) * ||w_unit||_2 (Yuan and Lin 2006; Wen et al. 2016), over
    all the layers that share a unit, as they are pruned together (Fang et al. 2023). Scales, biases and blocks are
    left out.

    See `edgeopt.training.constraint.Constraint`.

    Args:
        zeros: of an earlier step, which stay.
    """

    def __init__(self, prunable: Prunable, strength: float, zeros: Constraint | None = None) -> None:
        self._prunable = prunable
        self._zeros = zeros
        self._strength = strength
        self._groups: list[tuple[tuple[Places, ...], Tensor]] = []

    def start(self, module: nn.Module) -> None:
        if self._zeros is not None:
            self._zeros.start(module)
        for group in self._prunable.groups:
            places = tuple(part for part in all_places(module, group) if part.parameter.dim() > 1)
            if places:
                counts = sum(_per_unit(part, torch.ones_like(part.parameter)) for part in places)
                assert isinstance(counts, Tensor)
                self._groups.append((places, counts.sqrt()))

    def penalty(self) -> Tensor | None:
        if not self._groups:
            return None
        terms = []
        for places, weights in self._groups:
            squares = torch.stack([_per_unit(part, part.parameter.float().square()) for part in places]).sum(0)
            # The root has no gradient at zero, where a unit is what it shall become.
            terms.append((weights * (squares + 1e-12).sqrt()).sum())
        return self._strength * torch.stack(terms).sum()

    def after_step(self, step: int, steps: int) -> None:
        if self._zeros is not None:
            self._zeros.after_step(step, steps)

    def state(self) -> Mapping[str, Tensor]:
        return {} if self._zeros is None else self._zeros.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        if self._zeros is not None:
            self._zeros.restore(state)


def _per_unit(places: Places, values: Tensor) -> Tensor:
    """(units,): sums of values of the parameter's shape, on its device."""
    others = [axis for axis in range(values.dim()) if axis != places.axis]
    along = values.sum(others)
    at, units = places.at.to(along.device), places.units.to(along.device)
    return torch.zeros(places.count, device=along.device).index_add(0, units, along[at].float())
