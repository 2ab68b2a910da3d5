"""ONNX nodes with constant weights as real torch layers, which quantizers and pruning look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from edgeopt.sources.onnx_ops_nn import pad_window, window_pads
from edgeopt.sources.onnx_values import Node
from edgeopt.types import Array

Weights = Mapping[str, Array]

#: Spatial rank -> layer.
CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Callable[..., nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
#: Rank of the data -> layer; a batch norm in ONNX has no rank of its own.
BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


class WindowPadding(nn.Module):
    """The padding of a convolution that is not the same on both sides, or that depends on the input's size."""

    def __init__(self, node: Node, kernel: list[int]) -> None:
        super().__init__()
        self.node = node
        self.kernel = kernel

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return pad_window(data, *window_pads(self.node, data, self.kernel))


def layer_for(node: Node, weights: Weights, rank: int | None) -> nn.Module | None:
    """The layer that a node is, taking the node's first input alone; None where it has no constant weights.

    `rank` is the number of dimensions of the first input where it is known.
    """
    parameters = [weights.get(name) for name in node.inputs[1:] if name]
    if not parameters or any(value is None for value in parameters):
        return None
    arrays = [value for value in parameters if value is not None]
    if arrays[0].dtype.kind != "f":
        return None
    maker = LAYERS.get(node.op)
    return maker(node, arrays, rank) if maker is not None else None


def _conv(node: Node, arrays: list[Array], rank: int | None) -> nn.Module | None:
    del rank
    weight, groups = arrays[0], node.integer("group", 1)
    kernel = list(weight.shape[2:])
    if len(kernel) not in CONVOLUTIONS:
        return None
    automatic = node.text("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    pads = node.integers("pads") or [0] * (2 * len(kernel))
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    inside = not automatic and begins == ends
    layer = CONVOLUTIONS[len(kernel)](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(kernel),
        stride=tuple(node.integers("strides") or [1] * len(kernel)),
        padding=tuple(begins) if inside else 0,
        dilation=tuple(node.integers("dilations") or [1] * len(kernel)),
        groups=groups,
        bias=len(arrays) > 1,
    )
    _fill(layer, weight, arrays[1] if len(arrays) > 1 else None)
    return layer if inside else nn.Sequential(WindowPadding(node, kernel), layer)


def _conv_transpose(node: Node, arrays: list[Array], rank: int | None) -> nn.Module | None:
    del rank
    weight, groups = arrays[0], node.integer("group", 1)
    kernel = list(weight.shape[2:])
    if len(kernel) not in TRANSPOSED:
        return None
    if node.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "") or "output_shape" in node.attributes:
        raise node.error("automatic padding and output_shape are not supported")
    pads = node.integers("pads") or [0] * (2 * len(kernel))
    begins, ends = pads[: len(kernel)], pads[len(kernel) :]
    extra = node.integers("output_padding") or [0] * len(kernel)
    # Cutting less at the end is output padding: size = (in - 1) * stride - begin - end + kernel + output_padding.
    extra = [more + begin - end for more, begin, end in zip(extra, begins, ends, strict=True)]
    if min(extra) < 0:
        raise node.error("cuts more at the end than at the beginning")
    layer = TRANSPOSED[len(kernel)](
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(kernel),
        stride=tuple(node.integers("strides") or [1] * len(kernel)),
        padding=tuple(begins),
        output_padding=tuple(extra),
        dilation=tuple(node.integers("dilations") or [1] * len(kernel)),
        groups=groups,
        bias=len(arrays) > 1,
    )
    return _fill(layer, weight, arrays[1] if len(arrays) > 1 else None)


def _gemm(node: Node, arrays: list[Array], rank: int | None) -> nn.Module | None:
    del rank
    bias = arrays[1].reshape(-1) if len(arrays) > 1 else None
    weight = arrays[0] if node.integer("transB", 0) else arrays[0].T
    if node.integer("transA", 0) or (bias is not None and bias.size not in (1, weight.shape[0])):
        return None
    if bias is not None:
        bias = (bias * node.number("beta", 1.0)).astype(weight.dtype).repeat(weight.shape[0] if bias.size == 1 else 1)
    return _linear((weight * node.number("alpha", 1.0)).astype(weight.dtype), bias)


def _matmul(node: Node, arrays: list[Array], rank: int | None) -> nn.Module | None:
    """A third input is a bias that `onnx_module` found behind it."""
    del node, rank
    if arrays[0].ndim != 2:
        return None
    return _linear(arrays[0].T, arrays[1] if len(arrays) > 1 else None)


def _linear(weight: Array, bias: Array | None) -> nn.Module:
    """A linear layer from a (out, in) weight."""
    return _fill(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight, bias)


def _batch_norm(node: Node, arrays: list[Array], rank: int | None) -> nn.Module | None:
    if rank not in BATCH_NORMS or len(arrays) != 4:
        return None
    scale, bias, mean, variance = arrays
    layer = BATCH_NORMS[rank](scale.shape[0], eps=node.number("epsilon", 1e-5))
    layer.load_state_dict({"running_mean": _tensor(mean), "running_var": _tensor(variance)}, strict=False)
    return _fill(layer, scale, bias)


def _layer_norm(node: Node, arrays: list[Array], rank: int | None) -> nn.Module | None:
    axis = node.integer("axis", -1)
    if rank is None or arrays[0].ndim != (rank - axis if axis >= 0 else -axis) or len(node.outputs) > 1:
        return None
    layer = nn.LayerNorm(list(arrays[0].shape), eps=node.number("epsilon", 1e-5), bias=len(arrays) > 1)
    return _fill(layer, arrays[0], arrays[1] if len(arrays) > 1 else None)


def _fill(layer: nn.Module, weight: Array, bias: Array | None) -> nn.Module:
    state = {"weight": _tensor(weight)} | ({"bias": _tensor(bias)} if bias is not None else {})
    layer.to(state["weight"].dtype).load_state_dict(state, strict=False)
    return layer


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.copy())


LAYERS: dict[str, Callable[[Node, list[Array], int | None], nn.Module | None]] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
}
