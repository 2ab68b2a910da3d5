"""`edgeopt export`: from a trained model to proven bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from edgeopt.cli.console import JsonFlag, bundle_document, missed_checks, print_json, stdout, work
from edgeopt.cli.flags import ConfigFlag, Given, with_flags
from edgeopt.config_keys import KEYS
from edgeopt.errors import GateError, UsageError

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.types import Bundle


@with_flags(KEYS)
def export(
    context: typer.Context,
    given: Given,
    config: ConfigFlag = None,
    json: JsonFlag = False,
) -> None:
    """Export, quantize and prove a model for one or several targets.

    Example: edgeopt export net.py:build --weights net.safetensors --target android-int8 --calibration pictures/train

    Every option is a key of the same name in edgeopt.toml too ('edgeopt init' writes one); options win.

    Gates are limits on the exported file: 0.005 and 0.5% are the same, and "off" drops the target's own limit. When
    one is missed the bundle is written all the same, marked failed, and the exit code is 1.
    """
    from edgeopt.config import load_config

    settings = load_config(config, given)
    if settings.model is None and settings.example is None:
        raise UsageError(
            "nothing to export",
            fix="give a model (edgeopt export net.py:build), a built-in example (edgeopt export --example digits), "
            "or a configuration with a model (edgeopt init writes edgeopt.toml)",
        )
    build_and_show(context, settings, json)


def build_and_show(context: typer.Context, settings: RunConfig, json: bool) -> None:
    """Run the pipeline and print what came of it. Raises GateError where a bundle missed a limit."""
    with work(context) as progress:
        progress.step("Starting")
        from edgeopt.pipeline import export as run

        bundles = run(settings, progress)
    if json:
        print_json({"bundles": [bundle_document(bundle.path, bundle.report) for bundle in bundles]})
    else:
        _show(bundles)
    _refuse_failed(bundles)


def _show(bundles: tuple[Bundle, ...]) -> None:
    from edgeopt.report import render, render_summary

    console = stdout()
    if len(bundles) > 1:
        render_summary(tuple(bundle.report for bundle in bundles), console)
    for bundle in bundles:
        if len(bundles) == 1 or not bundle.passed:
            render(bundle.report, console)
    for bundle in bundles:
        console.print(f"Bundle: {bundle.path}" + ("" if bundle.passed else "  (failed)"), soft_wrap=True)
    first = bundles[0]
    if all(bundle.passed for bundle in bundles):
        console.print(f"Next:   edgeopt inspect {first.path}", soft_wrap=True)


def _refuse_failed(bundles: tuple[Bundle, ...]) -> None:
    failed = [bundle for bundle in bundles if not bundle.passed]
    if failed:
        missed = "; ".join(f"{bundle.path}: missed {missed_checks(bundle.report)}" for bundle in failed)
        raise GateError(missed, fix="what was made is written, and marked failed")
