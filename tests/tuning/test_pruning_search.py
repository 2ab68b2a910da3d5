"""The search for a plan, on costs that are made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from edgeopt.compression.pruning.groups import Plan, Prunable, PruningGroup, Slice
from edgeopt.errors import UsageError
from edgeopt.tuning.pruning_costs import Cost
from edgeopt.tuning.pruning_search import TOLERANCE, TRIALS, Limits, Search, within_limits
from edgeopt.types import Array, Model, TensorSpec

MODEL = Model("net", None, None, (TensorSpec("x", (1,), "float32"),), (), {}, None, (), (), "")


def group(name: str, units: int, kind: str = "channels", width: int = 1) -> PruningGroup:
    if kind == "blocks":
        return PruningGroup(name, "blocks", 1, 1, ())
    indices = np.arange(units * width).reshape(units, width)
    assert kind in ("channels", "heads")
    return PruningGroup(name, "heads" if kind == "heads" else "channels", units, width, (Slice(name, "out", indices),))


@dataclass
class MadeUp(Cost):
    """A cost that falls with the units of each group by the given prices, and is `worth` of that when measured."""

    prices: dict[str, float]
    worth: Callable[[float], float] = lambda saving: saving
    is_exact: bool = False
    by_efficiency: bool = True
    before: float = 1.0
    start: float = 1.0
    measured: list[float] = field(default_factory=list)

    def saving(self, model: Model, prunable: Prunable) -> Callable[[Plan], float]:
        del model, prunable
        return lambda plan: sum(self.prices[name] * len(units) for name, units in plan.items())

    def measure(self, model: Model, predicted: float) -> float:
        del predicted
        plan = {name: (0,) * int(count) for name, count in (part.split(":") for part in model.name.split())}
        self.measured.append(self.start - self.worth(self.saving(model, Prunable((), ()))(plan)))
        return self.measured[-1]


def remove(plan: Plan) -> Model:
    name = " ".join(f"{group}:{len(units)}" for group, units in plan.items())
    return Model(name, None, None, (), (), {}, None, (), (), "")


def search(
    prunable: Prunable,
    cost: MadeUp,
    scores: dict[str, Array] | None = None,
    limits: Limits | None = None,
    multiple: int = 8,
    are_losses: bool = True,
) -> Search:
    random = np.random.default_rng(0)
    scores = scores or {g.name: random.uniform(0.5, 1.5, g.units) for g in prunable.groups}
    limits = limits or Limits("global", multiple, 0.9, {})
    return Search(MODEL, prunable, scores, cost, cost.start, limits, remove, are_losses=are_losses)


TWO = Prunable((group("a", 64), group("b", 64)), ())
PRICES = {"a": 0.8 / 64, "b": 0.2 / 64}


def test_an_honest_prediction_is_met_at_once() -> None:
    cost = MadeUp(PRICES)
    trial = search(TWO, cost, multiple=1).reach(0.6, is_final=True)
    assert 0.6 * (1 - TOLERANCE) <= trial.cost <= 0.6
    assert len(cost.measured) == 1


@pytest.mark.parametrize("worth", [0.6, 0.8, 1.3])
def test_a_wrong_prediction_is_corrected_by_measuring(worth: float) -> None:
    cost = MadeUp(PRICES, worth=lambda saving: worth * saving)
    trial = search(TWO, cost, multiple=1).reach(0.6, is_final=True)
    assert 0.6 * (1 - TOLERANCE) <= trial.cost <= 0.6
    assert len(cost.measured) <= 3


def test_a_curved_cost_is_met_within_a_few_files() -> None:
    cost = MadeUp(PRICES, worth=lambda saving: saving**1.6)
    trial = search(TWO, cost, multiple=1).reach(0.5, is_final=True)
    assert 0.5 * (1 - 2 * TOLERANCE) <= trial.cost <= 0.5
    assert len(cost.measured) <= TRIALS


def test_noise_never_ends_above_the_goal() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        cost = MadeUp(PRICES, worth=lambda saving, random=random: saving * random.normal(0.9, 0.03))  # type: ignore[misc]
        assert search(TWO, cost, multiple=1).reach(0.6, is_final=True).cost <= 0.6


def test_coarse_widths_end_below_the_goal_without_trying_the_same_twice() -> None:
    cost = MadeUp(PRICES)
    trial = search(TWO, cost, multiple=32).reach(0.65, is_final=True)
    assert trial.cost <= 0.65
    assert len(cost.measured) == len(set(cost.measured))


def test_units_leave_by_what_they_save() -> None:
    # Equal scores: those of the dear group go first, though the other one comes first by name.
    prunable = Prunable((group("cheap", 64), group("dear", 64)), ())
    scores = {"cheap": np.ones(64), "dear": np.ones(64)}
    cost = MadeUp({"cheap": 0.1 / 64, "dear": 0.9 / 64})
    assert set(search(prunable, cost, scores).reach(0.8, is_final=True).plan) == {"dear"}


def test_a_block_goes_where_it_saves_most_per_lost_importance() -> None:
    prunable = Prunable((group("a", 64), group("block", 1, "blocks"), group("other", 1, "blocks")), ())
    scores = {"a": np.full(64, 1.0), "block": np.array([2.0]), "other": np.array([300.0])}
    cost = MadeUp({"a": 0.3 / 64, "block": 0.4, "other": 0.2})
    assert dict(search(prunable, cost, scores).reach(0.6, is_final=True).plan) == {"block": (0,)}
    scores["block"] = np.array([200.0])
    assert "block" not in search(prunable, cost, scores).reach(0.8, is_final=True).plan


def test_out_of_reach_says_how_far_it_goes() -> None:
    cost = MadeUp(PRICES, worth=lambda saving: 0.5 * saving)
    with pytest.raises(UsageError, match=r"0\.40x .* is out of reach: .* 0\.5[0-9]x"):
        search(TWO, cost).reach(0.4, is_final=True)


def test_on_the_way_the_nearest_will_do() -> None:
    cost = MadeUp(PRICES, worth=lambda saving: 0.5 * saving)
    trial = search(TWO, cost).reach(0.4, is_final=False)
    assert trial.cost == pytest.approx(min(cost.measured))


def test_a_pessimistic_prediction_is_measured_before_it_is_believed() -> None:
    cost = MadeUp({"a": 0.3 / 64, "b": 0.2 / 64}, worth=lambda saving: 1.5 * saving)
    built = search(TWO, cost)
    built.check_reachable(0.45)
    assert built.reach(0.45, is_final=True).cost <= 0.45
    with pytest.raises(UsageError, match="by the prediction"):
        built.check_reachable(0.1)


def test_exact_costs_take_the_first_plan_that_counts_out() -> None:
    cost = MadeUp(PRICES, is_exact=True, by_efficiency=False)
    trial = search(TWO, cost, multiple=32).reach(0.7, is_final=True)
    assert trial.cost <= 0.7
    assert len(cost.measured) == 1


def test_max_ratio_bounds_what_goes_over_all_rounds() -> None:
    # 64 units at first, 24 left: with max_ratio 0.75 another 8 may go.
    prunable = Prunable((group("a", 24), group("b", 64)), ())
    limits = Limits("global", 8, 0.75, {"a": 64, "b": 64})
    cost = MadeUp({"a": 0.02, "b": 0.001}, start=0.9)
    with pytest.raises(UsageError, match="out of reach"):
        search(prunable, cost, limits=limits).reach(0.5, is_final=True)
    trial = search(prunable, cost, limits=limits).reach(0.72, is_final=True)
    assert len(trial.plan["a"]) == 8


def test_units_that_must_stay_are_the_most_important_ones() -> None:
    prunable = Prunable((group("a", 4, "heads", width=16),), ())
    bounded = within_limits(prunable, {"a": np.array([3.0, 1.0, 2.0, 4.0])}, Limits("global", 16, 0.5, {"a": 4}))
    assert bounded["a"].tolist() == [np.inf, 1.0, 2.0, np.inf]


def test_scores_that_are_no_losses_are_not_weighed_against_savings() -> None:
    # An average channel scores 1 in every layer, so the dear layer would give all that it may.
    prunable = Prunable((group("cheap", 512), group("dear", 64)), ())
    scores = {"cheap": np.linspace(0.5, 1.5, 512), "dear": np.linspace(0.5, 1.5, 64)}
    cost = MadeUp({"cheap": 0.5 / 512, "dear": 0.5 / 64})
    losses, others = (
        search(prunable, cost, scores, multiple=1, are_losses=are).reach(0.6, is_final=True).plan
        for are in (True, False)
    )
    assert len(losses["dear"]) > 45
    assert len(others["dear"]) < 35


def test_max_ratio_bounds_how_many_blocks_go_over_all_rounds() -> None:
    # 4 of 8 blocks may go, 3 have gone before.
    prunable = Prunable(tuple(group(f"block{i}", 1, "blocks") for i in range(5)), ())
    scores = {f"block{i}": np.array([1.0 + i]) for i in range(5)}
    limits = Limits("global", 8, 0.5, {}, blocks=8)
    cost = MadeUp(dict.fromkeys(scores, 0.1), start=0.7)
    assert dict(search(prunable, cost, scores, limits).reach(0.6, is_final=True).plan) == {"block0": (0,)}
    with pytest.raises(UsageError, match=r"0\.50x of the cost .* is out of reach"):
        search(prunable, cost, scores, limits).reach(0.5, is_final=True)


def test_savings_that_come_early_do_not_end_in_removing_everything() -> None:
    # Every step on falls short of the goal by a little; all that may go is far beyond it.
    cost = MadeUp(PRICES, worth=lambda saving: 0.5 * saving**0.3)
    trial = search(TWO, cost, multiple=1).reach(0.57, is_final=True)
    assert 0.57 * (1 - 2 * TOLERANCE) <= trial.cost <= 0.57
    assert len(cost.measured) <= 2 * TRIALS + 1


def test_rounding_does_not_keep_a_counted_goal_from_being_met() -> None:
    # 0.8 - 4 * 0.05 is 0.6000000000000001.
    cost = MadeUp({"a": 0.05}, is_exact=True, by_efficiency=False, start=0.8)
    trial = search(Prunable((group("a", 16),), ()), cost, multiple=1).reach(0.6, is_final=True)
    assert len(trial.plan["a"]) == 4
