"""`edgeopt sensitivity`: which layers suffer from quantization."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from edgeopt.cli.console import JsonFlag, print_json, stdout, work
from edgeopt.cli.flags import ConfigFlag, Given, keys, with_flags
from edgeopt.errors import UsageError

#: The keys of edgeopt.toml that matter here; the others are taken from the file, or left alone.
_FLAGS = (
    "model", "example", "weights", "input", "task", "target", "calibration", "num_calibration_samples",
    "preprocessing", "metric", "seed", "estimator", "percentile", "keep_float", "threads",
)  # fmt: skip


@with_flags(keys(*_FLAGS))
def sensitivity(
    context: typer.Context,
    given: Given,
    config: ConfigFlag = None,
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
    from edgeopt.config import load_config

    settings = load_config(config, given)
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
