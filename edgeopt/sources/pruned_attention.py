"""Multi-head attention whose heads are no longer as wide together as its input."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class PrunedMultiheadAttention(nn.Module):
    """Stands where a `torch.nn.MultiheadAttention` lost heads, which torch's class can't: it divides its input's width
    by their number. Takes and returns what that one does, and computes the same where it has the same weights.

    Args:
        query_width, key_width, value_width: features of the inputs.
        output_width: features of the output.
        num_heads: heads that are left.
        head_dim: width of each.
        has_bias: of all four projections.
        dropout: of the attention's weights, in training.
        batch_first: inputs and outputs are (batch, steps, features) rather than (steps, batch, features).

    Raises ValueError for a number of heads, a width or a dropout that there can't be.
    """

    #: `torch.nn.TransformerEncoderLayer` looks at these before it hands a packed weight, which is not here, to its
    #: fused kernel instead of calling this.
    in_proj_bias: ClassVar[None] = None
    _qkv_same_embed_dim: ClassVar[bool] = False

    def __init__(
        self,
        query_width: int,
        key_width: int,
        value_width: int,
        output_width: int,
        num_heads: int,
        head_dim: int,
        has_bias: bool,
        dropout: float,
        batch_first: bool,
    ) -> None:
        super().__init__()
        if num_heads < 1 or head_dim < 1:
            raise ValueError(f"an attention has heads of some width, not {num_heads} of width {head_dim}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is a share, not {dropout}")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.batch_first = float(dropout), batch_first
        inner = num_heads * head_dim
        self.q_proj = nn.Linear(query_width, inner, has_bias)
        self.k_proj = nn.Linear(key_width, inner, has_bias)
        self.v_proj = nn.Linear(value_width, inner, has_bias)
        self.out_proj = nn.Linear(inner, output_width, has_bias)

    @property
    def query_width(self) -> int:
        return _end(self.q_proj, 0).in_features

    @property
    def key_width(self) -> int:
        return _end(self.k_proj, 0).in_features

    @property
    def value_width(self) -> int:
        return _end(self.v_proj, 0).in_features

    @property
    def output_width(self) -> int:
        return _end(self.out_proj, -1).out_features

    @property
    def has_bias(self) -> bool:
        return _end(self.out_proj, -1).bias is not None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, shaped as the query is, and the weights ((batch,) heads, queries, keys), without the heads where
        they are averaged, or None.

        Masks are True, or -inf, where nothing is to be attended to: `key_padding_mask` ((batch,) keys), `attn_mask`
        (queries, keys) or (batch * heads, queries, keys). `is_causal` tells that `attn_mask` is a causal one.

        Raises ValueError for `is_causal` without `attn_mask`, as torch has an error there.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal tells about attn_mask, which is not there")
        is_batched = query.dim() == 3
        q, k, v = (
            self._split(projection, part, is_batched)
            for projection, part in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, q.shape[0], q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            products = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(2, 3)
            weights = (products if mask is None else products + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not is_batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _split(self, projection: nn.Module, value: Tensor, is_batched: bool) -> Tensor:
        """(batch, heads, steps, head_dim)."""
        if not is_batched:
            value = value.unsqueeze(0)
        elif not self.batch_first:
            value = value.transpose(0, 1)
        heads: Tensor = projection(value).unflatten(2, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the products: (batch or 1, heads or 1, queries or 1, keys)."""
        masks = []
        if attention is not None:
            shape = (1, 1) if attention.dim() == 2 else (batch, self.num_heads)
            masks.append(_additive(attention, dtype).reshape(*shape, *attention.shape[-2:]))
        if padding is not None:
            masks.append(_additive(padding, dtype).reshape(batch, 1, 1, padding.shape[-1]))
        return sum(masks[1:], masks[0]) if masks else None


def _end(projection: nn.Module, index: int) -> nn.Linear:
    """The first or last of the layers that were put in a projection's place. Raises AttributeError, as for any module
    without widths, where that is no linear one."""
    layer = projection[index] if isinstance(projection, nn.Sequential) else projection
    if not isinstance(layer, nn.Linear):
        raise AttributeError(f"a {type(layer).__name__} has no features")
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
