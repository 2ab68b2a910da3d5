"""Hugging Face networks that write, as edgeopt runs them: whole with a given target, and token by token.

Each adapter holds the network under WRAPPED_ATTRIBUTE and calls it through its own forward, with caches and masks made
by us. So nothing depends on how a family names its layers, and nothing on their sizes: an adapter goes on working after
layers were pruned. What its methods take and return is told in `edgeopt.sources.generative`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from edgeopt.sources.generative_cache import Rows, beside_memory, pair, recording, rows_of, slots
from edgeopt.types import WRAPPED_ATTRIBUTE

#: "Minus infinity" of attention masks: finite, and the number of transformers' own masks, which the exporters know.
MASKED = torch.finfo(torch.float32).min


class EncoderDecoder(nn.Module):
    """An encoder-decoder with a head over the vocabulary, whatever its encoder takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.add_module(WRAPPED_ATTRIBUTE, network)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Rows:
        mask = _padding_mask(source_mask)
        encoder = _network(self).get_encoder()
        hidden = BaseModelOutput(last_hidden_state=encoder(source, attention_mask=mask).last_hidden_state)
        memory = recording()
        # The decoder's own projections make the memory when it is run with nothing remembered, on any token. What that
        # run computes besides is used by nothing, and so is in no exported graph.
        token = torch.zeros((source.shape[0], 1), dtype=torch.int64, device=source.device)
        _network(self)(
            encoder_outputs=hidden,
            attention_mask=mask,
            decoder_input_ids=token,
            decoder_attention_mask=_first_token_mask(token),
            past_key_values=pair(recording(), memory),
            use_cache=True,
        )
        return rows_of(memory)

    def rows(self, target_ids: Tensor, source_mask: Tensor | None, memory: Rows) -> Rows:
        own = recording()
        cache = beside_memory(own, memory)
        self._decode(target_ids, _causal_mask(target_ids), source_mask, memory, cache)
        return rows_of(own)

    def decode(
        self, token: Tensor, position: Tensor, source_mask: Tensor | None, memory: Rows, past: Rows
    ) -> tuple[Tensor, Rows]:
        own = slots(past, position)
        mask = _slots_mask(past, position)
        logits = self._decode(token, mask, source_mask, memory, beside_memory(own, memory))
        return logits[:, -1], rows_of(own)

    def _teach(self, source: Tensor, source_mask: Tensor | None, target_ids: Tensor) -> Tensor:
        """Logits (batch, target, vocabulary) behind each token of a given target."""
        logits: Tensor = _network(self)(
            source,
            attention_mask=_padding_mask(source_mask),
            decoder_input_ids=target_ids,
            decoder_attention_mask=_causal_mask(target_ids),
            use_cache=False,
        ).logits
        return logits

    def _decode(self, ids: Tensor, mask: Tensor, source_mask: Tensor | None, memory: Rows, cache: object) -> Tensor:
        # Stands for the encoder's output, of which the network only asks whether it is there, and how long it is.
        hidden = memory[0].new_zeros((ids.shape[0], memory[0].shape[2], 1))
        logits: Tensor = _network(self)(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=_padding_mask(source_mask),
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits


class TextToText(EncoderDecoder):
    """One whose encoder reads tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self._teach(input_ids, attention_mask, decoder_input_ids)


class SpeechToText(EncoderDecoder):
    """One whose encoder hears a spectrogram of fixed length."""

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self._teach(input_features, None, decoder_input_ids)


class CausalLanguageModel(nn.Module):
    """A decoder-only network with a head over the vocabulary.

    Args:
        network: a transformers model for causal language modelling.
        windows: kind of layer -> how many of the last tokens it attends to, None for all of them. Kinds are those of
            the configuration's `layer_types`; a network whose layers are all alike has one, named "".
    """

    def __init__(self, network: nn.Module, windows: Mapping[str, int | None]) -> None:
        super().__init__()
        self.add_module(WRAPPED_ATTRIBUTE, network)
        self._windows = dict(windows)
        parameters = inspect.signature(network.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_kept = "logits_to_keep" in parameters

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self._run(input_ids, positions, positions, use_cache=False)

    def prefill(self, input_ids: Tensor, length: Tensor) -> tuple[Tensor, Rows]:
        own = recording()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = length - 1
        if self._takes_kept:
            logits = self._run(input_ids, positions, positions, past_key_values=own, logits_to_keep=last)
        else:
            logits = self._run(input_ids, positions, positions, past_key_values=own).index_select(1, last)
        return logits[:, 0], rows_of(own)

    def rows(self, target_ids: Tensor, source_mask: Tensor | None, memory: Rows) -> Rows:
        del source_mask, memory
        own = recording()
        positions = torch.arange(target_ids.shape[1], device=target_ids.device)
        self._run(target_ids, positions, positions, past_key_values=own)
        return rows_of(own)

    def decode(
        self, token: Tensor, position: Tensor, source_mask: Tensor | None, memory: Rows, past: Rows
    ) -> tuple[Tensor, Rows]:
        del source_mask, memory
        own = slots(past, position)
        filled = torch.arange(past[0].shape[2], device=token.device)
        return self._run(token, position, filled, past_key_values=own)[:, -1], rows_of(own)

    def _run(self, ids: Tensor, queries: Tensor, keys: Tensor, **arguments: object) -> Tensor:
        """Logits for tokens at the positions `queries`, which attend to those at `keys` that they may see."""
        masks = {kind: _additive(_visible(queries, keys, window)) for kind, window in self._windows.items()}
        if self._takes_positions:
            arguments["position_ids"] = queries[None]
        arguments.setdefault("use_cache", True)
        mask = masks.get("", masks)
        logits: Tensor = _network(self)(ids, attention_mask=mask, **arguments).logits
        return logits


def _network(adapter: nn.Module) -> PreTrainedModel:
    return adapter.get_submodule(WRAPPED_ATTRIBUTE)


def _padding_mask(mask: Tensor | None) -> Tensor | None:
    """(batch, 1, 1, source) from ones and zeros (batch, source)."""
    return None if mask is None else _additive(mask[:, None, None, :] != 0)


def _causal_mask(ids: Tensor) -> Tensor:
    """(1, 1, target, target)."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    return _additive(_visible(positions, positions, None))


def _first_token_mask(token: Tensor) -> Tensor:
    return torch.zeros((1, 1, 1, 1), device=token.device)


def _slots_mask(past: Rows, position: Tensor) -> Tensor:
    """(1, 1, 1, slots)."""
    return _additive(_visible(position, torch.arange(past[0].shape[2], device=position.device), None))


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """(1, 1, queries, keys): whether a token may look at another: not ahead, nor further back than its window."""
    distance = queries[:, None] - keys[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    return visible[None, None]


def _additive(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, MASKED)
