"""Package descriptions of Debian: what a paragraph or more tells, in one line that a person wrote.

Some 60 000 real pairs of a text and its summary. The file changes with every point release of the distribution. It is
taken by its SHA-256, which Debian's mirrors serve while that release is current, and the archive of snapshots for ever.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

from edgeopt.case_studies.corpus import Corpus, TextPair, downloaded
from edgeopt.emulator.download import Download, mirrors, sha256_of
from edgeopt.errors import DataError
from edgeopt.progress import Progress

#: Of Debian 12.15, main.
_SHA256 = "a3d4a0bfd8e9242810b0885eda7c1a6e05dac15b333ddbaab03ba56f2dfa4bf0"
_SIZE = 6_107_304
_NAME = "Translation-en.xz"
_BY_HASH = f"/dists/bookworm/main/i18n/by-hash/SHA256/{_SHA256}"
_SNAPSHOT = "https://snapshot.debian.org/archive/debian/20260712T000000Z/dists/bookworm/main/i18n/Translation-en.xz"
_FIX = "fetch dists/bookworm/main/i18n/Translation-en.xz of Debian 12.15 and give the folder that holds it as --data"

#: Per cent of the texts that judge each epoch, and that judge the result.
_VALIDATION, _TEST = 2, 2
#: Words of a description that are read; the rest lists features.
_MOST_WORDS = 50
_FEWEST_WORDS = 12


def load(directory: Path | None, progress: Progress) -> Corpus:
    """The data set.

    Args:
        directory: holds Translation-en.xz; None downloads it to $EDGEOPT_HOME/data.

    Raises:
        DataError: the file of `directory` is missing, another one, or damaged.
        MissingError: it can't be downloaded.
    """
    if directory is None:
        urls = (*(mirror + _BY_HASH for mirror in mirrors(("http://deb.debian.org/debian",))), _SNAPSHOT)
        path = downloaded(Download(_NAME, urls, _SHA256, _SIZE), progress, _FIX)
    else:
        path = directory / _NAME
        if not path.is_file():
            raise DataError("there is no such file", where=str(path), fix=_FIX)
        if sha256_of(path) != _SHA256:
            raise DataError("is not that of Debian 12.15: its SHA-256 is another", where=str(path), fix=_FIX)
    return corpus_of(_text(path), {_NAME: _SHA256})


def corpus_of(text: str, files: dict[str, str]) -> Corpus:
    """The pairs of such a file, each text in one part only."""
    parts: dict[str, list[TextPair]] = {"train": [], "validation": [], "test": []}
    seen: set[TextPair] = set()
    for summary, description in _entries(text):
        first, words = _first_paragraph(description), description.split()
        pair = (" ".join(words[:_MOST_WORDS]), summary)
        if len(words) >= _FEWEST_WORDS and pair not in seen:
            seen.add(pair)
            parts[_part(first)].append(pair)
    return Corpus(
        title="Debian package descriptions",
        task="summarization",
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        test=tuple(parts["test"]),
        files=files,
    )


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Summary and description of every package. Format: https://wiki.debian.org/DebianRepository/Format#Translations."""
    for entry in text.split("\n\n"):
        match = re.search(r"^Description-en: (.+)\n((?: .*\n?)+)", entry, re.MULTILINE)
        if match:
            # A line with only a dot separates paragraphs; two blanks begin a list.
            lines = [line[1:] for line in match[2].splitlines()]
            yield match[1].strip(), "\n".join("" if line == "." else line.strip() for line in lines)


def _first_paragraph(description: str) -> str:
    return " ".join(description.split("\n\n")[0].split())


def _part(first_paragraph: str) -> str:
    """Packages made of one source share their first paragraph: they must not be in two parts."""
    place = int(hashlib.sha256(first_paragraph.encode()).hexdigest(), 16) % 100
    return "test" if place < _TEST else "validation" if place < _TEST + _VALIDATION else "train"


def _text(path: Path) -> str:
    try:
        return lzma.decompress(path.read_bytes()).decode()
    except (lzma.LZMAError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"can't be read: {error}", where=str(path)) from error
