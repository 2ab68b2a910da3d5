"""What a layer reads, as the moments that least squares need: rows of its input matrix against each other and against
the wanted outputs.

Sums are taken about the first sample's mean: of values that are large and hardly vary (a year, a pressure in pascals),
the difference between the mean square and the squared mean would be lost in rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.compression.layers import Layer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Moments:
    """Of a layer's input x (`columns` values per group and output position) and wanted output y, in float64.

    Attributes:
        input_mean: (groups, columns).
        output_mean: (groups, rows).
        input_covariance: (groups, columns, columns).
        output_covariance: of y with x, (groups, rows, columns).
    """

    input_mean: torch.Tensor
    output_mean: torch.Tensor
    input_covariance: torch.Tensor
    output_covariance: torch.Tensor


class MomentSums:
    """Adds up samples. Of each, at most `positions` output positions count, chosen by the generator."""

    def __init__(self, layer: Layer, positions: int, generator: torch.Generator) -> None:
        self._layer = layer
        self._positions = positions
        self._generator = generator
        self._count = 0
        self._shifts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sums: list[torch.Tensor] = []

    def add(self, input_: torch.Tensor, output: torch.Tensor) -> None:
        """One sample's input to the layer and the output that it should have; batch dimensions are positions, too."""
        import torch

        layer = self._layer
        wanted = _outputs(layer, output)
        chosen = torch.randperm(wanted.shape[-1], generator=self._generator)[: self._positions]
        x = _inputs(layer, input_, chosen, output)
        y = wanted[:, chosen].reshape(layer.groups, -1, chosen.numel())
        if self._shifts is None:
            self._shifts = x.double().mean(2).to(x.dtype), y.double().mean(2).to(y.dtype)
        x, y = (values - shift[:, :, None] for values, shift in zip((x, y), self._shifts, strict=True))
        parts = [x.sum(2), y.sum(2), x @ x.mT, y @ x.mT]
        doubled = [part.double() for part in parts]
        self._sums = [a + b for a, b in zip(self._sums, doubled, strict=True)] if self._sums else doubled
        self._count += chosen.numel()

    def moments(self, *, centered: bool) -> Moments:
        """With `centered` the covariances are about the means, as they are where a bias absorbs those."""
        if self._shifts is None:
            raise ValueError("no sample was added")
        x, y, xx, yx = (part / self._count for part in self._sums)
        xx = xx - x[:, :, None] * x[:, None]
        yx = yx - y[:, :, None] * x[:, None]
        # Rounding may leave a constant column a variance below zero.
        xx.diagonal(dim1=1, dim2=2).clamp_(min=0)
        x, y = (mean + shift.double() for mean, shift in zip((x, y), self._shifts, strict=True))
        if not centered:
            xx = xx + x[:, :, None] * x[:, None]
            yx = yx + y[:, :, None] * x[:, None]
        return Moments(x, y, xx, yx)


def _outputs(layer: Layer, output: torch.Tensor) -> torch.Tensor:
    """(channels, positions)."""
    if layer.kind == "linear":
        return output.reshape(-1, output.shape[-1]).mT
    batched = _batched(layer, output)
    return batched.transpose(0, 1).flatten(1)


def _inputs(layer: Layer, input_: torch.Tensor, chosen: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """(groups, columns, chosen positions): what the kernel covers at each of these positions of the output."""
    import torch

    if layer.kind == "linear":
        return input_.reshape(-1, input_.shape[-1])[chosen].mT[None]
    x = _padded(layer, _batched(layer, input_))
    sizes = _batched(layer, output).shape[2:]
    for dimension, (kernel, stride, dilation) in enumerate(
        zip(layer.shape[2:], layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dimension, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    # Windows are views; only those at the chosen positions are copied.
    batch, *place = torch.unravel_index(chosen, (x.shape[0], *sizes))
    windows = x.movedim(1, -1 - len(sizes))[(batch, *place)]
    return windows.reshape(chosen.numel(), layer.groups, -1).permute(1, 2, 0)


def _batched(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """With the batch dimension that a convolution's operand may lack."""
    return values if values.ndim == len(layer.shape) else values[None]


def _padded(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import pad

    ends = []
    for i, (kernel, dilation) in enumerate(zip(layer.shape[2:], layer.dilation, strict=True)):
        if layer.padding == "same":
            total = (kernel - 1) * dilation
            ends.append((total // 2, total - total // 2))
        else:
            ends.append((layer.padding[i], layer.padding[i]))
    return pad(x, [end for pair in reversed(ends) for end in pair])
