"""How a failure looks to a person: one line on standard error, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path

import typer

from edgeopt.cli.console import visible
from edgeopt.cli.noise import LoggedError
from edgeopt.errors import ConversionError, EdgeoptError, MissingError, UsageError

INTERRUPTED = 130
#: 128 + SIGTERM.
TERMINATED = 143
#: 128 + SIGPIPE, as a program without a handler would end.
BROKEN_PIPE = 141
INTERNAL = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
#: What a path given by the user can be, rather than what we do wrong.
_PATH_TROUBLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR
)  # fmt: skip


def report_failure(failure: Exception, debug: bool) -> int:
    """Print what went wrong; returns the exit code."""
    sys.stdout.flush()  # so that what was printed before stands before it, wherever the two streams go
    logged = failure if isinstance(failure, LoggedError) else None
    error = failure.__cause__ if logged is not None and isinstance(failure.__cause__, Exception) else failure
    if debug:
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        _print(f"error: {_usage_line(error)}")
        return error.exit_code
    known = error if isinstance(error, EdgeoptError) else _from_system(error)
    if known is not None:
        _print(f"error: {known.line()}")
        if logged is not None and isinstance(known, ConversionError):
            _print_log(logged)
        elif logged is not None:
            logged.log.unlink(missing_ok=True)
        return known.exit_code
    _print(f"internal error: {type(error).__name__}: {' '.join(str(error).split())}")
    if not debug:
        log = logged.log if logged is not None else _write_traceback(error)
        _print(f"  traceback and library output: {log}")
        _print("  this is a bug in edgeopt: please report it with that file")
    return INTERNAL


def report_interrupt() -> int:
    _print("error: interrupted")
    return INTERRUPTED


def report_termination() -> int:
    _print("error: terminated")
    return TERMINATED


def discard_output() -> int:
    """Nobody reads any more: let the interpreter's last flush go nowhere instead of failing."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return BROKEN_PIPE


def _usage_line(error: typer.TyperException) -> str:
    # Typer does not export the class that has these two; without them the line is merely less helpful.
    possibilities: list[str] = getattr(error, "possibilities", None) or []
    context = getattr(error, "ctx", None)
    message = error.message if possibilities else error.format_message()
    line = f"{message[:1].lower()}{message[1:].rstrip('.')}".replace(". Did you mean", "; did you mean")
    if possibilities:
        line += f"; did you mean {' or '.join(possibilities)}?"
    elif context is not None and not line.endswith("?"):
        line += f"; see '{context.command_path} --help'"
    return " ".join(line.split())


def _from_system(error: Exception) -> EdgeoptError | None:
    """The errors of the machine that no code below could foresee, as errors of ours; None for a bug."""
    if isinstance(error, MemoryError):
        return MissingError("out of memory", fix="free some, or take fewer samples or a smaller model")
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return _missing_package(error.name.partition(".")[0])
    if not isinstance(error, OSError):
        return None
    where = str(error.filename) if error.filename is not None else None
    if error.errno in _NO_ROOM:
        return MissingError("no space left on the disk", where=where, fix="free some, or move --output-dir or TMPDIR")
    if error.errno in _PATH_TROUBLE:
        return UsageError(os.strerror(error.errno).lower(), where=where)
    return None


def _missing_package(module: str) -> MissingError | None:
    from edgeopt.doctor import how_to_install

    if module == "edgeopt":
        return None
    return MissingError(f"the package {module!r} is not installed", fix=how_to_install(module))


def _print_log(logged: LoggedError) -> None:
    _print(f"  library output: {logged.log}" + (", which ends:" if logged.tail else ""))
    for line in logged.tail:
        _print(f"  | {line}")


def _write_traceback(error: Exception) -> Path:
    descriptor, name = tempfile.mkstemp(prefix="edgeopt-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        traceback.print_exception(error, file=file)
    return Path(name)


def _print(line: str) -> None:
    """To standard error, with control characters (from file names, from libraries) made visible."""
    print(visible(line), file=sys.stderr, flush=True)
