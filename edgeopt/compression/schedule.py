"""How much of the way to a goal each round of pruning goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeopt.compression.steps import ScheduleName


def shares_of_rounds(schedule: ScheduleName, rounds: int, target: float) -> tuple[float, ...]:
    """What is gone after each round, ascending; the last one is the target.

    Args:
        schedule: "one-shot" has a single round, whatever `rounds` says; "iterative" takes equal parts, "cubic" ever
            smaller ones.
        rounds: how many, at least 1.
        target: share that is to be gone in the end, 0..1.
    """
    if schedule == "one-shot":
        return (target,)
    done = [(index + 1) / rounds for index in range(rounds - 1)]
    # The end itself is not computed: rounding must not leave it short of the target.
    return (*(target * (cubic(share) if schedule == "cubic" else share) for share in done), target)


def cubic(done: float) -> float:
    """Share of the goal that is reached when this share (0..1) of the way in time is: 1 - (1 - done)^3.

    s_t = s_f + (s_i - s_f) (1 - t/n)^3 of Zhu and Gupta, "To prune, or not to prune" (2017), for s_i = 0.
    """
    return float(1 - (1 - min(max(done, 0.0), 1.0)) ** 3)
