"""`edgeopt export`: from a trained model to proven bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeopt.cli.console import JsonFlag, bundle_document, missed_checks, print_json, stdout, work
from edgeopt.config_keys import KEYS, Key
from edgeopt.errors import GateError, UsageError

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.types import Bundle

_KEYS: dict[str, Key] = {key.name: key for key in KEYS}


def _flag(name: str) -> Any:
    """The option of one key of edgeopt.toml; defaults stand in its help, since "not given" differs from a default."""
    key = _KEYS[name]
    return typer.Option(
        f"--{key.spelling}", help=key.help, rich_help_panel=key.group, metavar=key.metavar or None, show_default=False
    )


def export(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=_KEYS["model"].help, show_default=False)] = None,
    example: Annotated[str | None, _flag("example")] = None,
    weights: Annotated[Path | None, _flag("weights")] = None,
    name: Annotated[str | None, _flag("name")] = None,
    task: Annotated[str | None, _flag("task")] = None,
    input: Annotated[list[str] | None, _flag("input")] = None,  # noqa: A002  (the flag's name)
    labels: Annotated[Path | None, _flag("labels")] = None,
    target: Annotated[list[str] | None, _flag("target")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    calibration: Annotated[str | None, _flag("calibration")] = None,
    num_calibration_samples: Annotated[str | None, _flag("num_calibration_samples")] = None,
    evaluation: Annotated[str | None, _flag("evaluation")] = None,
    num_evaluation_samples: Annotated[str | None, _flag("num_evaluation_samples")] = None,
    preprocessing: Annotated[Path | None, _flag("preprocessing")] = None,
    metric: Annotated[str | None, _flag("metric")] = None,
    seed: Annotated[str | None, _flag("seed")] = None,
    estimator: Annotated[str | None, _flag("estimator")] = None,
    percentile: Annotated[str | None, _flag("percentile")] = None,
    keep_float: Annotated[list[str] | None, _flag("keep_float")] = None,
    int16_activations: Annotated[list[str] | None, _flag("int16_activations")] = None,
    recipe: Annotated[list[str] | None, _flag("recipe")] = None,
    io: Annotated[str | None, _flag("io")] = None,
    max_accuracy_drop: Annotated[str | None, _flag("max_accuracy_drop")] = None,
    min_agreement: Annotated[str | None, _flag("min_agreement")] = None,
    min_sqnr_db: Annotated[str | None, _flag("min_sqnr_db")] = None,
    min_speedup: Annotated[str | None, _flag("min_speedup")] = None,
    max_latency_ms: Annotated[str | None, _flag("max_latency_ms")] = None,
    max_size_mb: Annotated[str | None, _flag("max_size_mb")] = None,
    max_peak_memory_mb: Annotated[str | None, _flag("max_peak_memory_mb")] = None,
    threads: Annotated[str | None, _flag("threads")] = None,
    output_dir: Annotated[Path | None, _flag("output_dir")] = None,
    float_twin: Annotated[
        bool | None,
        typer.Option(
            "--float-twin/--no-float-twin",
            help=_KEYS["float_twin"].help,
            rich_help_panel=_KEYS["float_twin"].group,
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Configuration. Default: ./edgeopt.toml.", show_default=False),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Export, quantize and prove a model for one or several targets.

    Example: edgeopt export net.py:build --weights net.safetensors --target android-int8 --calibration pictures/train

    Every option is a key of the same name in edgeopt.toml too ('edgeopt init' writes one); options win.

    Gates are limits on the exported file: 0.005 and 0.5% are the same, and "off" drops the target's own limit. When
    one is missed the bundle is written all the same, marked failed, and the exit code is 1.
    """
    flags = locals()  # the parameters, under the names of the keys
    overrides = {key.name: flags[key.name] for key in KEYS}
    bundles = _run(context, config, overrides)
    if json:
        print_json({"bundles": [bundle_document(bundle.path, bundle.report) for bundle in bundles]})
    else:
        _show(bundles)
    _refuse_failed(bundles)


def _run(context: typer.Context, file: Path | None, overrides: dict[str, object]) -> tuple[Bundle, ...]:
    from edgeopt.config import load_config

    config = load_config(file, overrides)
    _require_model(config)
    with work(context) as progress:
        progress.step("Starting")
        from edgeopt.pipeline import export as run

        return run(config, progress)


def _require_model(config: RunConfig) -> None:
    if config.model is None and config.example is None:
        raise UsageError(
            "nothing to export",
            fix="give a model (edgeopt export net.py:build), a built-in example (edgeopt export --example digits), "
            "or a configuration with a model (edgeopt init writes edgeopt.toml)",
        )


def _show(bundles: tuple[Bundle, ...]) -> None:
    from edgeopt.report import render, render_summary

    console = stdout()
    if len(bundles) > 1:
        render_summary(tuple(bundle.report for bundle in bundles), console)
        console.print()
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
