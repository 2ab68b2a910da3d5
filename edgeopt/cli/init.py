"""`edgeopt init`: a commented edgeopt.toml to start from."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from edgeopt.config_keys import template
from edgeopt.errors import UsageError


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("edgeopt.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented edgeopt.toml: every key, explained, ready to be switched on.

    Example: edgeopt init
    """
    if os.path.lexists(file):
        if file.is_symlink() or not file.is_file():
            raise UsageError("is there already, and is no plain file", where=str(file), fix="choose another name")
        if not force:
            raise UsageError("is there already", where=str(file), fix="add --force to replace it")
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(template(), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise UsageError(f"can't be written: {error.strerror}", where=str(file)) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    typer.echo(f"Wrote {file}. Set model, target and calibration in it, then run: edgeopt export")
