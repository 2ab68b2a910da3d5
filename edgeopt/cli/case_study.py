"""`edgeopt case-study`: whole studies on real data, from nothing to a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgeopt.cli.console import JsonFlag, print_json, stdout, table, work
from edgeopt.errors import GateError

if TYPE_CHECKING:
    from edgeopt.case_studies.expresstext import Result

case_study = typer.Typer(
    name="case-study", help="Studies on real data: a teacher, a recipe whole and in parts, a report."
)


@case_study.callback()
def _group() -> None:
    """Keeps the name of the study a word of the command, while there is only one."""


@case_study.command()
def expresstext(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with the data's files. Default: they are downloaded.", show_default=False
        ),
    ] = None,
    task: Annotated[
        Literal["translation", "summarization"], typer.Option(help="Multi30k, or Debian's package descriptions.")
    ] = "translation",
    scale: Annotated[
        Literal["smoke", "full"], typer.Option(help="smoke runs everything on next to nothing, in a minute.")
    ] = "full",
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A trained one, of Hugging Face. Default: it is trained.", show_default=False),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Everything goes there; a run that was stopped goes on from there.")
    ] = Path("expresstext"),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Entries to run: float, quantization, all ... Repeatable. Default: all."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Make a translator small and fast enough for a phone, and show what each step does to it.

    Trains a teacher, distils, prunes and quantizes it with the recipe of examples/expresstext, and proves the exported
    files. Exit code 1 where they are not 8x smaller, 4x faster and 99 % as good.

    Example: edgeopt case-study expresstext --scale smoke --output-dir try
    """
    with work(context) as progress:
        from edgeopt.case_studies.expresstext import Order, run

        order = Order(task=task, scale=scale, data=data, teacher=teacher, only=tuple(only or ()))
        result = run(order, output_dir, progress)
    if json:
        print_json(_document(result))
    else:
        _show(result)
    missed = [goal.name for goal in result.goals if goal.measured is not None and not goal.is_met]
    if scale == "full" and missed:
        raise GateError(f"missed: {', '.join(missed)}", where=str(result.page))


def _document(result: Result) -> dict[str, object]:
    return {"page": str(result.page), "html": str(result.html), "goals": result.goals, "entries": result.study.outcomes}


def _show(result: Result) -> None:
    from edgeopt.report.units import quantity

    console = stdout()
    rows = table("", "measured", "goal", right=("measured", "goal"))
    for goal in result.goals:
        rows.add_row(goal.name, quantity(goal.measured, goal.unit), quantity(goal.limit, goal.unit))
    console.print(rows)
    console.print(f"\n{result.page}\n{result.html}", soft_wrap=True)
