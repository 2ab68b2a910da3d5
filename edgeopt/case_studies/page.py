"""One page as Markdown and as HTML that needs nothing beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd}
th{border-bottom:2px solid #999;text-align:left}.right{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f5f5f5;padding:.8rem;overflow-x:auto}svg{max-width:100%;height:auto}"""


@dataclass(frozen=True, slots=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """`left`: how many columns, from the left, hold words; the others hold figures."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """`file`: what Markdown calls it; HTML holds `svg` itself."""

    file: str
    alt: str
    svg: str


@dataclass(frozen=True, slots=True)
class Code:
    text: str


Block = Heading | Paragraph | Table | Picture | Code


def markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def html_page(title: str, blocks: Iterable[Block]) -> str:
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table(columns, rows, left):
            rule = ["---"] * left + ["--:"] * (len(columns) - left)
            return "\n".join(_row(row) for row in (columns, rule, *rows))
        case Picture(file, alt, _):
            return f"![{alt}]({file})"
        case Code(text):
            return f"```\n{text.rstrip()}\n```"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in cells)} |"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(columns, rows, left):
            head = "".join(_cell("th", cell, index >= left) for index, cell in enumerate(columns))
            body = "\n".join(
                "<tr>" + "".join(_cell("td", cell, index >= left) for index, cell in enumerate(row)) + "</tr>"
                for row in rows
            )
            return f"<table><tr>{head}</tr>\n{body}</table>"
        case Picture(_, _, svg):
            # What stands before the element is for files of their own.
            return re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL)
        case Code(text):
            return f"<pre>{html.escape(text.rstrip())}</pre>"


def _cell(kind: str, text: str, is_figure: bool) -> str:
    return f"<{kind}{' class=right' if is_figure else ''}>{html.escape(text)}</{kind}>"
