"""Structured pruning as a pass: the removal of units that were chosen before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.pruning.groups import Plan, Prunable
from edgeopt.compression.pruning.removal import remove_units
from edgeopt.types import Model, Scheme, StepRecord


@dataclass(frozen=True, slots=True)
class StructuredPruning:
    """Make a network smaller by whole channels, attention heads and blocks.

    Attributes:
        prunable: what `analyse` found in this very network.
        plan: what goes.
        record: what the step's record tells beside how much went.
    """

    name: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = False

    prunable: Prunable
    plan: Plan
    record: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del model, scheme
        return None if any(self.plan.values()) else "the plan removes nothing"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """See `remove_units`, also for what it raises."""
        del inputs
        pruned = remove_units(model, self.prunable, self.plan)
        removed = {"channels": 0, "heads": 0, "blocks": 0}
        for name, units in self.plan.items():
            removed[self.prunable.group(name).kind] += len(units)
        counts = {f"removed_{kind}": count for kind, count in removed.items()}
        return replace(pruned, history=(*model.history, StepRecord(self.name, {**self.record, **counts})))
