"""Splitting a layer's weights into two smaller layers in a row.

A layer's weights are a matrix A (n, m): n inputs of one output position, m outputs. Of all matrices of rank r,
A V V' with the first r columns V of the right singular vectors of C^(1/2) A is the one whose outputs differ least, in
the mean square, for inputs with covariance C: truncation after whitening (DRONE, Chen et al. 2021; SVD-LLM, Wang et al.
2024). V are also the principal directions of the outputs themselves (Zhang et al. 2016), so that either side's
covariance will do, whichever is smaller, and no whitening need be undone. What the mean input loses goes into the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from edgeopt.compression.low_rank.directions import Covariance, principal_directions
from edgeopt.errors import ConversionError

Form = Literal["channels", "separable"]

#: The least that an output counts, relative to the one that counts most: a batch norm may silence a channel.
_DEAD = 1e-3


@dataclass(frozen=True, slots=True)
class Site:
    """A layer that two can stand for.

    Attributes:
        path: in the user's own module.
        kind: "linear" reads the last dimension (also transformers' Conv1D); "convolution" has groups = 1.
        positions: output positions of all its calls in one inference of the example input, batch included.
        tall_positions: of a 2-D convolution, positions after the vertical half of a separable pair; else 0.
        norm: path in the same module of the batch norm that reads its output, if one does.
    """

    path: str
    kind: Literal["linear", "convolution"]
    positions: int
    tall_positions: int = 0
    norm: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One way to split a layer, at any rank.

    Attributes:
        form: "channels": the layer's own kernel to r channels, then 1x1 to all (a linear layer: two linear ones).
            "separable": k x 1 to r channels, then 1 x k (Jaderberg et al. 2014).
        matrix: A, (n, m) in float64. A separable form has (input channels x height, output channels x width).
        scale: D, (m,): how much each output counts.
        basis: V, (m, k), k = min(n, m), of A D.
        energies: (k,): the mean square of outputs times D that each direction carries; those of a separable form as if
            a kernel's columns read values that are not related.
        response: mean of the outputs of A, (m,); None without samples.
        macs: of the whole layer, per inference.
        parameters: its weights, less the bias that only the pair has.
        macs_per_rank, parameters_per_rank: of the pair's, for each unit of its rank.
    """

    form: Form
    matrix: Tensor
    scale: Tensor
    basis: Tensor
    energies: Tensor
    response: Tensor | None
    macs: int
    parameters: int
    macs_per_rank: int
    parameters_per_rank: int

    def pair(self, layer: nn.Module, rank: int) -> nn.Sequential:
        """The two layers, in the layer's own type and on its device."""
        up = self.basis[:, :rank] / self.scale[:, None]
        down = self.matrix @ (self.basis[:, :rank] * self.scale[:, None])
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        given = None if bias is None else bias.detach().double().cpu()
        if self.response is not None:
            lost = self.response - self.response * self.scale @ self.basis[:, :rank] @ up.mT
            if isinstance(layer, nn.Conv2d) and self.form == "separable":
                lost = lost.reshape(layer.out_channels, -1).sum(1)
            given = lost if given is None else given + lost
        with torch.device("meta"):  # no random numbers are drawn for weights that are set below
            pair = _pair(layer, self.form, rank, has_bias=given is not None).to(weight.dtype)
        pair.to_empty(device=weight.device)
        tensors = {"0.weight": down.mT, "1.weight": up}
        if isinstance(layer, nn.Conv2d) and self.form == "separable":
            tensors["1.weight"] = up.reshape(layer.out_channels, -1, rank).transpose(1, 2)
        if given is not None:
            tensors["1.bias"] = given
        with torch.no_grad():
            for name, values in tensors.items():
                parameter = pair.get_parameter(name)
                parameter.copy_(values.reshape(parameter.shape))
        return pair.requires_grad_(weight.requires_grad).eval()


def forms_of(layer: nn.Module) -> tuple[Form, ...]:
    """How a layer can be split."""
    if isinstance(layer, nn.Conv2d) and min(layer.kernel_size) > 1 and layer.padding_mode == "zeros":
        return ("channels",) if isinstance(layer.padding, str) else ("channels", "separable")
    return ("channels",)


def matrix_of(layer: nn.Module, form: Form) -> Tensor:
    """A, in float64."""
    weight = layer.get_parameter("weight").detach().double().cpu()
    if form == "separable":
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.flatten(1).mT if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) else weight


