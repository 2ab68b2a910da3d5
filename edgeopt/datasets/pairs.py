"""Pairs of texts: what a network that writes reads, and what it should write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.errors import DataError
from edgeopt.types import TextPreprocessing

#: Names under which published data sets hold what is read and what is to be written, beside those that are declared.
SOURCE_KEYS = ("source", "document", "article", "text")
TARGET_KEYS = ("target", "summary", "highlights")
#: Holds both: {"en": ..., "de": ...}, the source first.
BOTH_KEY = "translation"

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TextPair:
    """One item of a data set of sequences.

    Attributes:
        text: what is read; two texts where the model takes a pair of them.
        targets: texts of which one should be written, the first being the one to learn; empty where none is known.
    """

    text: str | tuple[str, ...]
    targets: tuple[str, ...] = ()


def pair_of_row(row: Row, preprocessing: TextPreprocessing, where: str) -> TextPair:
    """The texts that a JSON object or a user's dictionary holds.

    The declared `text_keys` and `target_key` win; where the row has none of the former, the usual names are taken.

    Raises DataError where the text is missing or blank, or a target is no text.
    """
    keys, target_key = preprocessing.text_keys, preprocessing.target_key
    if not all(key in row for key in keys):
        both = row.get(BOTH_KEY)
        if isinstance(both, Mapping) and len(both) >= 2:
            row = dict(both)
            keys, target_key = (str(next(iter(row))),), target_key if target_key in row else str(list(row)[1])
        else:
            found = next((key for key in SOURCE_KEYS if key in row and key != target_key), None)
            if found is None:
                known = f"{', '.join(map(repr, keys))} (it has {', '.join(map(repr, row)) or 'nothing'})"
                raise DataError(f"has no {known}", where=where, fix="set text_keys to the keys that hold the texts")
            keys = (found,)
    if target_key not in row:
        target_key = next((key for key in TARGET_KEYS if key in row and key not in keys), None)
    texts = tuple(_text(row[key], key, where) for key in keys)
    targets = () if target_key is None else _targets(row[target_key], target_key, where)
    return TextPair(texts[0] if len(texts) == 1 else texts, targets)


def pair_of_text(text: str, preprocessing: TextPreprocessing) -> TextPair:
    """A text that comes alone: its own target where text and target have one key, else without a target."""
    is_own = preprocessing.text_keys == (preprocessing.target_key,)
    return TextPair(text, (text,) if is_own else ())


def _targets(value: object, key: str, where: str) -> tuple[str, ...]:
    """One text, or several of which each is right."""
    texts = value if isinstance(value, list | tuple) else (value,)
    if not texts:
        raise DataError(f"{key!r} is empty", where=where, fix="give at least one text")
    return tuple(_text(text, key, where) for text in texts)


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{key!r} is not a text", where=where)
    if not value.strip():
        raise DataError(f"{key!r} is blank", where=where, fix="leave that line out")
    return value
