"""What the history says of pruning."""

from __future__ import annotations

import numpy as np

from edgeopt.compression.pruning.groups import Kept, Prunable, PruningGroup, Slice
from edgeopt.compression.steps import Goal
from edgeopt.tuning.pruning_texts import goal_text, kept_text, removed_text


def test_goals_as_they_are_given() -> None:
    assert goal_text(Goal("latency", 0.6, is_share=True)) == "latency 0.6x"
    assert goal_text(Goal("macs", 2e8)) == "macs 2e+08"


def test_what_goes() -> None:
    eight = np.arange(8).reshape(4, 2)
    groups = (
        PruningGroup("conv", "channels", 8, 1, (Slice("conv", "out", np.arange(8)[:, None]),)),
        PruningGroup("attention", "heads", 4, 2, (Slice("attention.q", "out", eight),)),
        PruningGroup("idle", "channels", 8, 1, (Slice("idle", "out", np.arange(8)[:, None]),)),
        PruningGroup("layers.3", "blocks", 1, 1, ()),
    )
    text = removed_text(Prunable(groups, ()), {"conv": (1, 2), "attention": (0,), "layers.3": (0,)})
    assert text == "conv: 8 -> 6, attention: 4 -> 3 heads, layers.3: removed"


def test_what_stays_by_the_reason_and_no_longer_than_a_line_needs() -> None:
    many = [Kept(f"layers.{i}", "has a size of its own") for i in range(5)]
    text = kept_text(Prunable((), (Kept("head", "is an output"), *many)))
    assert text == "layers.0, layers.1, layers.2 and 2 more: has a size of its own; head: is an output"
    others = [Kept(f"l{i}", f"reason {i}") for i in range(7)]
    assert kept_text(Prunable((), tuple(others))).endswith("l4: reason 4; 2 more: other reasons")
    assert kept_text(Prunable((), ())) == ""
