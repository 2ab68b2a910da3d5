"""The multiple-choice knapsack: how much each group gives, so that all together save enough at the least loss.

This is the selection of Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (2022), solved by dynamic
programming. Greedy selection by loss per saving is as good but for its last item, and with few and large items, such as
a small network's channels in steps of 16, the last item decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeopt.types import Array

#: Steps in which savings are counted; the rounding of each group's saving is downwards.
_STEPS = 2000


def cheapest(losses: Sequence[Array], savings: Sequence[Array], needed: float) -> tuple[int, ...] | None:
    """How many items each group gives at the least total loss, the first ones of each.

    Args:
        losses: group -> (items,): what is lost with each item once those before it are gone.
        savings: likewise, what each saves; in the unit of `needed`.
        needed: that all together must save, above 0.

    Returns one count per group; None where all items together do not save as much, or only without rounding.
    """
    best = np.full(_STEPS + 1, np.inf)
    best[0] = 0.0
    places = np.arange(_STEPS + 1)
    choices: list[Array] = []
    for loss, saving in zip(losses, savings, strict=True):
        lost = np.concatenate(([0.0], np.cumsum(loss)))
        saved = np.concatenate(([0.0], np.cumsum(saving)))
        steps = np.minimum(np.floor(saved / needed * _STEPS + 1e-9), _STEPS).astype(np.int64)
        options = best[np.maximum(places - steps[:, np.newaxis], 0)] + lost[:, np.newaxis]
        chosen = options.argmin(0)
        choices.append(chosen)
        best = options[chosen, places]
    if not np.isfinite(best[_STEPS]):
        return None
    counts, place = [], _STEPS
    for index in range(len(choices) - 1, -1, -1):
        count = int(choices[index][place])
        counts.append(count)
        saved_here = float(np.sum(savings[index][:count]))
        place = max(place - min(int(np.floor(saved_here / needed * _STEPS + 1e-9)), _STEPS), 0)
    return tuple(reversed(counts))
