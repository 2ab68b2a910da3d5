"""The command line: parse, call, print."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from edgeopt.cli.console import Settings
from edgeopt.cli.failures import INTERRUPTED, discard_output, report_failure, report_interrupt, report_termination


class _TerminatedError(BaseException):
    """SIGTERM or SIGHUP, raised so that temporary files go away as they do on Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or what `edgeopt.errors` says."""
    try:
        with _cleaning_up_on_signals():
            code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return discard_output()
    except _TerminatedError:
        return report_termination()
    return code


def _run(arguments: Sequence[str]) -> int:
    from typer.main import get_command

    from edgeopt.cli.app import build_app

    settings = Settings()
    command = get_command(build_app())
    try:
        code = command.main(args=list(arguments), prog_name="edgeopt", standalone_mode=False, obj=settings)
    except KeyboardInterrupt:
        return report_interrupt()
    except SystemExit as stop:  # Typer's own way out when a pipe broke while it was printing
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        raise
    except Exception as error:  # the last line of defence: whatever it is, a person reads one line
        return report_failure(error, settings.debug)
    # Typer turns Ctrl-C inside a command into this code; commands themselves never return it.
    return report_interrupt() if code == INTERRUPTED else int(code or 0)


@contextmanager
def _cleaning_up_on_signals() -> Iterator[None]:
    """Unwind the stack on SIGTERM and SIGHUP instead of dying on the spot, except where somebody decided otherwise."""

    def unwind(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_IGN)  # `timeout` and shells send it twice; let the cleaning up finish
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
