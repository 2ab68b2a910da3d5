"""The lines of golden.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.json_data import to_plain


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """A `GoldenSequence` as one line; `inputs` are names of .npy files in the bundle."""

    prompt: str | None
    inputs: Mapping[str, str]
    ids: tuple[int, ...]
    text: str | None
    beams: int
    max_new_tokens: int


def json_line(value: object) -> str:
    """A value as JSON in one line, with its line break. Texts keep their characters; JSON escapes line breaks."""
    return json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
