"""Pairs of texts -> token ids for a network that writes, and the tokens that it should write as the label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeopt.datasets.pairs import TextPair
from edgeopt.datasets.text import TextTransform, config_beside, load_tokenizer, tokenizer_file
from edgeopt.errors import ConfigError
from edgeopt.types import Array, Dim, TensorSpec, TextPreprocessing

#: A position that no loss counts.
SKIPPED = -100

#: Names of the inputs that hold what was written so far, and mark it.
TOKENS = frozenset({"decoder_input_ids", "decoder_ids", "decoder_tokens"})
MASKS = frozenset({"decoder_attention_mask", "decoder_mask"})


def writes(preprocessing: TextPreprocessing, inputs: tuple[TensorSpec, ...]) -> bool:
    """Whether the preprocessing is for a network that writes, rather than one that only reads."""
    return preprocessing.target_key is not None or any(spec.name.lower() in TOKENS for spec in inputs)


def text_transform(
    preprocessing: TextPreprocessing, inputs: tuple[TensorSpec, ...]
) -> TextTransform | SequenceTransform:
    """What applies the preprocessing: for a network that writes, or for one that only reads."""
    return (SequenceTransform if writes(preprocessing, inputs) else TextTransform)(preprocessing, inputs)


def given_target(
    decoder: tuple[TensorSpec, ...], start_ids: tuple[int, ...], ids: list[int]
) -> tuple[dict[str, Array], Array | None]:
    """What a decoder reads and is told where it is given the target.

    Args:
        decoder: its inputs: tokens, and maybe their mask.
        ids: tokens of the target with the one that ends it; empty where it is not known.

    Returns the inputs (1, length) by name, and the label (1, length), int64, -100 where nothing is told.
    """
    read = [*start_ids, *ids[:-1]]
    width = max(len(read), _shortest(decoder))
    inputs: dict[str, Array] = {}
    for spec in decoder:
        is_mask = spec.name.lower() in MASKS
        values = [1] * len(read) if is_mask else read
        inputs[spec.name] = _row(values, width, 0 if is_mask else (spec.padding or 0)).astype(spec.dtype)
    told = [SKIPPED] * (len(start_ids) - 1) + ids
    return inputs, _row(told, width, SKIPPED) if ids else None


class SequenceTransform:
    """Applies a `TextPreprocessing` to a `TextPair`.

    Of an encoder-decoder the decoder reads `start_ids` and the target but for its last token; position k of the label
    is the token behind the decoder's token k. Of a decoder-only network the input is the text, followed by the target
    where that is another one; the label is the input, one earlier, at the target's positions.

    Texts are cut to `max_length`, targets to `target_max_length`, the token that ends them staying. Where the
    tokenizer does not write the end token that tokenizer_config.json names, it is put behind the target.
    """

    def __init__(self, preprocessing: TextPreprocessing, inputs: tuple[TensorSpec, ...]) -> None:
        decoder = tuple(spec for spec in inputs if spec.name.lower() in TOKENS | MASKS)
        self._decoder = decoder
        self._encoder = tuple(spec for spec in inputs if spec not in decoder)
        self._start = preprocessing.start_ids
        self._is_own_target = preprocessing.text_keys == (preprocessing.target_key,)
        if decoder and not self._start:
            raise ConfigError(
                "names no start_ids, with which the decoder begins",
                where="preprocessing of kind 'text'",
                fix="set start-ids to the model's decoder_start_token_id",
            )
        self._source = TextTransform(replace(preprocessing, target_key=None), self._encoder)
        longest = _longest(decoder or self._encoder)
        limit = preprocessing.target_max_length
        if longest is not None:
            limit = min(limit, longest - max(0, len(self._start) - 1))
        self._longest = longest
        file = tokenizer_file(preprocessing.tokenizer)
        self._tokenizer = load_tokenizer(file)
        self._end = self._end_id(file)
        self._limit = limit
        self._tokenizer.no_padding()
        # Its end token is one of them, and where it writes none, one is left free for it.
        self._tokenizer.enable_truncation(max(1, limit - (0 if self._writes_end() else 1)))

    def __call__(self, raw: object, where: str) -> dict[str, Array] | None:
        prepared = self.prepare(raw, where)
        return None if prepared is None else prepared[0]

    def prepare(self, raw: object, where: str) -> tuple[dict[str, Array], Array | None] | None:
        """The model's inputs, and the label (1, length), int64, -100 where nothing is told; None where the pair has
        no target. None in all when `raw` is no text."""
        if isinstance(raw, str | tuple):
            raw = TextPair(raw)
        if not isinstance(raw, TextPair):
            return None
        if not self._decoder:
            return self._continued(raw, where)
        inputs = self._source(raw.text, where)
        if inputs is None:
            return None
        ids = self._encoded(raw.targets[0]) if raw.targets else []
        decoder, label = given_target(self._decoder, self._start, ids)
        return inputs | decoder, label

    def _continued(self, pair: TextPair, where: str) -> tuple[dict[str, Array], Array | None] | None:
        if not pair.targets:
            inputs = self._source(pair.text, where)
            return None if inputs is None else (inputs, None)
        if self._is_own_target and pair.targets == (pair.text,):
            ids = self._source.ids(pair.text)
            told = ids[1:]
        else:
            target = self._encoded(pair.targets[0])
            room = None if self._longest is None else max(1, self._longest - len(target))
            prompt = self._source.ids(pair.text)[:room]
            ids = [*prompt, *target]
            told = [SKIPPED] * (len(prompt) - 1) + target
        inputs = self._source.arrays(ids)
        width = next(iter(inputs.values())).shape[1]
        return inputs, _row(told, width, SKIPPED)

    def _encoded(self, target: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(target, add_special_tokens=bool(self._decoder)).ids
        if self._decoder and tuple(ids[: len(self._start)]) == self._start:
            ids = ids[len(self._start) :]  # the decoder begins with them anyway
        if self._end is not None and (not ids or ids[-1] != self._end):
            ids = [*ids, self._end]
        return ids[: self._limit]

    def _end_id(self, file: Path) -> int | None:
        token = config_beside(file).get("eos_token")
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found

    def _writes_end(self) -> bool:
        ids = self._tokenizer.encode("a", add_special_tokens=bool(self._decoder)).ids
        return self._end is None or (bool(ids) and ids[-1] == self._end)


def _row(values: list[int], width: int, filler: int) -> Array:
    row = np.full((1, max(width, len(values))), filler, np.int64)
    row[0, : len(values)] = values
    return row


def _longest(inputs: tuple[TensorSpec, ...]) -> int | None:
    sizes = [spec.shape[1].max if isinstance(spec.shape[1], Dim) else spec.shape[1] for spec in _matrices(inputs)]
    return min(sizes, default=None)


def _shortest(inputs: tuple[TensorSpec, ...]) -> int:
    sizes = [spec.shape[1].min if isinstance(spec.shape[1], Dim) else spec.shape[1] for spec in _matrices(inputs)]
    return max(sizes, default=1)


def _matrices(inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    for spec in inputs:
        if len(spec.shape) != 2:
            raise ConfigError(
                f"token ids are (batch, sequence), this input has {len(spec.shape)} dimensions",
                where=f"input {spec.name!r}",
            )
    return inputs
