"""Normalization over groups of channels, without tensors of five dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, is_node, name_of, shape_of
from edgeopt.compression.rewrites.base import EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """Group normalization of images whose groups' means are 1x1 convolutions of the channels' means.

    mean = A m(x) and variance = A m((x - mean)^2), where m averages over height and width, and A averages over the
    channels of a group: each channel keeps its place, nothing is reshaped or broadcast.
    """

    name: ClassVar[str] = "group-norm"
    summary: ClassVar[str] = "group normalization with means by 1x1 convolutions"
    helps: ClassVar[frozenset[NpuKind]] = frozenset({"edge-tpu", "ethos-u55", "ethos-u65", "ethos-u85"})
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if name_of(node) != "aten.group_norm" or not is_node(node.args[0]):
            return None
        shape = shape_of(node.args[0])
        return _normalized if shape is not None and len(shape) == 4 and arguments(node)["num_groups"] else None


def _normalized(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, cudnn: bool) -> Tensor:
    import torch
    from torch.nn import functional

    del cudnn
    channels = x.shape[1]
    size = channels // groups
    group = torch.arange(channels) // size
    average = (group[:, None] == group[None]).to(x.dtype)[:, :, None, None] / size
    centred = x - functional.conv2d(x.mean((2, 3), keepdim=True), average)
    variance = functional.conv2d((centred * centred).mean((2, 3), keepdim=True), average)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight[None, :, None, None]
    result = centred * scale
    return result if bias is None else result + bias[None, :, None, None]
