"""Function-preserving channel rescaling: the hard case for quantization, made from a healthy network.

Scaling a channel by f and undoing it in every reader changes nothing in float; in int8 one scale per tensor then has to
serve channels whose ranges differ by orders of magnitude (Nagel et al. 2019 met such networks in the wild).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

#: Factors are log-uniform in 1/LARGEST..LARGEST.
LARGEST = 100.0


def _factors(channels: int, random: torch.Generator) -> torch.Tensor:
    exponent = torch.rand(channels, generator=random) * 2 - 1
    return LARGEST**exponent


def _scale_norm(norm: nn.BatchNorm2d, factors: torch.Tensor) -> None:
    norm.weight.data *= factors
    norm.bias.data *= factors


def _unscale_inputs(conv: nn.Module, factors: torch.Tensor) -> None:
    """Input channels of a dense convolution, or the channels of a depthwise one."""
    weight = conv.weight.data
    shape = (1, -1, 1, 1) if weight.shape[1] == len(factors) else (-1, 1, 1, 1)
    conv.weight.data = weight / factors.view(shape)


def rescale_efficientnet_lite(network: nn.Module, seed: int = 0) -> nn.Module:
    """EfficientNet-Lite: the bottlenecks between blocks, which no activation follows; residual groups share factors."""
    scaled = copy.deepcopy(network)
    random = torch.Generator().manual_seed(seed)
    blocks = list(scaled._blocks)
    factors = None
    for index, block in enumerate(blocks):
        if factors is not None:
            _unscale_inputs(block._expand_conv, factors)
        arguments = block._block_args
        keeps_shape = arguments.stride in (1, [1]) and arguments.input_filters == arguments.output_filters
        if factors is None or not (block.id_skip and keeps_shape):
            factors = _factors(block._bn2.num_features, random)
        _scale_norm(block._bn2, factors)
        if index == len(blocks) - 1:
            _unscale_inputs(scaled._conv_head, factors)
    return scaled


def rescale_fashion_v2(network: nn.Module, seed: int = 0) -> nn.Module:
    """The ReLU network of fashion_net: bottlenecks, and both ReLUs inside every block."""
    scaled = copy.deepcopy(network)
    random = torch.Generator().manual_seed(seed)
    factors = _factors(16, random)
    _scale_norm(scaled.stem[1], factors)
    for block in scaled.blocks:
        expand, norm1, _, depthwise, norm2, _, _, project, norm3 = block.layers
        _unscale_inputs(expand, factors)
        inner = _factors(norm1.num_features, random)
        _scale_norm(norm1, inner)
        _unscale_inputs(depthwise, inner)
        inner = _factors(norm2.num_features, random)
        _scale_norm(norm2, inner)
        _unscale_inputs(project, inner)
        if not block.has_skip:
            factors = _factors(norm3.num_features, random)
        _scale_norm(norm3, factors)
    _unscale_inputs(scaled.head[0], factors)
    return scaled
