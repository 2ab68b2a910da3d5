"""Heads of torch's own `MultiheadAttention`, which divides its input's width by their number: it is replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.compression.pruning.groups import Attribute, PruningGroup, Slice
from edgeopt.layer_names import strip_wrapper

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.sources.structure import PrunedMultiheadAttention

_Side = Literal["out", "in"]
#: Its projections in the order of the rows of its packed weight and bias, as the replacement names them.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def multihead_groups(module: nn.Module) -> Iterator[tuple[str, PruningGroup | str]]:
    """Path of every `MultiheadAttention` -> a candidate of its heads, or why they stay."""
    from torch import nn

    owners = Counter(id(tensor) for part in module.modules() for tensor in part._parameters.values())
    for path, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            shared = any(owners[id(tensor)] > 1 for tensor in part.parameters())
            reason = "shares its weights with another layer" if shared else _obstacle(part)
            if not strip_wrapper(path):
                reason = "it is the model itself, whose class has to stay"
            yield path, f"attention: {reason}" if reason is not None else _group(path, part)


def _group(path: str, attention: nn.MultiheadAttention) -> PruningGroup:
    heads, size = attention.num_heads, attention.head_dim
    queries = np.arange(heads * size, dtype=np.int64).reshape(heads, size)
    packed = np.concatenate([queries, queries + heads * size, queries + 2 * heads * size], axis=1)
    slices = (Slice(path, "out", packed), Slice(f"{path}.out_proj", "in", queries))
    return PruningGroup(path, "heads", heads, 3 * size, slices, (Attribute(path, "num_heads", 1),))


def _obstacle(attention: nn.MultiheadAttention) -> str | None:
    """Why no replacement computes the same, in a few words; None where one does."""
    from torch import nn
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

    if attention.num_heads < 2:
        return "it has one head"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "keys and values of its own (add_bias_kv, add_zero_attn) go with its heads"
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in attention.modules())
    is_stock = type(attention) is nn.MultiheadAttention
    is_stock &= type(attention.out_proj) in (nn.Linear, NonDynamicallyQuantizableLinear)
    is_stock &= (attention.in_proj_bias is None) == (attention.out_proj.bias is None)
    if hooked or not is_stock:
        return "it is a MultiheadAttention with changes of its own (a subclass, hooks, a parametrization)"
    return None


def split_attentions(
    module: nn.Module, removed: Mapping[tuple[str, str, _Side], set[int]]
) -> dict[tuple[str, str, _Side], set[int]]:
    """Replace those that lose heads, in place: by attentions of the same function with a layer per projection.

    Args:
        removed: (layer, bare parameter or "", side) -> channels of it that go. Returned for the layers there are now.

    Outputs of an `nn.TransformerEncoder` at padded steps are then what they are in exported files, and no longer the
    zeros that its fused kernels leave there: these need torch's class.
    """
    from torch import nn

    found: dict[tuple[str, str, _Side], set[int]] = {}
    for (layer, parameter, side), channels in removed.items():
        old = module.get_submodule(layer)
        if isinstance(old, nn.MultiheadAttention):
            _replace(module, old, _split(old))
            for third, name in enumerate(_PROJECTIONS):
                first = third * old.embed_dim
                own = {channel - first for channel in channels if first <= channel < first + old.embed_dim}
                found[f"{layer}.{name}", parameter, side] = own
        else:
            found[layer, parameter, side] = channels
    return found


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    from torch import nn

    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    for stack in module.modules():
        if isinstance(stack, nn.TransformerEncoder) and any(part is new for part in stack.modules()):
            stack.use_nested_tensor = False


def _split(old: nn.MultiheadAttention) -> PrunedMultiheadAttention:
    import torch

    from edgeopt.sources.structure import PrunedMultiheadAttention

    with torch.device("meta"):
        new = PrunedMultiheadAttention(
            old.embed_dim, old.kdim, old.vdim, old.out_proj.out_features, old.num_heads, old.head_dim,
            old.in_proj_bias is not None, old.dropout, old.batch_first,
        )  # fmt: skip
    own = (old.q_proj_weight, old.k_proj_weight, old.v_proj_weight)
    for third, (name, weight) in enumerate(zip(_PROJECTIONS, own, strict=True)):
        projection = new.get_submodule(name)
        projection.weight = _third(old.in_proj_weight, third) if weight is None else weight
        if old.in_proj_bias is not None:
            projection.bias = _third(old.in_proj_bias, third)
    new.out_proj.weight, new.out_proj.bias = old.out_proj.weight, old.out_proj.bias
    return new.train(old.training)


def _third(packed: Tensor, third: int) -> nn.Parameter:
    from torch import nn

    return nn.Parameter(packed.detach().chunk(3)[third].clone(), requires_grad=packed.requires_grad)
