"""`edgeopt debug`: two files layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeopt.cli.console import JsonFlag, print_json, stdout, work
from edgeopt.config_keys import MOST_THREADS


def debug(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="A bundle, or a .tflite, .onnx or .pte file: the reference.")],
    b: Annotated[
        Path | None,
        typer.Argument(
            metavar="B",
            help="What to hold against it. Default: A's file against its float twin.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Inputs, as for 'edgeopt export --evaluation'. Default: what the bundles hold, else made-up inputs.",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(metavar="N", min=1, help="Run at most so many samples.")] = 32,
    threshold: Annotated[
        float, typer.Option(metavar="DB", help="A layer with a lower SQNR than this diverges.")
    ] = 10.0,
    max_drop: Annotated[
        float, typer.Option(metavar="DB", min=0.0, help="So does one that loses more than this against its inputs.")
    ] = 10.0,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_THREADS, help="Threads of each runtime.")] = 1,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw SQNR along the depth, as .svg or .png.", show_default=False),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Compare two exported models layer by layer and name the first layer that diverges.

    With one bundle: its quantized file against its float twin. With two files: B against A, each in its own runtime.

    Example: edgeopt debug dist/digits-android-int8
    """
    if plot is not None:
        from edgeopt.report.plot import check_plot_path

        check_plot_path(plot)
    with work(context) as progress:
        progress.step("Opening the files")
        from edgeopt.debugging import debug as run

        result = run(
            a,
            b,
            data=data,
            num_samples=num_samples,
            threshold_db=threshold,
            max_drop_db=max_drop,
            threads=threads,
            progress=progress,
        )
        if plot is not None:
            from edgeopt.report.debug import save_plot

            progress.step("Drawing")
            save_plot(result, plot)
    if json:
        print_json({"debug": result})
    else:
        from edgeopt.report.debug import render

        render(result, stdout())
