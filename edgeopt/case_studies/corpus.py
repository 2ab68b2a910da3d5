"""Pairs of texts that a study trains, calibrates and judges with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeopt.case_studies.whole_file import write_whole
from edgeopt.emulator.download import Download, fetch
from edgeopt.emulator.home import root
from edgeopt.errors import MissingError
from edgeopt.progress import Progress

Task = Literal["translation", "summarization"]
#: (what is read, what should be written).
TextPair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A data set in its three parts.

    Attributes:
        title: what it is, for the report.
        files: name of every file that it was read from -> its SHA-256; empty where it was made up.
    """

    title: str
    task: Task
    train: tuple[TextPair, ...]
    validation: tuple[TextPair, ...]
    test: tuple[TextPair, ...]
    files: Mapping[str, str]

    def write(self, directory: Path) -> None:
        """As train.jsonl, validation.jsonl and test.jsonl, which the recipe names; a file that is right stays."""
        for name in ("train", "validation", "test"):
            content = "".join(_lines(getattr(self, name)))
            path = directory / f"{name}.jsonl"
            if not path.is_file() or path.read_text(encoding="utf-8") != content:
                write_whole(path, content)


def _lines(pairs: Iterable[TextPair]) -> Iterable[str]:
    for source, target in pairs:
        yield json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n"


def downloaded(wanted: Download, progress: Progress, fix: str) -> Path:
    """A pinned file, from the cache or from the network.

    Args:
        fix: what to do where there is neither.

    Raises:
        MissingError: it can't be had. TamperedError: an address gives another file.
    """
    cache = root().parent / "data"
    progress.step(f"Downloading {wanted.name}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return fetch(wanted, cache, lambda _: None)
    except MissingError as error:
        raise MissingError(error.problem, where=wanted.name, fix=fix) from error
    except OSError as error:
        raise MissingError(
            f"can't be written: {error.strerror}", where=str(cache), fix="set EDGEOPT_HOME to a writable directory"
        ) from error
