"""Batch normalization between two trainings: statistics brought up to date without changing the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def with_current_statistics(network: nn.Module, samples: Iterable[tuple[Tensor, ...]]) -> nn.Module:
    """A copy whose running statistics are those of the samples, and which computes the same.

    After training with frozen statistics, what a normalization sees has moved away from them. In eval mode that is part
    of the function; but the first batch of a training on batch statistics would be normalized otherwise, and the
    network be another one. So mean and variance are measured, and scale and offset take up the difference:
    scale' = scale sqrt(var' / var), offset' = offset + scale (mean' - mean) / sqrt(var), each variance with epsilon.

    Args:
        network: in eval mode; layers without running statistics, scale and offset are left alone.
        samples: arguments of the network, one sample each.
    """
    module = copy.deepcopy(network)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.affine and _is_tracked(part)]
    seen = [_Moments() for _ in norms]
    hooks = [norm.register_forward_pre_hook(moments.see()) for norm, moments in zip(norms, seen, strict=True)]
    try:
        with torch.no_grad():
            for arguments in samples:
                module(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for norm, moments in zip(norms, seen, strict=True):
            if moments.count > 1:
                _move(norm, *moments.result())
    return module


class _Moments:
    """Mean and variance per channel, in float64 over all that passes."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def see(self) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del norm
            values = inputs[0].detach().double().transpose(0, 1).flatten(1)
            self.count += values.shape[1]
            self._sum = self._sum + values.sum(1)
            self._squares = self._squares + values.square().sum(1)

        return hook

    def result(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self._sum) / self.count
        return mean, (torch.as_tensor(self._squares) / self.count - mean.square()).clamp(min=0.0)


def _is_tracked(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _move(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # A channel that never varies has no scale of its own to go by.
    variance = torch.where(variance > norm.eps, variance, norm.running_var.double())
    before = (norm.running_var.double() + norm.eps).sqrt()
    scale = norm.weight.double() * (variance + norm.eps).sqrt() / before
    offset = norm.bias.double() + norm.weight.double() * (mean - norm.running_mean.double()) / before
    norm.weight.copy_(scale)
    norm.bias.copy_(offset)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
