"""Declared preprocessing as a table of keys and values, as it is in edgeopt.toml and in the manifest."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgeopt.errors import ConfigError
from edgeopt.types import (
    ArrayPreprocessing,
    AudioPreprocessing,
    ImagePreprocessing,
    Preprocessing,
    TextPreprocessing,
)

KINDS: dict[str, type[Preprocessing]] = {
    "image": ImagePreprocessing,
    "text": TextPreprocessing,
    "audio": AudioPreprocessing,
    "array": ArrayPreprocessing,
}


def load_preprocessing(table: Mapping[str, object]) -> Preprocessing:
    """Read a table such as `{kind = "image", height = 224, width = 224, crop-fraction = 0.875}`.

    Keys are those of the dataclass that `kind` names, in kebab-case or snake_case. Raises ConfigError on a key that
    is unknown (with the nearest valid one), missing, of the wrong type or out of range.
    """
    given = {key.replace("-", "_"): value for key, value in table.items()}
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        problem = "has no kind" if kind is None else f"has the unknown kind {kind!r}"
        raise ConfigError(problem, where="preprocessing", fix=_nearest(str(kind), tuple(KINDS)))
    declared = KINDS[kind]
    hints = get_type_hints(declared)
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in hints:
            raise ConfigError(f"has the unknown key {key!r}", where=_place(kind), fix=_nearest(key, tuple(hints)))
        values[key] = _coerce(value, hints[key], f"{_place(kind)}, {key}")
    for field in fields(declared):
        if field.name not in values and field.default is MISSING:
            raise ConfigError(f"has no {field.name!r}", where=_place(kind), fix="add that key")
    preprocessing = declared(**values)
    check_preprocessing(preprocessing)
    return preprocessing


def dump_preprocessing(preprocessing: Preprocessing) -> dict[str, object]:
    """The table of snake_case keys that `load_preprocessing` reads back to an equal value; fit for JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(preprocessing).items()}


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Raise ConfigError where a value makes no sense, whoever made it."""
    match preprocessing:
        case ImagePreprocessing():
            _check_image(preprocessing)
        case TextPreprocessing():
            _require(preprocessing.max_length >= 1, "text", "max_length must be at least 1")
            _require(len(preprocessing.text_keys) in (1, 2), "text", "text_keys names one text or a pair of texts")
        case AudioPreprocessing():
            _require(preprocessing.sample_rate >= 1, "audio", "sample_rate must be at least 1")
            _require(preprocessing.num_samples >= 1, "audio", "num_samples must be at least 1")
            _check_normalisation("audio", 1.0, (preprocessing.mean,), (preprocessing.std,))
        case ArrayPreprocessing():
            _check_normalisation("array", preprocessing.rescale, preprocessing.mean, preprocessing.std)


def _check_image(p: ImagePreprocessing) -> None:
    _require(p.height >= 1 and p.width >= 1, "image", "height and width must be at least 1")
    _require(p.channels in (1, 3), "image", "channels must be 1 (grey) or 3 (RGB)")
    _require(p.crop_fraction is None or 0 < p.crop_fraction <= 1, "image", "crop_fraction must be in (0, 1]")
    _require(
        p.resize_shorter is None or p.resize_shorter >= max(p.height, p.width),
        "image",
        f"resize_shorter must be at least the {p.height} x {p.width} that is cut out of it",
    )
    _check_normalisation("image", p.rescale, p.mean, p.std)
    for key, values in (("mean", p.mean), ("std", p.std)):
        _require(len(values) in (1, p.channels), "image", f"{key} needs 1 or {p.channels} values, it has {len(values)}")


def _check_normalisation(kind: str, rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    _require(bool(mean and std), kind, "mean and std need at least one value")
    _require(all(map(math.isfinite, (rescale, *mean, *std))), kind, "rescale, mean and std must be finite")
    _require(rescale != 0 and 0 not in std, kind, "rescale and std divide, so they can't be 0")
    _require(1 in (len(mean), len(std)) or len(mean) == len(std), kind, f"mean has {len(mean)} values, std {len(std)}")


def _require(holds: bool, kind: str, problem: str) -> None:
    if not holds:
        raise ConfigError(problem, where=_place(kind))


def _place(kind: str) -> str:
    return f"preprocessing of kind {kind!r}"


def _nearest(word: str, valid: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(valid)}"


def _coerce(value: object, hint: object, where: str) -> object:
    """`value` as the annotated type: whole numbers do for floats, one item does for a tuple, nothing else bends."""
    if get_origin(hint) is UnionType:
        options = get_args(hint)
        if value is None and NoneType in options:
            return None
        (hint,) = (option for option in options if option is not NoneType)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices or isinstance(value, bool):
            raise ConfigError(f"is {value!r}", where=where, fix=f"use one of {', '.join(map(str, choices))}")
        return value
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(item, get_args(hint)[0], where) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        raise ConfigError(f"is {value!r}, not {expected[getattr(hint, '__name__', '')]}", where=where)
    return value
