"""What happens to weights between the steps of an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from edgeopt.compression.sparsity.constraints import GrowingZeros, KeptZeros, Movement, kept_zeros
from edgeopt.types import Model, StepRecord, TensorSpec

NAMES = ("0.weight", "2.weight")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def all_stay(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(module.get_parameter(name), dtype=torch.bool) for name in NAMES}


def half(share: float) -> float:
    return 0.5 * share


def share(module: nn.Module) -> float:
    weights = [module.get_parameter(name) for name in NAMES]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def size(module: nn.Module) -> float:
    return sum(float(module.get_parameter(name).detach().abs().sum()) for name in NAMES)


def always(share_: float) -> Callable[[float], float]:
    def share_at(done: float) -> float:
        assert 0 < done <= 1
        return share_

    return share_at


def run(module: nn.Module, constraint: KeptZeros, steps: int = 12, watch: Callable[[int], None] | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    constraint.start(module)
    for step in range(1, steps + 1):
        x = torch.randn(16, 6, generator=generator)
        loss = nn.functional.cross_entropy(module(x), (x[:, 0] > 0).long())
        penalty = constraint.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.after_step(step, steps)
        if watch is not None:
            watch(step)
    constraint.close()


def test_zeros_stay_and_the_rest_is_trained() -> None:
    module = network()
    masks = {name: torch.rand_like(module.get_parameter(name)) > 0.5 for name in NAMES}
    before = copy.deepcopy(module)
    run(module, KeptZeros(masks))
    for name, mask in masks.items():
        assert bool(((module.get_parameter(name) != 0) == mask).all())
        assert not torch.equal(module.get_parameter(name), before.get_parameter(name) * mask)


def test_no_minus_zero_and_no_nan_is_left() -> None:
    module = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        module.get_parameter("0.weight").copy_(torch.tensor([[-1.0, torch.nan]]))
    KeptZeros({"0.weight": torch.zeros(1, 2, dtype=torch.bool)}).start(module)
    weight = module.get_parameter("0.weight").detach()
    assert weight.tolist() == [[0.0, 0.0]]
    assert not bool(weight.signbit().any())


def test_the_l1_penalty_and_what_it_does() -> None:
    module = network()
    constraint = KeptZeros(all_stay(module), l1=0.1)
    constraint.start(module)
    penalty = constraint.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.1 * size(module))
    assert KeptZeros(all_stay(module)).penalty() is None
    free, drawn = network(), network()
    run(free, KeptZeros(all_stay(free)), 40)
    run(drawn, KeptZeros(all_stay(drawn), l1=0.1), 40)
    assert size(drawn) < 0.8 * size(free)


def test_zeros_grow_in_the_first_half_and_none_comes_back() -> None:
    module = network()
    constraint = GrowingZeros(all_stay(module), half, "global")
    seen: list[tuple[float, bool]] = []
    masks = all_stay(module)

    def watch(step: int) -> None:
        seen.append((share(module), constraint.is_settled()))
        for name, mask in constraint.masks.items():
            assert not bool((mask & ~masks[name]).any()), step
        masks.update(constraint.masks)

    run(module, constraint, 12, watch)
    shares = [value for value, _ in seen]
    assert shares == sorted(shares)
    assert shares[5:] == [0.5] * 7
    assert shares[0] < 0.1
    assert [settled for _, settled in seen] == [False] * 5 + [True] * 7


def test_more_zeros_than_the_share_stay_zeros() -> None:
    module = network()
    with torch.no_grad():
        module.get_parameter("0.weight")[:7] = 0.0
    masks = {name: module.get_parameter(name).detach() != 0 for name in NAMES}
    before = share(module)
    assert before > 0.5
    run(module, GrowingZeros(masks, half, "global"))
    assert share(module) == before


def test_one_step_is_enough_to_reach_the_share() -> None:
    module = network()
    constraint = GrowingZeros(all_stay(module), half, "per-layer")
    run(module, constraint, 1)
    assert share(module) == 0.5
    assert constraint.is_settled()


def test_movement_scores_are_minus_weight_times_gradient() -> None:
    """By hand: one linear layer, one step of plain gradient descent."""
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
    constraint = Movement({"0.weight": torch.ones(1, 2, dtype=torch.bool)}, always(0.0), "global")
    constraint.start(module)
    module(torch.tensor([[5.0, 7.0]])).sum().backward()  # dL/dw = (5, 7)
    constraint.after_step(1, 2)
    assert constraint.state()["score/0.weight"].tolist() == [[-10.0, 21.0]]


def test_a_weight_that_moves_away_from_zero_beats_a_larger_one_that_moves_to_it() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.1, 1.0]]))
    constraint = Movement({"0.weight": torch.ones(1, 2, dtype=torch.bool)}, half, "global")
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    constraint.start(module)
    for step in range(1, 21):
        x = torch.randn(32, 2)
        nn.functional.mse_loss(module(x), x[:, :1]).backward()  # the first weight should be 1, the second 0
        optimizer.step()
        optimizer.zero_grad()
        constraint.after_step(step, 20)
    constraint.close()
    weight = module[0].weight.detach()[0]
    assert float(weight[1]) == 0.0
    assert float(weight[0]) > 0.3


def test_masked_weights_are_scored_on_and_come_back_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
    constraint = Movement({"0.weight": torch.ones(1, 2, dtype=torch.bool)}, always(0.5), "global")
    constraint.start(module)

    def step(number: int, first: float, second: float) -> list[float]:
        module(torch.tensor([[first, second]])).sum().backward()
        module.zero_grad()
        constraint.after_step(number, 8)
        values: list[float] = module[0].weight.detach()[0].tolist()
        return values

    assert step(1, 1.0, -1.0) == [0.0, 2.0]  # scores -1, 2
    assert step(2, -9.0, 1.0) == [1.0, 0.0]  # scores 8, 0: the first was masked and still counts


def test_nothing_stays_hooked_to_the_module() -> None:
    module = network()
    run(module, Movement(all_stay(module), half, "global"))
    assert not any(parameter._backward_hooks for parameter in module.parameters())
    assert share(module) == 0.5


@pytest.mark.parametrize("kind", [GrowingZeros, Movement])
def test_a_restored_run_goes_on_as_if_it_had_not_stopped(kind: type[GrowingZeros]) -> None:
    torch.manual_seed(0)
    whole, batches = network(), torch.randn(10, 16, 6)

    def steps(module: nn.Module, constraint: KeptZeros, first: int, last: int) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for number in range(first, last + 1):
            x = batches[number - 1]
            nn.functional.cross_entropy(module(x), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            optimizer.zero_grad()
            constraint.after_step(number, 10)

    constraint = kind(all_stay(whole), half, "global")
    constraint.start(whole)
    steps(whole, constraint, 1, 3)
    cut = copy.deepcopy(whole)
    state = {name: tensor.clone() for name, tensor in constraint.state().items()}
    steps(whole, constraint, 4, 10)
    other = kind(all_stay(cut), half, "global")
    other.start(cut)
    other.restore(state)
    steps(cut, other, 4, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_zeros_of_an_earlier_step_can_be_kept_through_another_training() -> None:
    module = network()
    spec = TensorSpec("x", (1, 6), "float32")
    plain = Model("net", module, None, (spec,), (), {"x": torch.rand(1, 6).numpy()}, None, (), (), "0" * 64)
    assert kept_zeros(plain) is None
    with torch.no_grad():
        module.get_parameter("0.weight")[:, :3] = 0.0
    constraint = kept_zeros(replace(plain, history=(StepRecord("sparsify"),)))
    assert constraint is not None
    run(module, constraint)
    assert bool((module.get_parameter("0.weight")[:, :3] == 0).all())
    assert bool(module.get_parameter("2.weight").all())
