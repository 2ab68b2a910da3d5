"""Which weights go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeopt.compression.schedule import cubic, shares_of_rounds
from edgeopt.compression.sparsity.pattern import is_two_of_four, takes_pattern, two_of_four
from edgeopt.compression.sparsity.selection import magnitude_scores, masks_for_share


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(6, 10, generator=generator),
        "b": torch.randn(4, 5, 3, 3, generator=generator) * 0.01,
        "c": torch.randn(3, 7, generator=generator) * 5,
    }


def gone(masks: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((~mask).float().mean()) for name, mask in masks.items()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_as_many_go_as_the_share_says(share: float) -> None:
    masks = masks_for_share(magnitude_scores(weights(), "global"), share, "global")
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == int(np.ceil(share * total))
    for name, mask in masks_for_share(magnitude_scores(weights(), "per-layer"), share, "per-layer").items():
        assert int((~mask).sum()) == int(np.ceil(share * mask.numel())), name


def test_within_a_layer_the_smallest_go() -> None:
    for scope in ("global", "per-layer"):
        masks = masks_for_share(magnitude_scores(weights(), scope), 0.6, scope)
        for name, weight in weights().items():
            kept, lost = weight.abs()[masks[name]], weight.abs()[~masks[name]]
            assert float(lost.max()) <= float(kept.min())


def test_a_layer_of_small_weights_is_not_emptied() -> None:
    """One threshold on magnitudes would take all of b before anything of c."""
    shares = gone(masks_for_share(magnitude_scores(weights(), "global"), 0.8, "global"))
    assert max(shares.values()) < 1.0
    raw = gone(masks_for_share({name: weight.abs() for name, weight in weights().items()}, 0.8, "global"))
    assert raw["b"] == 1.0
    # Where all but one weight per layer go, it is the largest that stays.
    last = masks_for_share(magnitude_scores(weights(), "global"), 1 - 3 / 261, "global")
    assert all(bool(mask.flatten()[weights()[name].abs().argmax()]) for name, mask in last.items())


def test_the_scores_of_lamp_by_hand() -> None:
    scores = magnitude_scores({"w": torch.tensor([[3.0, -1.0, 2.0]])}, "global")["w"]
    assert scores.tolist() == [[1.0, pytest.approx(1 / 14), pytest.approx(4 / 13)]]


def test_equal_weights_do_not_all_go() -> None:
    masks = masks_for_share({"w": torch.ones(4, 5), "v": torch.zeros(2, 2)}, 0.5, "global")
    assert gone(masks) == {"w": pytest.approx(0.4), "v": 1.0}
    assert masks["w"].flatten().tolist() == [False] * 8 + [True] * 12


def test_zeros_of_before_are_the_first_to_go() -> None:
    values = weights()
    first = masks_for_share(magnitude_scores(values, "global"), 0.5, "global")
    zeroed = {name: weight * first[name] for name, weight in values.items()}
    again = masks_for_share(magnitude_scores(zeroed, "global"), 0.7, "global")
    assert all(not bool((again[name] & ~mask).any()) for name, mask in first.items())


def test_two_of_four_keeps_the_two_largest() -> None:
    row = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 5.0]])
    mask = two_of_four(row.abs(), 1)
    assert mask.tolist() == [[False, True, True, False, True, False, False, True]]
    assert is_two_of_four(row * mask, 1)
    assert not is_two_of_four(row, 1)


@pytest.mark.parametrize("shape", [(8, 16), (8, 6), (4, 7, 3, 3), (4, 9, 1, 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_two_of_four_runs_along_the_inputs_for_each_output_and_kernel_position(
    shape: tuple[int, ...], axis: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = two_of_four(weight.abs(), axis)
    assert mask.shape == weight.shape
    assert is_two_of_four(weight * mask, axis)
    groups = (weight * mask).movedim(axis, -1).reshape(-1, shape[axis])
    for start in range(0, shape[axis], 4):
        part = groups[:, start : start + 4]
        assert bool(((part != 0).sum(1) == min(2, part.shape[1])).all())


def test_who_takes_the_pattern() -> None:
    assert takes_pattern(torch.Size((8, 4)), 1)
    assert not takes_pattern(torch.Size((8, 3, 3, 3)), 1)
    assert not takes_pattern(torch.Size((8, 8)), None)


def test_shares_of_rounds() -> None:
    assert shares_of_rounds("one-shot", 5, 0.8) == (0.8,)
    assert shares_of_rounds("iterative", 4, 0.8) == pytest.approx((0.2, 0.4, 0.6, 0.8))
    # s_f (1 - (1 - t/n)^3) of the paper.
    assert shares_of_rounds("cubic", 2, 0.8) == pytest.approx((0.7, 0.8))
    assert shares_of_rounds("cubic", 3, 0.3)[-1] == 0.3
    assert [cubic(t) for t in (-1, 0, 0.5, 1, 2)] == [0, 0, 0.875, 1, 1]
