"""`edgeopt device`: bundles on real phones and boards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeopt.cli.console import JsonFlag, stdout, visible, work
from edgeopt.config_keys import MOST_THREADS
from edgeopt.errors import GateError, MissingError

device = typer.Typer(name="device", help="Check a bundle on a phone or board.", no_args_is_help=True)


@device.callback()
def _group() -> None:
    """Keeps `run` a command of its own."""


@device.command()
def run(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that 'edgeopt export' wrote.")],
    adb: Annotated[
        str | None,
        typer.Option(metavar="SERIAL", help="Android device, as 'adb devices' lists it. Default: the only one."),
    ] = None,
    ssh: Annotated[
        str | None, typer.Option(metavar="HOST", help="Linux board: user@host, or a name in ~/.ssh/config.")
    ] = None,
    ssh_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of ~/.ssh/config.", show_default=False)
    ] = None,
    directory: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where on the device. Default: /data/local/tmp; over ssh $TMPDIR or /tmp."),
    ] = None,
    runner: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="edgeopt-runner built for the device; libraries beside it go along."),
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The runtime's own benchmark program, built for the device.")
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_THREADS)] = 1,
    cpus: Annotated[str, typer.Option(metavar="LIST", help="big, little, all, or a list such as 4-7.")] = "big",
    runs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Timed runs. Default: as many as fit into --seconds.")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=1, max=3600, help="How long to time.")] = 5.0,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Runs before the timed ones.")] = 5,
    timeout: Annotated[float, typer.Option(metavar="S", min=1, help="For one program run on the device.")] = 120.0,
    json: JsonFlag = False,
) -> None:
    """Run a bundle's model on a phone or board: outputs against its golden vectors, latency, memory, gates.

    Example: edgeopt device run dist/digits-android-int8 --adb 1A2B3C4D

    Writes device_report.json into the bundle and adds the figures to its report. The exit code is 1 when an output or a
    gate fails, 3 when the device or a program for it is missing or was lost, 4 when the model can't be run there.
    """
    with work(context) as progress:
        progress.step("Verifying the bundle")
        from edgeopt.bundle.templates.device.devicecheck.check import Settings
        from edgeopt.on_device import run as check

        settings = Settings(
            adb=adb,
            ssh=ssh,
            ssh_config=ssh_config,
            directory=directory,
            threads=threads,
            cpus=cpus,
            runs=runs,
            seconds=seconds,
            warmup=warmup,
            timeout=timeout,
            runner=runner,
            benchmark=benchmark,
        )
        found = check(bundle, settings, progress=progress)
    if json:
        sys.stdout.write(found.device_report)
    else:
        for line in found.lines:
            stdout().print(visible(line), soft_wrap=True)
    if found.was_signed:
        print("note: the bundle's signature no longer held and was removed; sign it again", file=sys.stderr)
    if found.exit_code == 1:
        raise GateError("the device did not pass", where=str(bundle))
    if found.exit_code:
        raise MissingError("its outputs could not be checked on the device", where=str(bundle), fix="give --runner")
