"""Runs the user's own Python: `file.py:name` and `package.module:name`, for models, data sets and metrics alike."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, TracebackType

from edgeopt.errors import EdgeoptError, UsageError

#: Folders whose code is not what the user has to mend: edgeopt itself and the standard library.
_NOT_THE_USERS = (f"{Path(__file__).parent}{os.sep}", f"{Path(os.__file__).parent}{os.sep}")


@dataclass(frozen=True, slots=True)
class UserObject:
    """What a spec names. `where` is how messages call it; `location` is the part before the last ":"."""

    where: str
    location: str
    module: ModuleType
    value: object

    @contextmanager
    def running(self, what: str, error_type: type[UsageError] = UsageError) -> Iterator[None]:
        """Run a block that executes the user's code: its folder importable, its failures one line.

        Raises `error_type` with `what`, the place in the user's code and the exception, also on `sys.exit()`.
        """
        with _importable(self.location), _explained(what, self.where, error_type):
            yield

    def call(self, what: str, error_type: type[UsageError] = UsageError) -> object:
        """Call it without arguments. Raises UsageError when it can't be called so, `error_type` when it fails."""
        if not callable(self.value):
            raise UsageError(f"is a {type(self.value).__name__}, not a function", where=self.where)
        if missing := _required(self.value):
            raise UsageError(
                f"takes the arguments {', '.join(missing)}, and is called without any",
                where=self.where,
                fix="give them default values",
            )
        with self.running(what, error_type):
            return self.value()


def load_user_object(spec: str, kind: str, where: str | None = None) -> UserObject:
    """Import the module and look the name up (which may be dotted, `Net.small`).

    Args:
        spec: `file.py:name`, or `package.module:name` as found from the working directory or installed.
        kind: what is looked for, for messages: "factory", "metric".
        where: how messages call it; the spec itself by default.

    Raises UsageError when the file, the module or the name isn't there, or the module fails.
    """
    where = where or spec
    location, _, name = spec.rpartition(":")
    with _importable(location):
        module = _import_file(Path(location), where) if location.endswith(".py") else _import_module(location, where)
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise _absent(name, kind, module, where)
        value = getattr(value, part)
    return UserObject(where, location, module, value)


def _absent(name: str, kind: str, module: ModuleType, where: str) -> UsageError:
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    near = get_close_matches(name, own, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(own) or 'no functions or classes'}"
    return UsageError(f"has no {kind} {name!r}", where=where, fix=fix)


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


def _import_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise UsageError("no such file", where=str(path))
    # Classes look their module up in sys.modules (dataclasses, pickle); the path keeps two files of one name apart.
    name = f"_edgeopt_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    module_spec = spec_from_file_location(name, path)
    assert module_spec is not None, "its name ends in .py"
    assert module_spec.loader is not None
    module = module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        with _explained("running the file failed", where, UsageError):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(location: str, where: str) -> ModuleType:
    with _explained("importing it failed", where, UsageError):
        try:
            return import_module(location)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{location}.".startswith(f"{error.name}."):
                raise
            fix = "install it, or give the path of a .py file"
            raise UsageError(f"no module named {error.name!r}", where=where, fix=fix) from error


@contextmanager
def _explained(what: str, where: str, error_type: type[UsageError]) -> Iterator[None]:
    try:
        yield
    except (EdgeoptError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and scripts end in sys.exit()
        text = f"{what}{_place(error)}: {type(error).__name__}: {_message(error)}"
        raise error_type(text.rstrip(": "), where=where) from error


def _message(error: Exception | SystemExit) -> str:
    # A SyntaxError's own text repeats the file and line.
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _place(error: BaseException) -> str:
    """ " at net.py:7": the innermost line of the user's own, not of ours or of a library that it called."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" at {Path(error.filename).name}:{error.lineno}"
    place = ""
    for file, line in _frames(error.__traceback__):
        if not file.startswith(("<frozen", *_NOT_THE_USERS)) and "/site-packages/" not in file:
            place = f" at {Path(file).name}:{line}"
    return place


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, int]]:
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def _required(function: object) -> list[str]:
    """Names of the parameters that a call without arguments would lack."""
    if not callable(function):
        return []
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # some built-in functions don't tell
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
