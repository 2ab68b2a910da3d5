"""What can be removed from a network together: the values that pruning's parts hand to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Indices = np.ndarray[tuple[int, int], np.dtype[np.int64]]

#: Group -> the units of it that go, ascending. Groups that lose nothing are left out.
Plan = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Where the units of a group lie in one layer.

    Attributes:
        layer: path of the module in `Model.module`.
        side: whether they are output or input channels of the layer. A grouped (or depthwise) convolution, which loses
            whole groups, a normalization or an activation with parameters has only "out".
        indices: (units, k): the channels of that layer that go with each unit.
        parameter: name of the tensor below `layer` where that is no layer but holds a bare parameter (a positional
            embedding, a layer scale), whose last dimension longer than 1 has the channels; "" elsewhere.
    """

    layer: str
    side: Literal["out", "in"]
    indices: Indices
    parameter: str = ""


@dataclass(frozen=True, slots=True)
class Attribute:
    """A number in a module that follows a group's width: how many heads, how wide they are together.

    Attributes:
        module: path of the module that has it.
        name: of the attribute.
        per_unit: what every removed unit takes off it.
    """

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True, slots=True, eq=False)
class PruningGroup:
    """Units that can only be removed together from all the layers that share them.

    Attributes:
        name: path of the first layer that produces them; unique.
        kind: "channels", attention "heads", or "blocks" (one unit: a whole residual block; then no slices).
        units: how many there are.
        width: channels of the producing layer that one unit has; a head's dimension, 1 elsewhere.
        slices: every layer and side that is touched.
        attributes: what else must follow.
        returns: of a block: None where it returns a tensor, else the length of the tuple that it returns.
        handed: of such a tuple behind the first: which argument each is that the block hands on, -1 for None.
    """

    name: str
    kind: Literal["channels", "heads", "blocks"]
    units: int
    width: int
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()
    returns: int | None = None
    handed: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.layer for part in self.slices))


@dataclass(frozen=True, slots=True)
class Kept:
    """A layer that keeps its width, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Prunable:
    """What `analyse` found in a network.

    Attributes:
        groups: in the order in which the network's modules are listed, blocks last.
        kept: layers with weights whose outputs are in no group.
    """

    groups: tuple[PruningGroup, ...]
    kept: tuple[Kept, ...]

    def group(self, name: str) -> PruningGroup:
        return next(group for group in self.groups if group.name == name)
