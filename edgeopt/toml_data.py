"""Reading the package's TOML data (targets, device profiles) and users' own files of the same form."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from edgeopt.errors import ConfigError, UsageError

SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")

FormT = TypeVar("FormT", bound="Form")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Form(BaseModel):
    """A table of a TOML file: keys in kebab-case, unknown ones refused, no silent conversion between types."""

    model_config = ConfigDict(
        alias_generator=_kebab, extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def find_file(kind: str, name_or_path: str, directory: Path, where: str | None = None) -> Path:
    """The file of a built-in (`directory/<name>.toml`), or the user's own when it looks like a path.

    Raises UsageError on an unknown name, with the nearest ones, and on a path where no file is. `where` says which
    file and key asked for it.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UsageError(f"no such {kind} file", where=name_or_path)
        if not SLUG.fullmatch(path.stem):
            raise ConfigError(
                f"a {kind} is called what its file is called, and {path.stem!r} is not a name",
                where=name_or_path,
                fix="use lower-case letters, digits, '-', '_' and '.'",
            )
        return path
    names = sorted(path.stem for path in directory.glob("*.toml"))
    if name_or_path not in names:
        near = get_close_matches(name_or_path, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"see `edgeopt {kind}s`"
        raise UsageError(
            f"unknown {kind} {name_or_path!r}", where=where, fix=f"{hint} (a file of your own: give its path)"
        )
    return directory / f"{name_or_path}.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """Parse one file. Raises ConfigError naming it when it is unreadable, not UTF-8, or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML: {error}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", where=str(path)) from error
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", where=str(path)) from error


def parse(form: type[FormT], data: Mapping[str, Any], path: Path) -> FormT:
    """Check a file's content against its form. Raises ConfigError with file, key and what would be right."""
    try:
        return form.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A misspelt key also makes the right one missing; the misspelling is what helps.
        unknown = (detail for detail in details if detail["type"] == "extra_forbidden")
        raise _explain(form, next(unknown, details[0]), path) from error


def _explain(form: type[Form], detail: ErrorDetails, path: Path) -> ConfigError:
    where = f"{path}: {_key(detail['loc'])}"
    match detail["type"]:
        case "extra_forbidden":
            *parents, unknown = detail["loc"]
            known = [_kebab(name) for name in _subform(form, parents).model_fields]
            near = get_close_matches(str(unknown), known, n=1, cutoff=0.4)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            return ConfigError("unknown key", where=where, fix=fix)
        case "missing":
            return ConfigError("is missing", where=where, fix="add it")
        case "model_type" | "model_attributes_type":
            return ConfigError(f"is not a table, got {detail['input']!r}", where=where, fix="write it as [key]")
        case _:
            message = detail["msg"].removeprefix("Value error, ")
            return ConfigError(f"{message[0].lower()}{message[1:]}, got {detail['input']!r}", where=where)


def _key(location: Iterable[int | str]) -> str:
    """("cluster", 0, "max-mhz") -> "cluster[0].max-mhz"."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _subform(form: type[Form], location: Iterable[int | str]) -> type[Form]:
    """The form of the table at a location, looking through lists and optional tables."""
    for part in location:
        if isinstance(part, int):
            continue
        annotation = form.model_fields[str(part).replace("-", "_")].annotation
        form = next(c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, Form))
    return form


def read_with_bases(kind: str, path: Path, directory: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's keys laid over those of the file that it `extends`, by name (of a built-in, in `directory`) or path;
    tables are merged key by key. Raises ConfigError on a base that isn't one."""
    data = read_toml(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    where = f"{path}: extends"
    if not isinstance(base, str):
        raise ConfigError(f"must be a {kind}'s name or file, got {base!r}", where=where)
    if SLUG.fullmatch(base) is None or base.endswith(".toml"):
        base = str(path.parent / base)  # beside the file that says so, not beside whoever runs edgeopt
    base_path = find_file(kind, base, directory, where)
    chain = (*seen, path.resolve())
    if base_path.resolve() in chain:
        raise ConfigError(f"a {kind} can't extend itself", where=where)
    merged = read_with_bases(kind, base_path, directory, chain)
    for key, value in data.items():
        inherited = merged.get(key)
        if isinstance(value, dict) and isinstance(inherited, dict):
            value = {**inherited, **value}
        merged[key] = value
    return merged
