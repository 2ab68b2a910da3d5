"""Flags from the tables of keys: each command shows some keys of edgeopt.toml, and none declares one again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeopt.config_keys import KEYS, Key
from edgeopt.config_values import a_path, a_recipe, a_switch, a_table, a_weights_file, names_or_paths, some_texts

#: Name of a key -> what the command line gave: a text, a path, a list of texts, a switch; None where nothing.
Given = Mapping[str, object]
ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Configuration. Default: ./edgeopt.toml.", show_default=False),
]

_LISTS = (some_texts, names_or_paths, a_recipe)
_PATHS = (a_path, a_table, a_weights_file)
BY_NAME: dict[str, Key] = {key.name: key for key in KEYS}


def keys(*names: str) -> tuple[Key, ...]:
    return tuple(BY_NAME[name] for name in names)


def with_flags(shown: Iterable[Key], lists: Iterable[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each key, and the key "model" as its argument.

    The function is called with its own parameters, which it declares as Typer has it, and with `given`, the values of
    the keys under their names. Defaults stand in a key's help, since "not given" differs from a default.

    Args:
        lists: names of keys that may be repeated, beside those whose kind of value says so.
    """
    options = [_parameter(key, key.parse in _LISTS or key.name in lists) for key in shown]
    names = [option.name for option in options]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        kept = [parameter for name, parameter in own.parameters.items() if name != "given"]
        positional = [parameter for parameter in kept if parameter.default is parameter.empty]
        rest = [parameter for parameter in kept if parameter.default is not parameter.empty]

        def command(**values: object) -> None:
            given = {name: values.pop(name) for name in names}
            function(**values, given=given)

        parameters = [*positional, *options, *rest]
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(key: Key, is_list: bool) -> inspect.Parameter:
    kind: Any = str
    if is_list:
        kind = list[str]
    elif key.parse in _PATHS:
        kind = Path
    elif key.parse is a_switch:
        kind = bool
    shown: Any
    if key.name == "model":
        shown = typer.Argument(metavar=key.metavar, help=key.help, show_default=False)
    else:
        spelling = f"--{key.spelling}/--no-{key.spelling}" if kind is bool else f"--{key.spelling}"
        shown = typer.Option(
            spelling, help=key.help, rich_help_panel=key.group, metavar=key.metavar or None, show_default=False
        )
    kind_of = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(key.name, kind_of, default=None, annotation=Annotated[kind | None, shown])
