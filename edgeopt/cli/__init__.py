"""The command line: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edgeopt.cli.console import Settings
from edgeopt.cli.failures import INTERRUPTED, discard_output, report_failure, report_interrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or what `edgeopt.errors` says."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return discard_output()
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
