"""Smaller students of one model, made by width and depth multipliers from its own most important weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.groups import Plan, Prunable
from edgeopt.compression.pruning.removal import remove_units
from edgeopt.compression.pruning.selection import groups_inside, removal_chunks
from edgeopt.compression.steps import Importance
from edgeopt.errors import UsageError
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Literal

    from edgeopt.tuning.context import StepContext

#: Weights are compared by norm: it needs no data, and training follows anyway.
IMPORTANCE: Importance = "l2"
#: Widths that are looked at.
_WIDTHS = tuple(part / 32 for part in range(32, 0, -1))


@dataclass(frozen=True, slots=True)
class Shape:
    """Shares of a model's width and depth, in 0..1."""

    width: float
    depth: float

    @property
    def name(self) -> str:
        return f"width {self.width:.4g}, depth {self.depth:.4g}"


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """All students that can be made of one model.

    Attributes:
        model: what they are made of.
        prunable: its channels, attention heads and residual blocks.
        scores: group -> worth of each unit; higher is kept.
        multiple: widths end on multiples of this.
        floors: repeated blocks of the network, in execution order: residual blocks that go together.
    """

    model: Model
    prunable: Prunable
    scores: Mapping[str, Array]
    multiple: int
    floors: tuple[tuple[str, ...], ...]

    def plan(self, shape: Shape) -> Plan:
        """What goes.

        Every group of channels and every attention keeps at least `width` of its units, the best ones, up to the next
        multiple. Of the floors `depth` are kept, at least; those that go are spread evenly.
        """
        gone = [block for floor in self._removed_floors(shape.depth) for block in floor]
        inside = {name for block in gone for name in groups_inside(self.prunable, block)}
        plan: dict[str, tuple[int, ...]] = {}
        for group in self.prunable.groups:
            if group.name in gone:
                plan[group.name] = (0,)
            elif group.kind != "blocks" and group.name not in inside:
                chunks = removal_chunks(group, self.scores[group.name], self.multiple, 1 - shape.width)
                units = sorted(unit for chunk in chunks for unit in chunk)
                if units:
                    plan[group.name] = tuple(units)
        return plan

    def student(self, shape: Shape) -> Model:
        """An untrained student; its history is the model's."""
        return remove_units(self.model, self.prunable, self.plan(shape))

    def depths(self) -> tuple[float, ...]:
        """Depth multipliers that give different networks, falling from 1; at least one floor stays."""
        count = len(self.floors)
        return tuple((count - gone) / count for gone in range(count)) if count else (1.0,)

    def widths(self, depth: float) -> tuple[float, ...]:
        """Width multipliers that give different networks at that depth, falling from 1."""
        found: dict[int, float] = {}
        for width in _WIDTHS:
            cut = sum(map(len, self.plan(Shape(width, depth)).values()))
            found.setdefault(cut, width)
        return tuple(found.values())

    def _removed_floors(self, depth: float) -> tuple[tuple[str, ...], ...]:
        count = len(self.floors)
        # What rounding leaves of 0.7 x 10 floors are 7.
        gone = min(count - math.ceil(count * depth - 1e-9), count - 1)
        return tuple(self.floors[int((k + 0.5) * count / gone)] for k in range(gone))


def family_of(model: Model, context: StepContext, *, depth: bool) -> Family:
    """Find out what can be removed from the model, and what it is worth.

    Args:
        depth: whether residual blocks may go too.

    Raises ConversionError where the model's graph can't be followed.
    """
    from edgeopt.compression.pruning.importance import unit_scores
    from edgeopt.compression.pruning.statistics import ScoringData
    from edgeopt.device_profiles.channels import channel_multiple

    context.progress.step("Looking for what a smaller student can leave out")
    kinds: Collection[Literal["channels", "heads", "blocks"]] = ("channels", "heads", *(("blocks",) if depth else ()))
    prunable = analyse(model, kinds, ())
    # Blocks go by their places, so that only the units of layers are scored.
    layered = replace(prunable, groups=tuple(group for group in prunable.groups if group.kind != "blocks"))
    scores = unit_scores(model, layered, IMPORTANCE, ScoringData(), context.seed, context.progress)
    multiple = channel_multiple(context.job.device, context.job.scheme.precision)
    return Family(model, prunable, scores, multiple, floors_of(prunable))


def floors_of(prunable: Prunable) -> tuple[tuple[str, ...], ...]:
    """The residual blocks, those of one repeated layer together: of a transformer's layer both its attention and its
    feed-forward part go, or none."""
    floors: dict[str, list[str]] = {}
    for group in prunable.groups:
        if group.kind == "blocks":
            floors.setdefault(_floor(group.name), []).append(group.name)
    return tuple(map(tuple, floors.values()))


def _floor(path: str) -> str:
    """The path up to its last number: "layer.3.attention" -> "layer.3"."""
    numbered = re.match(r".*(?:^|\.)\d+(?=\.|$)", path)
    return path if numbered is None else numbered.group()


def check_smaller(family: Family, shape: Shape) -> None:
    """Raises UsageError where a student of that shape is the whole model, saying why."""
    if family.plan(shape):
        return
    kept = "; ".join(f"{strip_wrapper(layer.layer)}: {layer.reason}" for layer in family.prunable.kept[:3])
    why = f" ({kept})" if kept else ""
    blocks = "" if shape.depth == 1 else f", and has {len(family.floors)} blocks to leave out"
    raise UsageError(
        f"the model can't be made smaller: no layer has more than {family.multiple} channels that may go{why}{blocks}",
        where=f"student of {shape.name}",
        fix="give a smaller width or depth, or a student of your own",
    )
