"""`edgeopt coverage`: what of a model runs where."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeopt.cli.console import JsonFlag, print_json, stdout, work
from edgeopt.cli.flags import ConfigFlag, Given, keys, with_flags
from edgeopt.errors import UsageError

#: The keys of edgeopt.toml that matter here; the others are taken from the file, or left alone.
_FLAGS = (
    "model", "example", "weights", "input", "task", "target", "device", "calibration", "num_calibration_samples",
    "preprocessing", "seed", "estimator", "percentile", "keep_float", "int16_activations",
)  # fmt: skip


@with_flags(keys(*_FLAGS))
def coverage(
    context: typer.Context,
    given: Given,
    config: ConfigFlag = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row per layer instead of one per kind.")] = False,
    rewrites: Annotated[
        bool,
        typer.Option("--apply-rewrites", help="Apply the suggested rewrites, prove each, and look again."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show which operators run on which accelerator, what falls back to the CPU and why, and what would help.

    Without --target: one target per accelerator and CPU runtime. MODEL may also be an exported .tflite, .onnx or .pte
    file.

    Example: edgeopt coverage net.py:build --target edgetpu-int8 --target ethosu55-int8
    """
    from edgeopt.config import load_config

    settings = load_config(config, given)
    if settings.model is None and settings.example is None:
        raise UsageError(
            "nothing to look at",
            fix="give a model (edgeopt coverage net.py:build), an exported file, or a built-in --example digits",
        )
    with work(context) as progress:
        progress.step("Starting")
        from edgeopt.coverage import coverage as cover

        report = cover(settings, progress, rewrite=rewrites)
    from edgeopt.report.coverage import coverage_document, render_coverage

    if json:
        print_json(coverage_document(report))
    else:
        render_coverage(report, stdout(), by_layer=layers)
