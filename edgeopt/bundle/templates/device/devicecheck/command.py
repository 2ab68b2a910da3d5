"""The command line of `device/check`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import report
from .check import Settings, check
from .errors import INTERRUPTED, CheckError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_BUNDLE = Path(__file__).resolve().parent.parent.parent
_MOST_THREADS = 256
_EPILOG = """exit codes: 0 all is well; 1 an output or a gate of the bundle failed; 2 wrong use, or the bundle is
damaged; 3 a device, a tool or a program is missing or was lost, or outputs could not be checked; 4 the model can't be
run there; 130 interrupted."""


def main(words: list[str] | None = None) -> int:
    """Returns the exit code; everything that goes wrong is one line on standard error."""
    arguments = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, _interrupt)
    settings = Settings(
        adb=arguments.adb,
        ssh=arguments.ssh,
        ssh_config=arguments.ssh_config,
        directory=arguments.directory,
        threads=arguments.threads,
        cpus=arguments.cpus,
        runs=arguments.runs,
        seconds=arguments.seconds,
        warmup=arguments.warmup,
        timeout=arguments.timeout,
        runner=arguments.runner,
        benchmark=arguments.benchmark,
    )
    output = arguments.output or _BUNDLE / report.NAME
    try:
        report.check_place(output)
        result = check(_BUNDLE, settings, lambda step: print(step, file=sys.stderr, flush=True))
        document = report.document(result)
        report.write(document, output)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: interrupted; the device was cleaned up", file=sys.stderr)
        return INTERRUPTED
    for line in report.lines(document, result):
        print(line)
    return report.exit_code(document)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="device/check",
        description="Run this bundle's model on a phone or board, and hold it against the golden vectors and gates.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--adb", metavar="SERIAL", help="Android device, as 'adb devices' lists it; default: the only one")
    add("--ssh", metavar="HOST", help="Linux board: user@host, ssh://user@host:port, or a name in ~/.ssh/config")
    add("--ssh-config", metavar="FILE", type=Path, help="instead of ~/.ssh/config")
    add("--directory", metavar="DIR", help="where on the device; default /data/local/tmp (adb), $TMPDIR or /tmp (ssh)")
    add("--runner", metavar="FILE", type=Path, help="edgeopt-runner built for the device; libraries beside it go along")
    add("--benchmark", metavar="FILE", type=Path, help="the runtime's own benchmark program, built for the device")
    add("--threads", metavar="N", type=_count(1, _MOST_THREADS), default=1, help="that the runtime uses; default 1")
    add("--cpus", metavar="LIST", default="big", help="big (default), little, all, or a list such as 4-7")
    add("--runs", metavar="N", type=_count(1, 100_000), help="timed runs; default: as many as fit into --seconds")
    add("--seconds", metavar="S", type=_count(1, 3600), default=5, help="how long to time; default 5")
    add("--warmup", metavar="N", type=_count(0, 10_000), default=5, help="runs before the timed ones; default 5")
    add("--timeout", metavar="S", type=_count(1, 86_400), default=120, help="for one program run; default 120")
    add("--output", metavar="FILE", type=Path, help=f"the report; default {report.NAME} in the bundle")
    return parser


def _count(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}")
        return value

    return number
