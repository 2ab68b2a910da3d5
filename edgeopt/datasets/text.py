"""Texts -> token ids, through a Hugging Face tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import ConfigError, MissingError
from edgeopt.types import Array, Dim, TensorSpec, TextPreprocessing

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

#: What a tokenizer gives, in the order that models take it, and the input names that mean it.
FIELDS: dict[str, frozenset[str]] = {
    "input_ids": frozenset({"input_ids", "ids", "token_ids", "tokens", "input_word_ids"}),
    "attention_mask": frozenset({"attention_mask", "mask", "input_mask", "padding_mask"}),
    "token_type_ids": frozenset({"token_type_ids", "type_ids", "segment_ids", "input_type_ids"}),
}

#: Names of padding tokens where the tokenizer's files don't say.
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>")


class TextTransform:
    """Applies a `TextPreprocessing`.

    Texts are cut to max_length, or to the model's own sequence length if that is shorter. They are padded to
    max_length unless padding is "none", and always to a sequence length that the model fixes. Inputs that name their
    padding are filled with it at the end.
    """

    def __init__(self, preprocessing: TextPreprocessing, inputs: tuple[TensorSpec, ...]) -> None:
        self._inputs = inputs
        self._fields = _match_fields(inputs)
        shortest, longest = _lengths(inputs)
        limit = preprocessing.max_length if longest is None else min(preprocessing.max_length, longest)
        self._pad_to = max(shortest, limit if preprocessing.padding == "max_length" else 0)
        self._prefix = preprocessing.prefix
        file = tokenizer_file(preprocessing.tokenizer)
        self._tokenizer = load_tokenizer(file)
        self._padding = _padding(self._tokenizer, file, inputs) if self._pad_to else None
        self._configure(limit)

    def __call__(self, raw: object, where: str) -> dict[str, Array] | None:
        del where
        if not isinstance(raw, str | tuple) or not raw or not all(isinstance(text, str) for text in raw):
            return None
        encoding = self._encoded(raw)
        if self._padding is not None:
            encoding.pad(self._pad_to, **self._padding)
        return {
            spec.name: np.asarray([_field(encoding, field)]).astype(spec.dtype)
            for spec, field in zip(self._inputs, self._fields, strict=True)
        }

    def ids(self, raw: str | tuple[str, ...]) -> list[int]:
        """Tokens of a text, cut but not padded."""
        ids: list[int] = self._encoded(raw).ids
        return ids

    def arrays(self, ids: list[int]) -> dict[str, Array]:
        """The model's inputs for these tokens, padded at the end."""
        width = max(len(ids), self._pad_to)
        filler = 0 if self._padding is None else self._padding["pad_id"]
        values = {"input_ids": (ids, filler), "attention_mask": ([1] * len(ids), 0), "token_type_ids": ([], 0)}
        arrays: dict[str, Array] = {}
        for spec, field in zip(self._inputs, self._fields, strict=True):
            given, fill = values[field]
            arrays[spec.name] = np.full((1, width), fill, spec.dtype)
            arrays[spec.name][0, : len(given)] = given
        return arrays

    def _encoded(self, raw: str | tuple[str, ...]) -> Encoding:
        first, *others = (raw,) if isinstance(raw, str) else raw
        return self._tokenizer.encode(self._prefix + first, others[0] if others else None)

    def _configure(self, limit: int) -> None:
        """Ours replaces what tokenizer.json itself says about lengths: many hold the padding of their training."""
        own = self._tokenizer.truncation or {}
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(limit, direction=own.get("direction", "right"))


def _match_fields(inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    """The tokenizer's field for each input: by name, or by order where no name says anything."""
    by_name = [next((f for f, names in FIELDS.items() if spec.name.lower() in names), None) for spec in inputs]
    known = tuple(field for field in by_name if field is not None)
    if len(known) == len(inputs):
        return known
    if not known and len(inputs) <= len(FIELDS):
        return tuple(FIELDS)[: len(inputs)]
    unknown = next((spec.name for spec, field in zip(inputs, by_name, strict=True) if field is None), inputs[-1].name)
    raise ConfigError(
        f"a tokenizer has no field for the model's input {unknown!r}",
        where="preprocessing of kind 'text'",
        fix=f"call the model's inputs {', '.join(FIELDS)}, or use a .npz or file.py:factory data set",
    )


def _lengths(inputs: tuple[TensorSpec, ...]) -> tuple[int, int | None]:
    """(fewest, most) tokens that all inputs take; 0 and None where the model doesn't mind."""
    shortest, longest = 0, None
    for spec in inputs:
        if len(spec.shape) != 2:
            raise ConfigError(
                f"token ids are (batch, sequence), this input has {len(spec.shape)} dimensions",
                where=f"input {spec.name!r}",
            )
        size = spec.shape[1]
        low, high = (size.min, size.max) if isinstance(size, Dim) else (size, size)
        # A lower bound of 1 only says that empty texts are not taken.
        shortest = max(shortest, low if low > 1 else 0)
        longest = high if longest is None else min(longest, high)
    return shortest, longest


def tokenizer_file(tokenizer: str) -> Path:
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            "no such tokenizer", where=str(file), fix="give a tokenizer.json or the directory that holds one"
        )
    return file


def load_tokenizer(file: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingError.extra("tokenizers", "hf", "turning text into tokens") from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # The Rust library raises bare Exceptions.
        raise ConfigError(f"is not a tokenizer: {error}", where=str(file)) from error


def _padding(tokenizer: Tokenizer, file: Path, inputs: tuple[TensorSpec, ...]) -> dict[str, str | int]:
    """Arguments of `Encoding.pad`: what the model declares, else from tokenizer.json, else from the files that
    transformers writes beside it."""
    declared = next((spec.padding for spec in inputs if spec.padding is not None and "mask" not in spec.name), None)
    if declared is not None:
        name = tokenizer.id_to_token(declared) or ""
        return {"direction": "right", "pad_id": declared, "pad_type_id": 0, "pad_token": name}
    own = tokenizer.padding or {}
    config = config_beside(file)
    direction = own.get("direction") or config.get("padding_side") or "right"
    named = own.get("pad_token") or config.get("pad_token")
    token = next((t for t in (named, *PAD_TOKENS) if t and tokenizer.token_to_id(t) is not None), None)
    if token is None:
        raise ConfigError(
            "names no padding token",
            where=str(file),
            fix="set pad_token in tokenizer_config.json beside it, or declare padding = 'none'",
        )
    return {
        "direction": str(direction),
        "pad_id": tokenizer.token_to_id(token),
        "pad_type_id": own.get("pad_type_id", 0),
        "pad_token": token,
    }


def config_beside(file: Path) -> dict[str, str]:
    """pad_token, padding_side and eos_token from tokenizer_config.json; empty when there is none."""
    path = file.with_name("tokenizer_config.json")
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where=str(path)) from error
    found: dict[str, str] = {}
    for key in ("pad_token", "padding_side", "eos_token"):
        value = config.get(key) if isinstance(config, dict) else None
        # A token is its text, or an object that holds the text and how it is stripped.
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found


def _field(encoding: Encoding, field: str) -> list[int]:
    ids: list[int] = {
        "input_ids": encoding.ids,
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
    }[field]
    return ids
