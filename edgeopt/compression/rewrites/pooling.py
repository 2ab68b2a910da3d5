"""Averages that many accelerators don't take, written with those that they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, is_node, name_of, shape_of
from edgeopt.compression.rewrites.base import ALL, EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

_POOLS = {"aten.adaptive_avg_pool1d": 1, "aten.adaptive_avg_pool2d": 2}


@dataclass(frozen=True, slots=True)
class AdaptivePool:
    """Adaptive average pooling to sizes that don't divide its input's: windows of several sizes, each averaged on its
    own along one axis after the other. Output i covers inputs floor(i n / m) to ceil((i + 1) n / m)."""

    name: ClassVar[str] = "adaptive-pool"
    summary: ClassVar[str] = "adaptive average pooling as means of slices"
    helps: ClassVar[frozenset[NpuKind]] = ALL
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        rank = _POOLS.get(name_of(node))
        source = node.args[0]
        before, after = shape_of(source) if is_node(source) else None, shape_of(node)
        if rank is None or before is None or after is None:
            return None
        sizes = list(zip(before[-rank:], after[-rank:], strict=True))
        return _pool if any(one % other for one, other in sizes) else None


@dataclass(frozen=True, slots=True)
class ChannelMean:
    """A mean over channels is a convolution (of images) or a linear operator (of tokens) with equal weights."""

    name: ClassVar[str] = "channel-mean"
    summary: ClassVar[str] = "the mean over channels as a 1x1 convolution"
    helps: ClassVar[frozenset[NpuKind]] = frozenset({"ethos-u55", "ethos-u65", "ethos-u85"})
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if str(node.target) != "aten.mean.dim" or arguments(node)["dtype"] is not None:
            return None
        source, dims = node.args[0], arguments(node)["dim"]
        shape = shape_of(source) if is_node(source) else None
        if shape is None or not isinstance(dims, list | tuple) or len(dims) != 1:
            return None
        axis = int(dims[0]) % len(shape)
        return _channel_mean if (len(shape), axis) in ((4, 1), (3, 2)) else None


def _pool(x: Tensor, sizes: list[int]) -> Tensor:
    import torch

    for axis, wanted in zip(range(-len(sizes), 0), sizes, strict=True):
        size = x.shape[axis]
        wanted = size if wanted is None else wanted
        windows = [(i * size // wanted, -(-(i + 1) * size // wanted)) for i in range(wanted)]
        if all(end - start == 1 for start, end in windows):
            continue
        x = torch.cat([x.narrow(axis, start, end - start).mean(axis, keepdim=True) for start, end in windows], axis)
    return x


def _channel_mean(x: Tensor, dim: list[int], keepdim: bool, dtype: object) -> Tensor:
    import torch
    from torch.nn import functional

    del dtype
    axis = dim[0] % x.ndim
    channels = x.shape[axis]
    if x.ndim == 4:
        mean = functional.conv2d(x, torch.full((1, channels, 1, 1), 1 / channels, dtype=x.dtype))
    else:
        mean = functional.linear(x, torch.full((1, channels), 1 / channels, dtype=x.dtype))
    return mean if keepdim else mean.squeeze(axis)
