"""What a pruned network's history says: what has gone, and what has not, and why."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from edgeopt.layer_names import strip_wrapper

if TYPE_CHECKING:
    from edgeopt.compression.pruning.groups import Plan, Prunable
    from edgeopt.compression.steps import Goal

#: Reasons that are given, and layers that are named for each.
_REASONS, _NAMED = 5, 3


def goal_text(goal: Goal) -> str:
    """ "latency 0.6x"."""
    return f"{goal.what} {goal.value:g}{'x' if goal.is_share else ''}"


def removed_text(prunable: Prunable, plan: Plan) -> str:
    """ "features.0: 64 -> 40, layers.3: removed"."""
    texts = []
    for group in prunable.groups:
        gone = len(plan.get(group.name, ()))
        name = strip_wrapper(group.name)
        if gone and group.kind == "blocks":
            texts.append(f"{name}: removed")
        elif gone:
            heads = " heads" if group.kind == "heads" else ""
            texts.append(f"{name}: {group.units} -> {group.units - gone}{heads}")
    return ", ".join(texts)


def kept_text(prunable: Prunable) -> str:
    """ "stem: is protected; a, b, c and 9 more: channels are not to be removed": layers that can't become narrower, by
    the reason, the most frequent one first."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for layer in prunable.kept:
        by_reason[layer.reason].append(strip_wrapper(layer.layer))
    texts = []
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    for reason, layers in ranked[:_REASONS]:
        more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
        texts.append(f"{', '.join(layers[:_NAMED])}{more}: {reason}")
    if others := sum(len(layers) for _, layers in ranked[_REASONS:]):
        texts.append(f"{others} more: other reasons")
    return "; ".join(texts)
