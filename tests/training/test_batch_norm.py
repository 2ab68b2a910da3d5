"""Statistics brought up to date leave the function alone."""

from __future__ import annotations

import torch
from torch import nn

from edgeopt.training.batch_norm import with_current_statistics


def stale() -> nn.Sequential:
    """A network whose normalizations see something else than their statistics say."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16),
        nn.BatchNorm1d(16, affine=False), nn.BatchNorm1d(16, track_running_stats=False),
    )[:7]  # fmt: skip
    for norm in (net[1], net[5]):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.1, 5.0)
        nn.init.normal_(norm.weight)
    return net.eval()


def test_the_function_stays_and_batch_statistics_give_it_too() -> None:
    net = stale()
    samples = [(torch.randn(1, 3, 6, 6) * 2 + 1,) for _ in range(64)]
    batch = torch.cat([sample for (sample,) in samples])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    moved = with_current_statistics(net, samples)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    torch.testing.assert_close(moved(batch), net(batch), rtol=1e-4, atol=1e-4)
    trains = moved.train()
    trains[6].eval()
    torch.testing.assert_close(trains(batch), net(batch), rtol=1e-3, atol=1e-3)


def test_one_value_and_channels_that_never_vary_are_left_as_they_are() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3)).eval()
    lone = with_current_statistics(net, [(torch.randn(1, 3),)])
    assert torch.equal(lone[0].running_mean, net[0].running_mean)
    constant = torch.tensor([[1.0, 2.0, 3.0]])
    still = with_current_statistics(net, [(constant,), (constant,)])
    assert torch.equal(still[0].running_var, torch.ones(3))
    torch.testing.assert_close(still(constant), net(constant))
