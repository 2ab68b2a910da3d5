"""Our frozen values as JSON text and back: the same bytes for the same values, and strict when reading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar

import numpy as np

from edgeopt.errors import UsageError

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
T = TypeVar("T")

#: JSON has no infinity, but 1e999 is a JSON number and every common parser reads it as one.
_INFINITY = {math.inf: "\0+inf", -math.inf: "\0-inf"}


def to_plain(value: object) -> Plain:
    """Dataclasses, mappings and sequences as dicts and lists; NaN as None. Raises TypeError on anything else."""
    match value:
        case None | bool() | str() | int():
            return value
        case np.generic():
            return to_plain(value.item())
        case float():
            return None if math.isnan(value) else _INFINITY.get(value, value)
        case Mapping():
            return {str(key): to_plain(item) for key, item in value.items()}
        case tuple() | list():
            return [to_plain(item) for item in value]
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    raise TypeError(f"can't be written as JSON: {type(value).__name__}")


def dumps(value: object) -> str:
    """Indented JSON with sorted keys and a final newline."""
    text = json.dumps(to_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    for number, token in _INFINITY.items():
        text = text.replace(json.dumps(token), "1e999" if number > 0 else "-1e999")
    return text + "\n"


def loads(text: str | bytes, where: str) -> Plain:
    """Parse JSON. Raises UsageError naming `where` when it isn't any (too deeply nested included)."""
    try:
        plain: Plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"is not valid JSON: {error}", where=where) from error
    return plain


def from_plain(type_: type[T], value: Plain, where: str) -> T:
    """Rebuild a dataclass from what `to_plain` made of it. Raises UsageError naming `where` and the key."""
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[T] = TypeAdapter(type_)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(first["msg"], where=f"{where}: {key}" if key else where) from error
