"""One parser per kind of value in edgeopt.toml and on the command line.

Each takes what TOML or a flag gave and the place where it stands, and raises ConfigError naming that place.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from edgeopt.errors import ConfigError

#: No limit that anybody means is above this; keeps MB in bytes an integer.
LARGEST = 1e12
#: What a recipe may consist of: passes of `edgeopt.compression`, in the order in which they run.
PASS_NAMES = (
    "fold-batch-norm", "equalize", "absorb-high-bias", "smooth", "clip-outliers", "round-adaptively", "correct-bias",
)  # fmt: skip
_PATH_SUFFIXES = frozenset(
    {".py", ".pt2", ".onnx", ".keras", ".h5", ".npz", ".npy", ".jsonl", ".gz", ".csv", ".txt", ".toml", ".json"}
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: how to call it in a message, and the folder that its relative paths start from.

    Attributes:
        items: how to call each entry of a list of tables, where that is known.
    """

    where: str
    base: Path
    items: tuple[str, ...] = ()

    def item(self, index: int) -> Place:
        """Of one entry of a list."""
        where = self.items[index] if index < len(self.items) else f"{self.where} {index + 1}"
        return Place(where, self.base)

    def error(self, problem: str, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, where=self.where, fix=fix)


Parser = Callable[[object, Place], object]


def a_text(value: object, place: Place) -> str:
    if not isinstance(value, str) or not value.strip():
        raise place.error(f"{value!r} is not a text")
    return value


def a_slug(value: object, place: Place) -> str:
    text = a_text(value, place)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise place.error(f"{text!r} can't name a folder", "use letters, digits, '.', '_' and '-'")
    return text


def some_texts(value: object, place: Place) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise place.error(f"{value!r} is neither a text nor a list of texts")
    return tuple(a_text(item, place) for item in items)


def a_path(value: object, place: Place) -> Path:
    return place.base / (value if isinstance(value, Path) else a_text(value, place))


def a_weights_file(value: object, place: Place) -> Path:
    """Where weights will be written: refused now rather than after hours of training."""
    path = a_path(value, place)
    if path.suffix != ".safetensors" or path.is_dir():
        raise place.error(f"{str(path)!r} is no .safetensors file", "give a name that ends in .safetensors")
    return path


def a_source(value: object, place: Place) -> str:
    """A model or data set: as `a_name_or_path`, and a bare word is a path too when it is there ("pictures")."""
    text = str(value) if isinstance(value, Path) else a_text(value, place)
    if text.startswith("hf:"):
        folder = place.base / text.removeprefix("hf:")
        return f"hf:{folder}" if folder.is_dir() else text
    return str(place.base / text) if (place.base / text).exists() else a_name_or_path(text, place)


def a_name_or_path(value: object, place: Place) -> str:
    """A name, or a path by its looks ("net.py:build", "targets/mine.toml"), made relative to where it was written."""
    text = str(value) if isinstance(value, Path) else a_text(value, place)
    head, separator, rest = text.partition(":")
    if "/" in head or Path(head).suffix in _PATH_SUFFIXES:
        return f"{place.base / head}{separator}{rest}"
    return text


def names_or_paths(value: object, place: Place) -> tuple[str, ...]:
    return tuple(a_name_or_path(text, place) for text in some_texts(value, place))


def a_number(value: object, place: Place) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or number != number or abs(number) == float("inf"):
        raise place.error(f"{value!r} is not a number")
    return number


def a_positive(value: object, place: Place) -> float:
    number = a_number(value, place)
    if number <= 0:
        raise place.error(f"{value!r} is not above 0")
    if number > LARGEST:
        raise place.error(f"{value!r} is above {LARGEST:g}")
    return number


def a_percentile(value: object, place: Place) -> float:
    number = a_number(value, place)
    if not 50 < number <= 100:
        raise place.error(f"{value!r} is not a percentile", "give one above 50 and up to 100, such as 99.99")
    return number


def between(low: float, high: float, fix: str | None = None) -> Callable[[object, Place], float]:
    """A number, which may be written as a percentage ("0.5%"). `fix` says how to write one."""

    def parse(value: object, place: Place) -> float:
        is_percentage = isinstance(value, str) and value.strip().endswith("%")
        number = a_number(str(value).strip()[:-1], place) / 100 if is_percentage else a_number(value, place)
        if not low <= number <= high:
            raise place.error(f"{value!r} is not between {low:g} and {high:g}", fix)
        return number

    return parse


a_fraction = between(0.0, 1.0, 'write a fraction (0.005) or a percentage ("0.5%")')


def an_integer(minimum: int, maximum: int = 10**18) -> Parser:
    def parse(value: object, place: Place) -> int:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"-?\d{1,30}", value) else value
        if not isinstance(number, int) or isinstance(number, bool) or number < minimum:
            raise place.error(f"{value!r} is not a whole number of at least {minimum}")
        if number > maximum:
            raise place.error(f"{value!r} is more than {maximum}")
        return number

    return parse


def one_of(options: tuple[str, ...]) -> Parser:
    def parse(value: object, place: Place) -> str:
        if value not in options:
            raise place.error(
                f"{value!r} is not known", f"{nearest(str(value), options)}give one of {', '.join(options)}"
            )
        return str(value)

    return parse


def a_recipe(value: object, place: Place) -> tuple[str, ...]:
    """`auto` and `none` stand alone; passes are put in the order in which they make sense."""
    names = tuple(part.strip() for text in some_texts(value, place) for part in text.split(","))
    for name in names:
        one_of(("auto", "none", *PASS_NAMES))(name, place)
    if len(names) > 1 and {"auto", "none"} & {*names}:
        raise place.error("auto and none stand alone", "give auto, none, or names of passes")
    return tuple(sorted(dict.fromkeys(names), key=("auto", "none", *PASS_NAMES).index))


def a_switch(value: object, place: Place) -> bool:
    if not isinstance(value, bool):
        raise place.error(f"{value!r} is neither true nor false")
    return value


def a_table(value: object, place: Place) -> Mapping[str, object]:
    if isinstance(value, str | Path):
        path = place.base / value
        document = read_toml(path)
        return a_table(document.get("preprocessing", document), Place(str(path), path.parent))
    if not isinstance(value, Mapping):
        raise place.error(f"{value!r} is not a table", "write it as [preprocessing]")
    table = dict(value)
    if "tokenizer" in table:
        table["tokenizer"] = a_source(table["tokenizer"], place)
    return table


def nearest(word: str, options: Iterable[str]) -> str:
    matches = get_close_matches(word, list(options), n=1)
    return f"did you mean {matches[0]!r}? " if matches else ""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=str(path), fix="'edgeopt init' writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"can't be read: {reason}", where=str(path)) from error


def read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = re.search(r" \(at line (\d+), column \d+\)$", message)
        where = f"{path}:{at[1]}" if at else str(path)
        raise ConfigError(f"is not TOML: {message[: at.start()] if at else message}", where=where) from error
