"""Which commands there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from edgeopt.cli.bundle import bundle
from edgeopt.cli.case_study import case_study
from edgeopt.cli.compare import compare
from edgeopt.cli.compress import distil, factorize, prune, qat, sparsify
from edgeopt.cli.console import Settings
from edgeopt.cli.coverage import coverage
from edgeopt.cli.debug import debug
from edgeopt.cli.device import device
from edgeopt.cli.devices import devices
from edgeopt.cli.doctor import doctor
from edgeopt.cli.emulator import emulator
from edgeopt.cli.export import export
from edgeopt.cli.generate import generate
from edgeopt.cli.init import init
from edgeopt.cli.inspect import inspect
from edgeopt.cli.llm import llm
from edgeopt.cli.predict import predict
from edgeopt.cli.sensitivity import sensitivity
from edgeopt.cli.targets import targets
from edgeopt.cli.validate import validate
from edgeopt.cli.verify import verify

_PANELS: dict[str, tuple[Callable[..., None] | typer.Typer, ...]] = {
    "Build and prove": (export, llm, generate, validate, compare, device),
    "Make smaller first": (prune, sparsify, factorize, distil, qat),
    "Look": (inspect, predict, coverage, sensitivity, debug, targets, devices),
    "Pass on": (bundle, verify),
    "Set up": (init, doctor, emulator, case_study),
}
HELP = """Turn a trained PyTorch model into a quantized file for phones and boards, and prove it on that file.

Try it: edgeopt export --example digits --target android-int8
"""


def build_app() -> typer.Typer:
    app = typer.Typer(help=HELP, context_settings={"help_option_names": ["--help", "-h"]}, rich_markup_mode="rich")
    app.callback(invoke_without_command=True)(_root)
    for panel, commands in _PANELS.items():
        for command in commands:
            if isinstance(command, typer.Typer):
                app.add_typer(command, rich_help_panel=panel)
                continue
            app.command(rich_help_panel=panel, help=_one_line_per_paragraph(command.__doc__ or ""))(command)
    return app


def _one_line_per_paragraph(text: str) -> str:
    """The help breaks lines where the source does; let the terminal's width decide instead."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"edgeopt {version('edgeopt')}")
        raise typer.Exit


def _root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and everything that libraries print.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version
    settings = context.ensure_object(Settings)
    settings.debug = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
