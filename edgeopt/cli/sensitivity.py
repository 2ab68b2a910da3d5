"""`edgeopt sensitivity`: which layers suffer from quantization."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from edgeopt.cli.console import JsonFlag, print_json, stdout, work
from edgeopt.config_keys import KEYS, Key
from edgeopt.errors import UsageError

_KEYS: dict[str, Key] = {key.name: key for key in KEYS}
#: The keys of edgeopt.toml that matter here; the others are taken from the file, or left alone.
_FLAGS = (
    "model", "example", "weights", "input", "task", "target", "calibration", "num_calibration_samples",
    "preprocessing", "metric", "seed", "estimator", "percentile", "keep_float", "threads",
)  # fmt: skip


def _flag(name: str) -> Any:
    key = _KEYS[name]
    return typer.Option(
        f"--{key.spelling}", help=key.help, rich_help_panel=key.group, metavar=key.metavar or None, show_default=False
    )


def sensitivity(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=_KEYS["model"].help, show_default=False)] = None,
    example: Annotated[str | None, _flag("example")] = None,
    weights: Annotated[Path | None, _flag("weights")] = None,
    input: Annotated[list[str] | None, _flag("input")] = None,  # noqa: A002  (the flag's name)
    task: Annotated[str | None, _flag("task")] = None,
    target: Annotated[list[str] | None, _flag("target")] = None,
    calibration: Annotated[str | None, _flag("calibration")] = None,
    num_calibration_samples: Annotated[str | None, _flag("num_calibration_samples")] = None,
    preprocessing: Annotated[Path | None, _flag("preprocessing")] = None,
    metric: Annotated[str | None, _flag("metric")] = None,
    seed: Annotated[str | None, _flag("seed")] = None,
    estimator: Annotated[str | None, _flag("estimator")] = None,
    percentile: Annotated[str | None, _flag("percentile")] = None,
    keep_float: Annotated[list[str] | None, _flag("keep_float")] = None,
    threads: Annotated[str | None, _flag("threads")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Configuration. Default: ./edgeopt.toml.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write all figures there.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw them there, as .svg or .png.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep finished trials there, and go on from them.", show_default=False),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Rank the layers of a model by the damage that quantizing them does, measured on exported files.

    Example: edgeopt sensitivity net.py:build --target android-int8 --calibration pictures/train --plot layers.svg
    """
    flags = locals()  # the parameters, under the names of the keys
    from edgeopt.config import load_config

    settings = load_config(config, {name: flags[name] for name in _FLAGS})
    if settings.model is None and settings.example is None:
        raise UsageError(
            "nothing to look at", fix="give a model (edgeopt sensitivity net.py:build), or a built-in --example digits"
        )
    _check_output(output)
    if plot is not None:
        from edgeopt.report.plot import check_plot_path

        check_plot_path(plot)
    with work(context) as progress:
        progress.step("Starting")
        from edgeopt.tuning.analysis import sensitivity_of

        result = sensitivity_of(settings, resume, progress)
    from edgeopt.json_data import dumps
    from edgeopt.report.sensitivity import render_sensitivity, save_sensitivity_plot, sensitivity_document

    document = sensitivity_document(result)
    if output is not None:
        _write(output, dumps(document))
    if plot is not None:
        save_sensitivity_plot(result, plot)
    if json:
        print_json(document)
    else:
        render_sensitivity(result, stdout())


def _check_output(path: Path | None) -> None:
    """Refuse now what would fail after minutes of work."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise UsageError("can't be written: no such folder, or a folder itself", where=f"--output {path}")


def _write(path: Path, text: str) -> None:
    """Beside, then renamed: nobody ever reads half a file, and a full disk leaves the old one."""
    path = path.resolve()
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            partial = Path(scratch) / path.name
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise UsageError(f"can't be written: {error.strerror}", where=f"--output {path}") from error
