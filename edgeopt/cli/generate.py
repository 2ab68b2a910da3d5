"""`edgeopt generate`: write with the files of a bundle."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, print_json, visible, work
from edgeopt.config_keys import MOST_THREADS

if TYPE_CHECKING:
    from edgeopt.bundle.generation_reader import GenerationBundle
    from edgeopt.generation.tokens import Tokens
    from edgeopt.generation.writer import Written
    from edgeopt.progress import Progress


def generate(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Directory that 'edgeopt export' wrote.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="What to write from. Default: lines of standard input."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write from each line of this file.", show_default=False)
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Sequences followed at once. Default: the bundle's.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens of a text at most. Default: what fits.", show_default=False),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, max=MOST_THREADS, help="Threads of the runtime.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Write with a bundle's files in their runtime, on this machine: a translation, a summary, what follows a prompt.

    Example: edgeopt generate dist/translator-android-int8 "A dog sleeps on the sofa."

    Texts go to standard output, one a line; how long the first token and each of the others took goes to standard
    error. Blank lines stay blank.
    """
    with work(context) as progress:
        sources = _sources(texts or [], file)
        progress.step("Verifying the bundle")
        lines, fixed = _write(bundle, sources, beams, max_new_tokens, threads, progress)
    speed = _speed(lines)
    if json:
        shown = [asdict(line) for line in lines]
        print_json({"bundle": str(bundle), "provenance": "measured-host", **fixed, **speed, "texts": shown})
        return
    for line in lines:
        # A text of several lines would look like several texts.
        sys.stdout.write(visible(" ".join(line.text.split())) + "\n")
    sys.stdout.flush()
    if speed:
        from edgeopt.report.units import three_digits

        told = ", ".join(form.format(three_digits(speed[name])) for name, form in _SPEEDS.items() if name in speed)
        count = "1 thread" if threads == 1 else f"{threads} threads"
        print(f"{told} (medians on this host, {count})", file=sys.stderr)


@dataclass(frozen=True)
class _Line:
    """One source and what was written from it; without figures where it was blank."""

    source: str
    text: str = ""
    tokens: int = 0
    ended: bool = True
    time_to_first_token_ms: float | None = None
    tokens_per_second: float | None = None


_SPEEDS = {"time_to_first_token_ms": "first token after {} ms", "tokens_per_second": "then {} tokens/s"}


def _sources(texts: list[str], file: Path | None) -> list[str]:
    from edgeopt.errors import UsageError

    if texts and file is not None:
        raise UsageError("texts and --file are both given", where="generate", fix="drop one of them")
    if texts:
        return texts
    if file is None and sys.stdin.isatty():
        raise UsageError("there is nothing to write from", where="generate", fix="give a text, or --file FILE")
    try:
        text = file.read_text(encoding="utf-8") if file is not None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8 text", where=str(file or "standard input")) from error
    except FileNotFoundError as error:
        raise UsageError("no such file", where=str(file)) from error
    # Not splitlines(): that also ends lines within texts, at a form feed or U+2028.
    return text.removesuffix("\n").split("\n") if text else []


def _write(
    path: Path, sources: list[str], beams: int | None, max_new: int | None, threads: int, progress: Progress
) -> tuple[list[_Line], dict[str, str | int]]:
    """What was written, and what holds for all of it."""
    from contextlib import ExitStack

    from edgeopt.bundle.generation_reader import open_generation_bundle
    from edgeopt.errors import MissingError
    from edgeopt.generation.writer import Writer
    from edgeopt.runtimes import load_runtime

    bundle = open_generation_bundle(path)
    tokens = _tokens(bundle)
    runtime = load_runtime(bundle.target.runtimes[0])
    if (reason := runtime.unavailable()) is not None:
        raise MissingError(reason, where=str(path))
    beams = bundle.beams if beams is None else beams
    lines = []
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(runtime.open(part.runnable_path, part.signature, threads))
            for name, part in bundle.parts.items()
        }
        writer = Writer(sessions, bundle.generation, beams, length_penalty=bundle.length_penalty)
        for source in progress.track(sources, "Writing", len(sources)):
            if source.strip():
                written = writer.write(tokens.inputs(source), max_new)
                lines.append(_line(source, tokens.text(written.ids), written))
            else:
                lines.append(_Line(source))
        fixed: dict[str, str | int] = {"runtime": runtime.name, "beams": beams, "threads": threads}
        return lines, fixed | {"cache_bytes": writer.cache_bytes}


def _tokens(bundle: GenerationBundle) -> Tokens:
    from edgeopt.errors import UsageError
    from edgeopt.generation.tokens import Tokens
    from edgeopt.types import TextPreprocessing

    preprocessing = bundle.preprocessing
    if bundle.tokenizer is None or not isinstance(preprocessing, TextPreprocessing):
        raise UsageError(
            "its network does not read text, or has no tokenizer",
            where=str(bundle.path),
            fix="generate.py in the bundle takes arrays",
        )
    return Tokens(bundle.tokenizer, bundle.generation, preprocessing.prefix, preprocessing.max_length)


def _line(source: str, text: str, written: Written) -> _Line:
    later = sum(written.token_ms)
    rate = 1e3 * len(written.token_ms) / later if written.token_ms else None
    return _Line(source, text, len(written.ids), written.ended, written.first_token_ms, rate)


def _speed(lines: list[_Line]) -> dict[str, float]:
    """Medians over the texts that have the figure."""
    from statistics import median

    given = {name: [value for line in lines if (value := asdict(line)[name]) is not None] for name in _SPEEDS}
    return {name: median(values) for name, values in given.items() if values}
