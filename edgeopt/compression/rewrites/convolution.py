"""Convolutions in the forms that compilers expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, is_node, name_of, shape_of
from edgeopt.compression.rewrites.base import ALL, EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node


@dataclass(frozen=True, slots=True)
class Conv1dAs2d:
    """A 1-D convolution is a 2-D one over images of one row."""

    name: ClassVar[str] = "conv1d-as-2d"
    summary: ClassVar[str] = "1-D convolution as a 2-D one of height 1"
    helps: ClassVar[frozenset[NpuKind]] = ALL
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        rank = len(shape_of(node) or ())
        return _conv2d if name_of(node) == "aten.conv1d" and rank == 3 else None


@dataclass(frozen=True, slots=True)
class LinearAsConv:
    """A linear operator on tokens (batch, tokens, channels) is a 1x1 convolution over an image of one row.

    The Edge TPU takes linear operators with one output row only.
    """

    name: ClassVar[str] = "linear-as-conv"
    summary: ClassVar[str] = "linear operators on several tokens as 1x1 convolutions"
    helps: ClassVar[frozenset[NpuKind]] = frozenset({"edge-tpu", "neural-engine"})
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        shape = shape_of(node)
        if name_of(node) != "aten.linear" or shape is None or len(shape) not in (3, 4):
            return None
        return _pointwise if shape[-2] > 1 or (len(shape) == 4 and shape[1] > 1) else None


@dataclass(frozen=True, slots=True)
class PlainTransposedConv:
    """Transposed convolution without output padding, dilation or groups.

    Output padding adds rows that no tap of the kernel would reach: a kernel with as many zeros at its end has them. A
    dilated kernel is one with zeros between its taps, a grouped one a dense one with zeros between groups.
    """

    name: ClassVar[str] = "plain-transposed-conv"
    summary: ClassVar[str] = "transposed convolution's output padding, dilation and groups as zeros in its kernel"
    helps: ClassVar[frozenset[NpuKind]] = ALL
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        if name_of(node) != "aten.conv_transpose2d" or not is_node(node.args[1]):
            return None
        given = arguments(node)
        odd = (given["output_padding"], 0), (given["dilation"], 1), ([given["groups"]], 1)
        return _plain if any(_differs(value, plain) for value, plain in odd) else None


def _differs(values: object, plain: int) -> bool:
    return isinstance(values, list | tuple) and any(value != plain for value in values)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    groups: int,
) -> Tensor:
    from torch.nn import functional

    pads = [0, 0] if isinstance(padding, str) else [0, *padding]
    if padding == "same":
        total = dilation[0] * (weight.shape[2] - 1)
        pads = [0, total // 2]
        if total % 2:
            x = functional.pad(x, (0, 1))
    image = functional.conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias, [1, *stride], pads, [1, *dilation], groups)
    return image.squeeze(2)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from torch.nn import functional

    image = (x.unsqueeze(1) if x.ndim == 3 else x).permute(0, 3, 1, 2)
    tokens = functional.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return tokens.squeeze(1) if x.ndim == 3 else tokens


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    groups: int,
    dilation: list[int],
) -> Tensor:
    from torch.nn import functional

    kernel = weight
    for axis, (step, extra) in enumerate(zip(_pair(dilation), _pair(output_padding), strict=True), 2):
        kernel = _with_zeros(kernel, axis, step, extra)
    if groups > 1:
        kernel = _dense(kernel, groups)
    return functional.conv_transpose2d(x, kernel, bias, stride, padding)


def _pair(values: list[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


def _with_zeros(kernel: Tensor, axis: int, step: int, extra: int) -> Tensor:
    """The kernel with `step` - 1 zeros between its taps along an axis, and `extra` at its end."""
    import torch

    like = kernel.narrow(axis, 0, 1) * 0
    parts = []
    for tap in range(kernel.shape[axis]):
        parts += [kernel.narrow(axis, tap, 1), *[like] * (step - 1)]
    parts = parts[: len(parts) - (step - 1)] + [like] * extra
    return torch.cat(parts, axis) if len(parts) > kernel.shape[axis] else kernel


def _dense(kernel: Tensor, groups: int) -> Tensor:
    """(inputs, outputs of a group, ...) -> (inputs, outputs, ...)."""
    import torch

    rows = []
    for number, own in enumerate(kernel.chunk(groups, 0)):
        empty = own * 0
        rows.append(torch.cat([*[empty] * number, own, *[empty] * (groups - 1 - number)], 1))
    return torch.cat(rows, 0)
