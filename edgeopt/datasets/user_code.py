"""Finds and runs the user's Python: `file.py:factory` and `package.module:factory`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from edgeopt.errors import DataError, EdgeoptError, UsageError


def load_factory(spec: str) -> Callable[[], object]:
    """The function that `spec` names, made to fail with one line. Executes the user's module.

    Raises UsageError when the file, the module or the function isn't there, or the module fails.
    """
    location, _, name = spec.rpartition(":")
    with _importable(location):
        module = _import_file(Path(location), spec) if location.endswith(".py") else _import_module(location, spec)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        raise UsageError(f"has no function {name!r}", where=spec, fix=f"it has {', '.join(known) or 'none'}")

    def call() -> object:
        with _importable(location), failing_as("the factory failed", spec):
            return factory()

    return call


@contextmanager
def failing_as(what: str, where: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a DataError that says where in that code."""
    try:
        yield
    except EdgeoptError:
        raise
    except Exception as error:
        raise DataError(_line(what, error), where=where) from error


@contextmanager
def _importable(location: str) -> Iterator[None]:
    """The file's folder (for a package the working directory) on sys.path, as Python itself would have it."""
    folder = str(Path(location).resolve().parent if location.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    # Classes look their module up in sys.modules (dataclasses, pickle); the path keeps two files of one name apart.
    name = f"_edgeopt_dataset_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module_spec = spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError("is not a Python file", where=spec)
    module = module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(_line("running the file failed", error), where=spec) from error
    return module


def _import_module(location: str, spec: str) -> ModuleType:
    try:
        return import_module(location)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{location}.".startswith(f"{error.name}."):
            fix = "install it, or give the path of a .py file"
            raise UsageError(f"no module named {error.name!r}", where=spec, fix=fix) from error
        raise UsageError(_line("importing it failed", error), where=spec) from error
    except Exception as error:
        raise UsageError(_line("importing it failed", error), where=spec) from error


def _line(what: str, error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" at {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame is not None else ""
    return f"{what}{place}: {type(error).__name__}: {error}"
