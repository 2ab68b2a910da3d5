"""`edgeopt validate`: prove a bundle again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeopt.cli.console import JsonFlag, bundle_document, missed_checks, print_json, stdout, work
from edgeopt.config_keys import MOST_THREADS
from edgeopt.errors import GateError


def validate(
    context: typer.Context,
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="Directory that 'edgeopt export' wrote, or its .zip.")
    ],
    evaluation: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Inputs to prove it on, as for 'edgeopt export'. Default: the bundle's golden vectors.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_THREADS, help="Threads when timing.")] = 1,
    verify_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="phone:NAME",
            help="Run it on an emulated Arm core too, and count instructions. Repeatable.",
            show_default=False,
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Verify every hash of a bundle and run every check again, on this machine.

    Example: edgeopt validate dist/digits-android-int8

    The exit code is 1 when a gate is missed, 2 when a file is not the one that the manifest describes.
    """
    with work(context) as progress:
        progress.step("Verifying the bundle")
        from edgeopt.pipeline import validate as run

        report = run(
            bundle, evaluation=evaluation, threads=threads, verify_on=tuple(verify_on or ()), progress=progress
        )
    if json:
        print_json(bundle_document(bundle, report))
    else:
        from edgeopt.report import render

        render(report, stdout())
    if report.status == "failed":
        raise GateError(f"missed {missed_checks(report)}", where=str(bundle))
