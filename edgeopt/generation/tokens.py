"""Text <-> tokens, by the tokenizer.json that travels with a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from edgeopt.errors import ConfigError, DataError, MissingError
from edgeopt.types import Array, Generation


class Tokens:
    """A tokenizer for one network.

    Args:
        file: the tokenizer.json.
        generation: of the network.
        prefix: put before every text to be read.
        max_length: longer texts are cut to so many tokens, and to `Generation.max_source`, at the side that the
            tokenizer names, as `edgeopt.datasets` cuts them.

    Raises:
        ConfigError: when the file is missing or is no tokenizer.
        MissingError: when the package tokenizers is not installed.
    """

    def __init__(self, file: Path, generation: Generation, prefix: str = "", max_length: int | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingError.extra("tokenizers", "hf", "turning text into tokens") from error
        if not file.is_file():
            raise ConfigError("no such tokenizer", where=str(file))
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # The Rust library raises bare Exceptions.
            raise ConfigError(f"is not a tokenizer: {error}", where=str(file)) from error
        self.prefix = prefix
        self._generation = generation
        own = self._tokenizer.truncation or {}
        self._tokenizer.no_padding()
        limit = generation.max_source if max_length is None else min(max_length, generation.max_source)
        self._tokenizer.enable_truncation(limit, direction=own.get("direction", "right"))

    def inputs(self, text: str) -> dict[str, Array]:
        """`input_ids` and `attention_mask`, int64 (1, n): what `Writer.write` takes. Raises DataError where the text
        holds no tokens."""
        ids: list[int] = self._tokenizer.encode(self.prefix + text).ids
        if self._generation.kind == "decoder":
            # A tokenizer that closes every text would tell the network that all is said.
            while ids and ids[-1] in self._generation.end_ids:
                ids.pop()
        if not ids:
            raise DataError("holds no tokens", where=f"text {text!r}")
        row = np.asarray([ids], np.int64)
        return {"input_ids": row, "attention_mask": np.ones_like(row)}

    def text(self, ids: Sequence[int]) -> str:
        """The text up to the first end token, without special tokens."""
        written = list(takewhile(lambda token: token not in self._generation.end_ids, ids))
        text: str = self._tokenizer.decode(written, skip_special_tokens=True)
        return text.strip()
