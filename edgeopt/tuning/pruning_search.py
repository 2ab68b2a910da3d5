"""Finds the units whose removal brings a model's measured cost to a goal, at the least loss of importance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, gcd
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.pruning.selection import channels_inside, choose, plan_of, removal_chunks, removal_order
from edgeopt.errors import UsageError
from edgeopt.types import Array

if TYPE_CHECKING:
    from edgeopt.compression.pruning.groups import Plan, Prunable
    from edgeopt.compression.pruning.selection import Scope
    from edgeopt.tuning.pruning_costs import Cost, Saving
    from edgeopt.types import Model

#: How far below the goal a measured cost may lie before a less drastic plan is tried.
TOLERANCE = 0.02
#: Files that are made for one goal; goals on the way to it are met by what the first ones tell.
TRIALS, TRIALS_ON_THE_WAY = 5, 2
#: What a predicted saving is worth at least, even after a file that turned out no cheaper at all.
MIN_WORTH = 0.2
#: A prediction that the goal is out of reach by less than this factor is measured before it is believed.
DOUBT = 1.3

#: A plan as a key.
_Key = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """See `steps.Prune`.

    Attributes:
        widest: units of every group before the step: `max_ratio` bounds what goes over all rounds. Groups that are not
            named have lost nothing yet.
        blocks: how many could go before the step.
    """

    scope: Scope
    multiple: int
    max_ratio: float
    widest: Mapping[str, int]
    blocks: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A plan, the model without its units, and what that costs as a share of the model before the step."""

    plan: Plan
    model: Model
    cost: float


class Search:
    """Plans for one model on the way to a goal.

    Args:
        prunable, scores: of the model.
        cost: what is aimed at.
        start: the model's cost now, as a share of the one before the step.
        limits: which plans are allowed.
        remove: makes the model without a plan's units.
        are_losses: whether the scores can be weighed against what a unit saves; see `importance.ESTIMATE_LOSS`.
    """

    def __init__(
        self,
        model: Model,
        prunable: Prunable,
        scores: Mapping[str, Array],
        cost: Cost,
        start: float,
        limits: Limits,
        remove: Callable[[Plan], Model],
        *,
        are_losses: bool,
    ) -> None:
        self._prunable = prunable
        self._scores = within_limits(prunable, scores, limits)
        self._cost = cost
        self._start = start
        self._limits = limits
        self._remove = remove
        self._is_weighed = are_losses and cost.by_efficiency and limits.scope == "global"
        self._saving = _remembered(cost.saving(model, prunable))
        #: Predicted savings and the costs that were measured there; a line runs from one to the next.
        self._known = [(0.0, start)]
        self._tried: dict[_Key, Trial] = {}

    def check_reachable(self, target: float) -> None:
        """Raises UsageError where a goal is so far off that no measurement would bring it nearer."""
        least = self._predicted(self._everything())
        if not meets(least, target * (1 if self._cost.is_exact else DOUBT)):
            raise self._out_of_reach(target, least, "by the prediction")

    def reach(self, target: float, *, is_final: bool) -> Trial:
        """The plan whose measured cost is closest below the target, and within `TOLERANCE` of it where the allowed
        widths permit.

        Args:
            is_final: whether the target must be met; otherwise the nearest cost that was found will do.

        Raises UsageError when the target is out of reach; it says how far the model can go.
        """
        met = self._approach(target, TRIALS if is_final else TRIALS_ON_THE_WAY)
        if met is None and is_final and not self._reached(target):
            last = self._measured(self._everything())
            if not meets(last.cost, target):
                least = min(trial.cost for trial in self._tried.values())
                how = "counted" if self._cost.is_exact else "measured"
                raise self._out_of_reach(target, least, how)
            # Now the goal lies between two costs that were measured.
            met = self._approach(target, TRIALS)
        if met is not None:
            return met
        if reached := self._reached(target):
            return max(reached, key=lambda trial: trial.cost)
        return min(self._tried.values(), key=lambda trial: abs(trial.cost - target))

    def _approach(self, target: float, trials: int) -> Trial | None:
        """The first plan whose cost is close enough below the target; None where so many trials find none, or the
        prediction comes back to a plan that was tried."""
        aim, misses = target, 0
        for _ in range(trials):
            plan = self._choose(aim)
            if _key(plan) in self._tried:
                return None
            trial = self._measured(plan)
            is_met = meets(trial.cost, target)
            if is_met and (self._cost.is_exact or trial.cost >= target * (1 - TOLERANCE)):
                return trial
            if not is_met and not self._cost.is_exact:
                # The third one must not miss the target by the error of a measurement alone.
                aim = target * (1 - TOLERANCE / 2 * misses)
                misses += 1
        return None

    def _reached(self, target: float) -> list[Trial]:
        return [trial for trial in self._tried.values() if meets(trial.cost, target)]

    def _choose(self, target: float) -> Plan:
        limits = self._limits
        try:
            plan = choose(
                self._prunable,
                self._scores,
                self._predicted,
                target,
                scope=limits.scope,
                multiple=limits.multiple,
                max_ratio=limits.max_ratio,
                saved=self._saved() if self._is_weighed else None,
            )
        except UsageError:
            return self._everything()
        return _allowed(plan, self._scores)

    def _measured(self, plan: Plan) -> Trial:
        """Once for every plan."""
        if (known := self._tried.get(_key(plan))) is not None:
            return known
        model = self._remove(plan)
        trial = Trial(plan, model, self._cost.measure(model, self._predicted(plan)))
        self._known = sorted([*self._known, (self._saving(plan), trial.cost)])
        self._tried[_key(plan)] = trial
        return trial

    def _predicted(self, plan: Plan) -> float:
        """Between what was measured, along the line; beyond it, along that from the start to the last point."""
        saving = self._saving(plan)
        savings, costs = np.array(self._known).T
        # More that goes costs no more; that it does is noise.
        falling = np.minimum.accumulate(costs)
        last, least = float(savings[-1]), float(falling[-1])
        if saving <= last:
            return float(np.interp(saving, savings, falling))
        worth = (self._start - least) / last if last > 0 else 1.0
        return least - max(worth, MIN_WORTH) * (saving - last)

    def _everything(self) -> Plan:
        """All that may go."""
        limits = self._limits
        order = removal_order(
            self._prunable,
            self._scores,
            scope=limits.scope,
            multiple=limits.multiple,
            max_ratio=limits.max_ratio,
        )
        return _allowed(plan_of(self._prunable, order), self._scores)

    def _saved(self) -> dict[str, list[float]]:
        """What each chunk of each group saves once those before it are gone."""
        return {name: list(self._savings_of(name)) for name in (group.name for group in self._prunable.groups)}

    def _savings_of(self, name: str) -> Iterator[float]:
        group = self._prunable.group(name)
        gone: list[int] = []
        before = 0.0
        for units in removal_chunks(group, self._scores[name], self._limits.multiple, self._limits.max_ratio):
            gone += units
            after = self._saving({name: tuple(sorted(gone))})
            yield max(after - before, 0.0)
            before = after

    def _out_of_reach(self, target: float, least: float, how: str) -> UsageError:
        text = self._cost.text
        return UsageError(
            f"{text(target)} is out of reach: without all that may go it is {text(least)} ({how})",
            where="prune",
            fix="allow more with a smaller multiple, a larger max-ratio, fewer protected layers or more kinds of "
            "units, or set a less ambitious goal",
        )


