"""What the commands share: where they print, and how figures look."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from edgeopt.progress import Progress
    from edgeopt.types import Report

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@dataclass
class Settings:
    """Global flags; the object of the Typer context."""

    debug: bool = False


def stdout() -> Console:
    """A console on standard output; it colours nothing by guessing, and shows control characters instead of obeying.

    Names of tensors, operators and labels come from files that anybody may have written.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Visible(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text, keep="\n"), segment.style)

    return Visible(highlight=False, emoji=False, markup=False)


def visible(text: str, keep: str = "") -> str:
    """The text with control characters, those in `keep` apart, as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def print_json(document: Mapping[str, object]) -> None:
    from edgeopt.json_data import dumps

    sys.stdout.write(dumps(document))


def bundle_document(path: Path, report: Report) -> dict[str, object]:
    """A bundle and its report, which is as report.json has it."""
    from hashlib import sha256

    from edgeopt.json_data import loads
    from edgeopt.report import to_json

    manifest = sha256((path / "manifest.json").read_bytes()).hexdigest()
    return {
        "path": str(path),
        "target": report.target,
        "status": report.status,
        "report": loads(to_json(report, manifest), "report"),
    }


def missed_checks(report: Report) -> str:
    """ "speedup, size_bytes": the checks that failed."""
    return ", ".join(check.name for check in report.checks if not check.passed)


def table(*columns: str, right: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Table:
    """An empty table in the house style: a rule below the head, no frame.

    Columns named in `fold` give way when the terminal is narrow, the others keep their width as long as they can.
    """
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        result.add_column(column, justify=justify, overflow="fold", no_wrap=bool(fold) and column not in fold)
    return result


def facts(rows: Mapping[str, str]) -> Table:
    """Names and values in two columns; empty values are left out."""
    from rich.table import Table

    result = Table.grid(padding=(0, 2))
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            result.add_row(name, value)
    return result


def size(num_bytes: int) -> str:
    """1536 -> "1.5 KiB"; as in the report."""
    from edgeopt.report.units import quantity

    return quantity(num_bytes, "bytes")


@contextmanager
def work(context: typer.Context) -> Iterator[Progress]:
    """Long work: progress on a terminal's standard error, library output in a log (not with --debug)."""
    from edgeopt.cli.noise import captured
    from edgeopt.cli.progress import shown_on

    if context.ensure_object(Settings).debug:
        with shown_on(sys.stderr) as progress:
            yield progress
    else:
        with captured() as streams, shown_on(streams.err) as progress:
            yield progress
