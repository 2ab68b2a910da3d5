"""A Hugging Face causal language model as the runtimes' own generators call it.

The generators differ in who owns the cache and how it grows. What is the same for all of them is here: how the network
is called, which tokens a token may look at, and what a cache looks like to `transformers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from edgeopt.errors import ConversionError
from edgeopt.sources.generative import writer_of
from edgeopt.sources.generative_cache import RecordingLayer
from edgeopt.sources.generative_huggingface import MASKED, CausalLanguageModel
from edgeopt.types import WRAPPED_ATTRIBUTE, Generation, Model

Tensors = tuple[Tensor, ...]
#: Kind of layer -> how many of the last tokens it looks at, None for all (see `CausalLanguageModel`).
Windows = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one layer keeps of every token: `heads` keys of `key_size` numbers and as many values of `value_size`.

    `layer` is the number by which the network calls it. They have gaps where layers were pruned.
    """

    layer: int
    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model taken out of its `Model`.

    Attributes:
        network: the Hugging Face module, whatever was pruned or trained since.
        begin_id: the token that a text begins with; where the network names none, one that ends it (as GPT-2 does).
    """

    network: PreTrainedModel
    windows: Windows
    generation: Generation
    caches: tuple[CacheShape, ...]
    begin_id: int


class Store(Protocol):
    """Where the keys and values of one layer are kept."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take those of new tokens, (B, H, L, D); give back all that a token may look at."""
        ...


class _StoredLayer(RecordingLayer):
    """One layer of transformers' cache, kept in a store of ours."""

    def __init__(self, store: Store | None) -> None:
        super().__init__()
        self._store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, *unused: object, **also_unused: object
    ) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *unused, **also_unused)
        return (key_states, value_states) if self._store is None else self._store.update(key_states, value_states)


def language_model(model: Model) -> LanguageModel:
    """The language model in it.

    Raises ConversionError where there is none, or it can't be told the positions of its tokens.
    """
    generation = model.generation
    if generation is None or generation.kind != "decoder" or model.module is None:
        raise ConversionError("is no decoder-only language model", where=model.name)
    adapter = writer_of(model.module, generation)
    network = getattr(adapter, WRAPPED_ATTRIBUTE, None)
    if not isinstance(adapter, CausalLanguageModel) or not isinstance(network, PreTrainedModel):
        raise ConversionError(
            "the runtimes' own language-model layouts are made from Hugging Face models",
            where=model.name,
            fix="export its parts, which every network with prefill() and decode() has",
        )
    if "position_ids" not in inspect.signature(network.forward).parameters:
        raise ConversionError(
            f"{type(network).__name__} takes no position_ids: its positions follow from its own cache",
            where=model.name,
            fix="export its parts instead",
        )
    begin = getattr(network.config.get_text_config(), "bos_token_id", None)
    return LanguageModel(
        network=network,
        windows=adapter._windows,
        generation=generation,
        caches=_caches(network, adapter._windows),
        begin_id=begin if isinstance(begin, int) else next(iter(generation.end_ids), generation.pad_id),
    )


def _caches(network: PreTrainedModel, windows: Windows) -> tuple[CacheShape, ...]:
    """What the layers cache, seen by running the network on two tokens: pruning may have made them differ."""
    seen: dict[int, CacheShape] = {}

    class Watch:
        def __init__(self, layer: int) -> None:
            self._layer = layer

        def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            seen[self._layer] = CacheShape(self._layer, key.shape[1], key.shape[3], value.shape[3])
            return key, value

    numbers = [number for part in network.modules() if isinstance(number := getattr(part, "layer_idx", None), int)]
    positions = torch.arange(2)
    with torch.no_grad():
        call(
            network,
            torch.zeros(1, 2, dtype=torch.int64),
            positions[None],
            masks(positions, positions, windows),
            {number: Watch(number) for number in numbers},
        )
    return tuple(seen[layer] for layer in sorted(seen))


def masks(queries: Tensor, keys: Tensor, windows: Windows, real: Tensor | None = None) -> dict[str, Tensor]:
    """Kind of layer -> mask (B or 1, 1, queries, keys) to be added to the scores, for rows of a cache.

    Args:
        queries, keys: (L,) and (K,), rows that new tokens are in, and all rows.
        real: (B, K), whether there is a token in a row; None where there is one in all rows before the queries.
    """
    distance = queries[:, None] - keys[None, :]
    found = {}
    for kind, window in windows.items():
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        visible = visible[None, None]
        if real is not None:
            visible = visible & real[:, None, None, :]
        # A row may be hidden throughout, where the batch is padded: the lowest number is finite.
        found[kind] = torch.where(visible, 0.0, MASKED)
    return found


def call(
    network: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    mask: Mapping[str, Tensor],
    stores: Mapping[int, Store],
    last_only: bool = False,
) -> Tensor:
    """Logits (B, L, V) of tokens (B, L) at positions (B, L), or (B, 1, V) of the last; the stores are written to.

    `stores` are by the network's number of the layer, `mask` by kind of layer.
    """
    cache = Cache(layers=[_StoredLayer(stores.get(layer)) for layer in range(max(stores) + 1)])
    keep = {"logits_to_keep": 1} if last_only else {}
    logits: Tensor = network(
        input_ids=input_ids,
        attention_mask=mask[""] if "" in mask else dict(mask),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **keep,
    ).logits
    return logits[:, -1:] if last_only else logits
