"""Caches for `transformers` networks whose contents are ordinary tensors, so that tracers see them as such.

Only imported where a Hugging Face network is at hand: the classes derive from `transformers`' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

#: Keys and values of all layers: key_0, value_0, key_1, ...
Rows = tuple[Tensor, ...]

if TYPE_CHECKING:
    # The base class is untyped; this is what we use of it.
    class _Layer:
        keys: Tensor | None
        values: Tensor | None
        is_initialized: bool

else:
    _Layer = CacheLayerMixin


class RecordingLayer(_Layer):
    """Starts empty and keeps what it is given: the rows of one run from the first token on."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int | Tensor:
        """Tokens before. The networks add it to their positions, which takes a tensor as well as a number."""
        return 0

    def get_max_length(self) -> int:
        return -1


class SlotLayer(RecordingLayer):
    """A cache of fixed size. What is new is put into one slot of a copy, which the attention reads; `keys` and `values`
    then hold the new row alone.

    Args:
        past_keys, past_values: (batch, heads, slots, width).
        position: int64 (1,), the slot, and so the number of tokens before.
    """

    def __init__(self, past_keys: Tensor, past_values: Tensor, position: Tensor) -> None:
        super().__init__()
        self._past = past_keys, past_values
        self._position = position

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        keys, values = self._past
        slot = (torch.arange(keys.shape[-2], device=keys.device) == self._position).view(1, 1, -1, 1)
        return torch.where(slot, key_states, keys), torch.where(slot, value_states, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        del query_length
        return self.get_max_length(), 0

    def get_seq_length(self) -> Tensor:
        return self._position

    def get_max_length(self) -> int:
        return self._past[0].shape[-2]


class MemoryLayer(RecordingLayer):
    """Keys and values of a cross-attention, which are all there from the start."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.update(keys, values)
        self._length = keys.shape[-2]

    def get_seq_length(self) -> int:
        return self._length


def recording() -> Cache:
    """An empty cache of as many layers as the network turns out to have."""
    return Cache(layer_class_to_replicate=RecordingLayer)


def slots(past: Rows, position: Tensor) -> Cache:
    """A cache that holds `past` and takes one more row at `position`."""
    return Cache(layers=[SlotLayer(k, v, position) for k, v in zip(past[::2], past[1::2], strict=True)])


def pair(own: Cache, crossed: Cache) -> EncoderDecoderCache:
    """Both caches of a decoder: its own, and that of its cross-attentions."""
    return EncoderDecoderCache(own, crossed)


def beside_memory(own: Cache, memory: Rows) -> EncoderDecoderCache:
    """The decoder's own cache beside cross-attentions that remember all they need."""
    return pair(own, Cache(layers=[MemoryLayer(k, v) for k, v in zip(memory[::2], memory[1::2], strict=True)]))


def rows_of(cache: Cache) -> Rows:
    """What its layers were given. Raises ValueError where there are none, or one was given nothing."""
    found = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if not found or any(tensor is None for tensor in found):
        raise ValueError("not every layer keeps keys and values")
    return tuple(found)
