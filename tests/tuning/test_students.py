"""Which students a model has, and which of them a search takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeopt.compression.pruning.groups import Kept, Prunable, PruningGroup, Slice
from edgeopt.compression.steps import Goal
from edgeopt.errors import UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import TrainingConfig
from edgeopt.tuning import student_search
from edgeopt.tuning.student_search import Candidate, brief, search
from edgeopt.tuning.students import Family, Shape, check_smaller, floors_of
from edgeopt.types import Model

MODEL = Model("net", None, None, (), (), {}, None, (), (), "0" * 64)


def channels(name: str, units: int) -> PruningGroup:
    return PruningGroup(name, "channels", units, 1, (Slice(name, "out", np.arange(units).reshape(-1, 1)),))


def block(name: str) -> PruningGroup:
    return PruningGroup(name, "blocks", 1, 1, ())


def family(*groups: PruningGroup, multiple: int = 1) -> Family:
    prunable = Prunable(groups, (Kept("head", "makes an output"),))
    scores = {group.name: np.arange(group.units, dtype=np.float64)[::-1].copy() for group in groups}
    return Family(MODEL, prunable, scores, multiple, floors_of(prunable))


BLOCKS = [block(f"layer.{i}") for i in range(4)]


def test_every_layer_keeps_its_best_channels_up_to_a_multiple() -> None:
    some = family(channels("a", 16), channels("b", 8), channels("c", 4), multiple=4)
    plan = some.plan(Shape(0.4, 1.0))
    # 0.4 x 16 is above 4 and below 8, 0.4 x 8 below 4; nothing is narrower than a multiple.
    assert plan == {"a": tuple(range(8, 16)), "b": tuple(range(4, 8))}
    assert some.plan(Shape(1.0, 1.0)) == {}


@pytest.mark.parametrize(
    ("depth", "gone"),
    [(1.0, []), (0.75, [2]), (0.5, [1, 3]), (0.25, [0, 2, 3]), (0.01, [0, 2, 3])],
)
def test_blocks_go_evenly_and_one_stays(depth: float, gone: list[int]) -> None:
    assert sorted(family(*BLOCKS).plan(Shape(1.0, depth))) == [f"layer.{i}" for i in gone]


def test_widths_that_make_no_difference_are_left_out() -> None:
    some = family(channels("a", 32), channels("b", 16), *BLOCKS, multiple=8)
    assert some.widths(1.0) == (1.0, 0.75, 0.5, 0.25)
    assert family(*BLOCKS).widths(0.5) == (1.0,)


def test_what_lies_in_a_removed_block_is_not_cut_as_well() -> None:
    inner = [channels(f"layer.{i}.conv", 8) for i in range(4)]
    plan = family(*BLOCKS, *inner).plan(Shape(0.5, 0.5))
    assert sorted(plan) == ["layer.0.conv", "layer.1", "layer.2.conv", "layer.3"]


def test_both_parts_of_a_transformers_layer_go_together() -> None:
    parts = [block(f"encoder.layer.{i}.{part}") for i in range(2) for part in ("attention", "output")]
    some = family(*parts)
    assert some.floors == tuple((f"encoder.layer.{i}.attention", f"encoder.layer.{i}.output") for i in range(2))
    assert some.depths() == (1.0, 0.5)
    assert family(channels("a", 8)).depths() == (1.0,)


def test_a_model_that_cant_be_smaller_says_why() -> None:
    with pytest.raises(UsageError, match=r"no layer has more than 8 channels that may go \(head: makes an output\)"):
        check_smaller(family(channels("a", 8), multiple=8), Shape(0.5, 1.0))


class Context:
    """As much of a `StepContext` as a search looks at."""

    def __init__(self, folder: Path) -> None:
        self.state_dir = folder
        self.progress = Silent()


def searched(
    folder: Path, some: Family, goal: Goal, trials: int, train: Callable[[Shape], float]
) -> tuple[Candidate, tuple[Candidate, ...]]:
    context: Any = Context(folder)
    return search(some, goal, trials, context, train)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Students are their shapes, and cost width^2 x depth; lists what was measured."""
    seen: list[str] = []

    def cost(_: student_search.CostOf, student: Shape) -> float:
        seen.append(student.name)
        return student.width**2 * student.depth

    monkeypatch.setattr(student_search.CostOf, "__call__", cost)
    monkeypatch.setattr(Family, "student", lambda _, shape: shape)
    return seen


GOAL = Goal("macs", 0.3, is_share=True)


def test_the_widest_student_of_each_depth_is_tried(tmp_path: Path, counted: list[str]) -> None:
    some = family(channels("a", 64), *BLOCKS)
    best, tried = searched(tmp_path, some, GOAL, 12, lambda shape: -abs(shape.depth - 0.5))
    assert [candidate.shape.depth for candidate in tried] == [1.0, 0.75, 0.5, 0.25]
    for candidate in tried:
        width, depth = candidate.shape.width, candidate.shape.depth
        assert width**2 * depth <= 0.3
        assert width == 1 or (width + 1 / 32) ** 2 * depth > 0.3
    assert best.shape.depth == 0.5
    assert best.line.startswith("width 0.75, depth 0.5: cost 0.2812, score ")
    assert len(counted) < 4 * (math.log2(32) + 2)


def test_a_killed_search_goes_on(tmp_path: Path, counted: list[str]) -> None:
    some = family(channels("a", 64), *BLOCKS)
    trained: list[float] = []

    def train(shape: Shape) -> float:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(shape.depth)
        return shape.depth

    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path, some, GOAL, 12, train)
    measured = len(counted)
    rest: list[float] = []

    def train_rest(shape: Shape) -> float:
        rest.append(shape.depth)
        return shape.depth

    best, _ = searched(tmp_path, some, GOAL, 12, train_rest)
    assert (trained, rest) == ([1.0, 0.75], [0.5, 0.25])
    assert best.shape.depth == 1.0
    assert len(counted) == measured


@pytest.mark.parametrize(("trials", "depths"), [(1, [1.0]), (2, [1.0, 0.25]), (3, [1.0, 0.5, 0.25])])
def test_trials_bound_the_students(tmp_path: Path, counted: list[str], trials: int, depths: list[float]) -> None:
    del counted
    _, tried = searched(tmp_path, family(channels("a", 64), *BLOCKS), GOAL, trials, lambda _: 1.0)
    assert [candidate.shape.depth for candidate in tried] == depths


def test_what_already_fits_is_not_made_smaller(tmp_path: Path, counted: list[str]) -> None:
    del counted
    best, tried = searched(tmp_path, family(*BLOCKS), Goal("macs", 2.0, is_share=True), 12, lambda _: 1.0)
    assert [best] == list(tried)
    assert best.shape == Shape(1.0, 1.0)
    assert best.score is None


def test_a_budget_out_of_reach_is_told(tmp_path: Path, counted: list[str]) -> None:
    del counted
    with pytest.raises(UsageError, match=r"student-to macs: no student keeps the budget of 0.0001: that of width"):
        searched(tmp_path, family(*BLOCKS), Goal("macs", 1e-4, is_share=True), 12, lambda _: 1.0)


def test_a_first_look_is_short() -> None:
    assert [brief(TrainingConfig(epochs=epochs)).epochs for epochs in (1, 5, 20)] == [1, 1, 4]
