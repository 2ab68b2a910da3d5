"""Golden vectors: when outputs agree, and what stands in for a model that is gone."""

from __future__ import annotations

import numpy as np
import pytest

from edgeopt.types import Array, Signature, SignatureTensor
from edgeopt.validation.golden import Replay, golden_check

SIGNATURE = Signature(
    (SignatureTensor("x", "x", (1,), "float32", "float32"),),
    (SignatureTensor("y", "y", (4,), "float32", "float32"),),
)
INPUTS = {"x": np.zeros(1, np.float32)}


def measured(golden: list[float], found: list[float]) -> float | None:
    expected: dict[str, Array] = {"y": np.array(golden, np.float32)}
    session = Replay(SIGNATURE, [{"y": np.array(found, np.float32)}])
    return golden_check(session, [(INPUTS, expected)], 0.05).measured


@pytest.mark.parametrize(
    ("golden", "found", "difference"),
    [
        ([0, 1, 2, 10], [0, 1, 2, 9], 0.1),
        ([5, 5, 5, 5], [5, 5, 5, 6], 0.2),  # a constant output is held against its own size
        ([0, 1, np.inf, np.nan], [0, 1, np.inf, np.nan], 0.0),
        ([0, 1, 2, np.inf], [0, 2, 2, np.inf], 0.5),  # an equal infinity hides no other error
        ([0, 1, 2, np.inf], [0, 1, 2, 3], np.inf),
        ([0, 1, 2, 3], [0, 1, 2, np.nan], np.inf),
        ([0, 1, 2, 3], [0, 1, 2], np.inf),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference_as_a_fraction_of_the_range(
    golden: list[float], found: list[float], difference: float
) -> None:
    assert measured(golden, found) == pytest.approx(difference)


def test_recorded_outputs_can_be_gone_through_again() -> None:
    session = Replay(SIGNATURE, [{"y": np.full(4, k, np.float32)} for k in range(2)])
    assert [session.run_native(INPUTS)["y"][0] for _ in range(4)] == [0, 1, 0, 1]
