"""The penalty on whole units."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.pruning.groups import Prunable, PruningGroup, Slice
from edgeopt.compression.sparsity.constraints import KeptZeros
from edgeopt.tuning.group_lasso import GroupLasso


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def prunable() -> Prunable:
    """The three channels, of which each has four columns of the linear layer."""
    one = np.arange(3)[:, None]
    columns = np.arange(12).reshape(3, 4)
    slices = (Slice("0", "out", one), Slice("1", "out", one), Slice("3", "in", columns))
    blocks = PruningGroup("block", "blocks", 1, 1, ())
    return Prunable((PruningGroup("0", "channels", 3, 1, slices), blocks), ())


def test_the_penalty_is_the_norm_of_every_unit_over_all_its_layers() -> None:
    module = network()
    lasso = GroupLasso(prunable(), 0.5)
    lasso.start(module)
    first, last = (module.get_parameter(f"{layer}.weight").detach() for layer in (0, 3))
    expected = 0.0
    for unit in range(3):
        weights = torch.cat([first[unit].flatten(), last[:, 4 * unit : 4 * unit + 4].flatten()])
        expected += 0.5 * sqrt(12) * float(weights.norm())
    penalty = lasso.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    assert lasso.state() == {}


def test_descent_silences_weak_units_and_spares_biases_and_scales() -> None:
    module = network()
    with torch.no_grad():
        module.get_parameter("0.weight")[1] *= 0.05
        module.get_parameter("3.weight")[:, 4:8] *= 0.05
    lasso = GroupLasso(prunable(), 0.1)
    lasso.start(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        penalty = lasso.penalty()
        assert penalty is not None
        penalty.backward()
        assert module.get_parameter("1.weight").grad is None
        optimizer.step()
    norms = module.get_parameter("0.weight").detach().flatten(1).norm(dim=1)
    assert float(norms[1]) < 0.02
    assert float(norms[[0, 2]].min()) > 0.1


def test_paths_are_those_of_the_module_whatever_its_parts_are_called() -> None:
    slices = (Slice("network.0", "out", np.arange(3)[:, None]),)
    groups = Prunable((PruningGroup("network.0", "channels", 3, 1, slices),), ())
    lasso = GroupLasso(groups, 1.0)
    lasso.start(nn.ModuleDict({"network": network()}))
    assert lasso.penalty() is not None


def test_nothing_to_penalize() -> None:
    lasso = GroupLasso(Prunable((), ()), 1.0)
    lasso.start(network())
    assert lasso.penalty() is None


def test_zeros_of_an_earlier_step_stay() -> None:
    module = network()
    mask = torch.ones_like(module.get_parameter("3.weight"), dtype=torch.bool)
    mask[:, ::2] = False
    lasso = GroupLasso(prunable(), 0.1, KeptZeros({"3.weight": mask}))
    lasso.start(module)
    with torch.no_grad():
        module.get_parameter("3.weight").add_(1.0)
    lasso.after_step(1, 1)
    assert not module.get_parameter("3.weight")[:, ::2].any()
    assert bool(module.get_parameter("3.weight")[:, 1::2].any())
