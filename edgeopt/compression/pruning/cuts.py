"""Which tensors of a layer hold its channels, and what else in the layer tells how many there are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.errors import ConversionError

if TYPE_CHECKING:
    import torch
    from torch import nn

Channels = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Places along one dimension of one tensor of a layer.

    Attributes:
        tensor: name of the parameter or buffer in its module.
        axis: dimension of it.
        places: along it, ascending.
    """

    tensor: str
    axis: int
    places: Channels


def is_matrix_first(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is (inputs, outputs), as GPT-2 in Hugging Face transformers has it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def out_width(module: nn.Module) -> int | None:
    """Output channels of a layer whose width can change, None of any other module."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.modules.instancenorm import _InstanceNorm

    match module:
        case _ConvNd():
            return module.out_channels
        case nn.Linear():
            return module.out_features
        case _BatchNorm() | _InstanceNorm():
            return module.num_features
        case nn.GroupNorm():
            return module.num_channels
        case nn.LayerNorm() | nn.RMSNorm():
            return int(module.normalized_shape[-1])
        case nn.PReLU():
            return module.num_parameters if module.num_parameters > 1 else None
        case nn.Embedding():
            return module.embedding_dim
        case nn.RNNBase():
            return module.hidden_size * (2 if module.bidirectional else 1)
        case _ if is_matrix_first(module):
            return _matrix(module).shape[1]
        case _:
            return None


def in_width(module: nn.Module) -> int | None:
    """Input channels of a layer that mixes them, None of any other module."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    match module:
        case _ConvNd() if module.groups == 1:
            return module.in_channels
        case nn.Linear():
            return module.in_features
        case nn.RNNBase():
            return module.input_size
        case _ if is_matrix_first(module):
            return _matrix(module).shape[0]
        case _:
            return None


def cuts_of(module: nn.Module, side: Literal["out", "in"], channels: Channels) -> tuple[Cut, ...]:
    """Where these channels of a layer lie in its tensors."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    match module:
        case _ConvNd():
            return _of_convolution(module, side, channels)
        case nn.RNNBase():
            return _of_recurrent(module, side, channels)
        case nn.Embedding():
            return (Cut("weight", 1, channels),)
        case nn.MultiheadAttention():
            return tuple(_of_multihead(module, channels))
        case _ if is_matrix_first(module):
            return (Cut("weight", 0, channels),) if side == "in" else _with_bias(module, Cut("weight", 1, channels))
        case nn.Linear() if side == "in":
            return (Cut("weight", 1, channels),)
        case _:
            names = ("weight", "bias", "running_mean", "running_var")
            return tuple(Cut(name, 0, channels) for name in names if getattr(module, name, None) is not None)


def reading_cuts(module: nn.Module, side: Literal["out", "in"], channels: Channels) -> tuple[Cut, ...]:
    """Where a layer's weights take these channels in: its own state's too, where it is recurrent."""
    from torch import nn

    if side == "in":
        return cuts_of(module, side, channels)
    if isinstance(module, nn.RNNBase):
        return tuple(cut for cut in cuts_of(module, side, channels) if cut.axis == 1)
    return ()


def set_width(module: nn.Module, side: Literal["out", "in"], removed: Collection[int]) -> None:
    """Make the numbers in a layer tell what its tensors have become."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.modules.instancenorm import _InstanceNorm

    lost = len(removed)
    match module:
        case _ConvNd() if module.groups > 1:
            groups = lost * module.groups // module.out_channels
            module.in_channels -= groups * (module.in_channels // module.groups)
            module.out_channels -= lost
            module.groups -= groups
        case _ConvNd() if side == "out":
            module.out_channels -= lost
        case _ConvNd():
            module.in_channels -= lost
        case nn.Linear() if side == "out":
            module.out_features -= lost
        case nn.Linear():
            module.in_features -= lost
        case _BatchNorm() | _InstanceNorm():
            module.num_features -= lost
        case nn.GroupNorm():
            _set_group_norm(module, removed)
        case nn.LayerNorm() | nn.RMSNorm():
            module.normalized_shape = (module.normalized_shape[-1] - lost,)
        case nn.PReLU():
            module.num_parameters -= lost
        case nn.Embedding():
            module.embedding_dim -= lost
        case nn.RNNBase() if side == "out":
            module.hidden_size -= lost // (2 if module.bidirectional else 1)
        case nn.RNNBase():
            module.input_size -= lost
        case _ if is_matrix_first(module):
            name = "nf" if side == "out" else "nx"
            setattr(module, name, getattr(module, name) - lost)
        case _:
            raise ConversionError(f"has no width that {type(module).__name__} could lose")


def _set_group_norm(module: nn.GroupNorm, removed: Collection[int]) -> None:
    width = module.num_channels // module.num_groups
    left = [width] * module.num_groups
    for channel in removed:
        left[channel // width] -= 1
    sizes = {size for size in left if size}
    if len(sizes) != 1:
        raise ConversionError("its groups of channels would differ in size")
    module.num_groups = sum(size > 0 for size in left)
    module.num_channels -= len(removed)


def _of_convolution(module: nn.modules.conv._ConvNd, side: Literal["out", "in"], channels: Channels) -> tuple[Cut, ...]:
    transposed = module.transposed
    if side == "in":
        return (Cut("weight", 0 if transposed else 1, channels),)
    if module.groups == 1 or not transposed:
        return _with_bias(module, Cut("weight", 1 if transposed else 0, channels))
    outputs, inputs = module.out_channels // module.groups, module.in_channels // module.groups
    lost = np.unique(channels // outputs)
    rows = (lost[:, None] * inputs + np.arange(inputs)).reshape(-1)
    bias = (Cut("bias", 0, channels),) if module.bias is not None else ()
    return (Cut("weight", 0, rows), *bias)


def _of_recurrent(module: nn.RNNBase, side: Literal["out", "in"], channels: Channels) -> tuple[Cut, ...]:
    """All layers and directions of it are `hidden_size` wide, so they lose the same units."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    if side == "in":
        return tuple(Cut(f"weight_ih_l0{suffix}", 1, channels) for suffix in directions)
    hidden = module.hidden_size
    units = np.unique(channels % hidden)
    gates = module.get_parameter("weight_hh_l0").shape[0] // hidden
    rows = (np.arange(gates)[:, None] * hidden + units).reshape(-1)
    columns = (np.arange(len(directions))[:, None] * hidden + units).reshape(-1)
    cuts: list[Cut] = []
    for layer in range(module.num_layers):
        for suffix in directions:
            name = f"l{layer}{suffix}"
            cuts += [Cut(f"weight_ih_{name}", 0, rows), Cut(f"weight_hh_{name}", 0, rows)]
            cuts.append(Cut(f"weight_hh_{name}", 1, units))
            if layer:
                cuts.append(Cut(f"weight_ih_{name}", 1, columns))
            if module.bias:
                cuts += [Cut(f"bias_ih_{name}", 0, rows), Cut(f"bias_hh_{name}", 0, rows)]
    return tuple(cuts)


def _of_multihead(module: nn.MultiheadAttention, channels: Channels) -> Iterator[Cut]:
    """Channels of its queries, then keys, then values, side by side in one weight or in three."""
    if module._qkv_same_embed_dim:
        yield Cut("in_proj_weight", 0, channels)
    else:
        for third, name in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
            yield Cut(name, 0, channels[channels // module.embed_dim == third] - third * module.embed_dim)
    if module.in_proj_bias is not None:
        yield Cut("in_proj_bias", 0, channels)


def _with_bias(module: nn.Module, weight: Cut) -> tuple[Cut, ...]:
    has_bias = getattr(module, "bias", None) is not None
    return (weight, Cut("bias", 0, weight.places)) if has_bias else (weight,)


def _matrix(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("weight")