def shape_of(layer: nn.Module, form: Form) -> tuple[int, int]:
    """(n, m)."""
    shape = layer.get_parameter("weight").shape
    if form == "separable":
        return shape[1] * shape[2], shape[0] * shape[3]
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return prod(shape[1:]), shape[0]
    return shape[0], shape[1]


def macs_per_rank(layer: nn.Module, site: Site, form: Form) -> int:
    """Of the pair, per inference."""
    n, m = shape_of(layer, form)
    return n * (site.tall_positions if form == "separable" else site.positions) + m * site.positions


def output_scale(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """(outputs,): what a batch norm makes of each output channel, ones without any.

    A channel that hardly varies means as much as any other once it is normalized.
    """
    outputs = shape_of(layer, "channels")[1]
    ones = torch.ones(outputs, dtype=torch.float64)
    if (
        not isinstance(norm, nn.modules.batchnorm._BatchNorm)
        or norm.running_var is None
        or norm.num_features != outputs
    ):
        return ones
    gain = ones if norm.weight is None else norm.weight.detach().double().cpu().abs()
    scale = gain / (norm.running_var.double().cpu() + norm.eps).sqrt()
    return scale.clamp(min=_DEAD * float(scale.max())) if scale.isfinite().all() and scale.max() > 0 else ones


def factors_of(
    layer: nn.Module, site: Site, form: Form, seen: Covariance | None, norm: nn.Module | None = None
) -> Factors:
    """Split a layer for inputs, or outputs before the bias, like those seen; with None all inputs count alike.

    Args:
        norm: the batch norm after it: errors count as they do behind that.

    Raises ConversionError naming the layer where its weights or inputs are not finite.
    """
    matrix = matrix_of(layer, form)
    where = f"layer {site.path!r}"
    outputs = output_scale(layer, norm)
    scale = outputs.repeat_interleave(matrix.shape[1] // len(outputs))
    if not matrix.isfinite().all() or (seen is not None and not seen.values.isfinite().all()):
        raise ConversionError("has weights or inputs that are not finite", where=where)
    try:
        basis, energies = principal_directions(matrix * scale, seen, scale)
    except RuntimeError as error:  # of the decomposition, which did not converge
        raise ConversionError(f"has no singular values ({str(error).partition('.')[0]})", where=where) from error
    response = None
    if seen is not None:
        response = seen.mean @ matrix if seen.side == "inputs" else seen.mean
    n, m = matrix.shape
    has_new_bias = response is not None and layer._parameters.get("bias") is None
    return Factors(
        form,
        matrix,
        scale,
        basis,
        energies,
        response,
        macs=n * m * site.positions,
        parameters=n * m - len(outputs) * has_new_bias,
        macs_per_rank=macs_per_rank(layer, site, form),
        parameters_per_rank=n + m,
    )


def _pair(layer: nn.Module, form: Form, rank: int, *, has_bias: bool) -> nn.Sequential:
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind: Callable[..., nn.Module] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[layer.weight.ndim]
        if form == "separable":
            (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
            assert not isinstance(layer.padding, str)
            ph, pw = layer.padding
            return nn.Sequential(
                nn.Conv2d(layer.in_channels, rank, (kh, 1), (sh, 1), (ph, 0), (dh, 1), bias=False),
                nn.Conv2d(rank, layer.out_channels, (1, kw), (1, sw), (0, pw), (1, dw), bias=has_bias),
            )
        first = kind(
            layer.in_channels,
            rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        return nn.Sequential(first, kind(rank, layer.out_channels, 1, bias=has_bias))
    weight = layer.get_parameter("weight")
    outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.mT.shape
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=has_bias))