def meets(cost: float, target: float) -> bool:
    """Whether a goal is met, by all but rounding: what a round has left minus what the next one saves, say."""
    return cost <= target * (1 + 1e-9)


def within_limits(prunable: Prunable, scores: Mapping[str, Array], limits: Limits) -> dict[str, Array]:
    """The scores, infinite for the units that must stay because their group has lost as much as it may."""
    bounded = {}
    for group in prunable.groups:
        if group.kind == "blocks":
            continue
        values = np.array(scores[group.name], dtype=np.float64)
        # Widths of the device only, as `removal_chunks` has them: a chunk stays or goes as a whole.
        step = limits.multiple // gcd(limits.multiple, group.width)
        least = ceil(limits.widest.get(group.name, group.units) * (1 - limits.max_ratio) - 1e-9)
        may_go = max(group.units - ceil(least / step) * step, 0)
        values[np.argsort(values, kind="stable")[may_go:]] = np.inf
        bounded[group.name] = values
    return bounded | _bounded_blocks(prunable, scores, limits)


def _bounded_blocks(prunable: Prunable, scores: Mapping[str, Array], limits: Limits) -> dict[str, Array]:
    """Block -> its score, infinite for those that must stay."""
    names = [group.name for group in prunable.groups if group.kind == "blocks"]
    before = max(limits.blocks, len(names))
    may_go = max(int(before * limits.max_ratio + 1e-9) - (before - len(names)), 0)
    worth = sorted(names, key=lambda name: float(scores[name][0]) / channels_inside(prunable, name))
    return {
        name: np.array([scores[name][0] if place < may_go else np.inf], dtype=np.float64)
        for place, name in enumerate(worth)
    }


def _allowed(plan: Plan, scores: Mapping[str, Array]) -> Plan:
    """Without the units that must stay."""
    left = {name: tuple(unit for unit in units if np.isfinite(scores[name][unit])) for name, units in plan.items()}
    return {name: units for name, units in left.items() if units}


def _key(plan: Plan) -> _Key:
    return tuple(sorted(plan.items()))


def _remembered(saving: Saving) -> Saving:
    known: dict[_Key, float] = {}

    def remembered(plan: Plan) -> float:
        key = _key(plan)
        if key not in known:
            known[key] = saving(plan)
        return known[key]

    return remembered
