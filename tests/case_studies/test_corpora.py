"""The data of the studies: read, made up, or not to be had."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from edgeopt.case_studies import made_up, multi30k, summarization
from edgeopt.case_studies.corpus import Corpus
from edgeopt.emulator import download
from edgeopt.errors import DataError, MissingError
from edgeopt.progress import Silent

ENTRY = """\
Package: {name}
Description-md5: 0
Description-en: {summary}
{text}
"""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object) -> bool:
        raise OSError("no network")

    monkeypatch.setattr(download, "_came", refused)
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "home"))


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder in the layout of Multi30k, which then counts as the published one."""
    published = {}
    for name in multi30k.FILES:
        text = "A dog.\nTwo cats.\n" if ".en." in name else "Ein Hund.\nZwei Katzen.\n"
        (tmp_path / name).write_bytes(gzip.compress(text.encode(), mtime=0))
        content = (tmp_path / name).read_bytes()
        published[name] = (hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setattr(multi30k, "FILES", published)
    return tmp_path


def test_captions_are_read_in_pairs(captions: Path) -> None:
    corpus = multi30k.load(captions, Silent())
    assert corpus.train == (("A dog.", "Ein Hund."), ("Two cats.", "Zwei Katzen."))
    assert corpus.test == corpus.validation == corpus.train
    assert set(corpus.files) == set(multi30k.FILES)


def test_a_missing_file_is_told(captions: Path) -> None:
    (captions / "val.de.gz").unlink()
    with pytest.raises(DataError, match=r"val\.de\.gz: there is no such file; --data takes a folder with train\.en"):
        multi30k.load(captions, Silent())


def test_another_file_of_that_name_is_refused(captions: Path) -> None:
    (captions / "train.de.gz").write_bytes(gzip.compress(b"Ein Hund.\n"))
    with pytest.raises(DataError, match=r"train\.de\.gz: is not the published file: its SHA-256 is another"):
        multi30k.load(captions, Silent())


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("study", "told"), [(multi30k, "multi30k/dataset"), (summarization, "Translation-en.xz")])
def test_without_network_the_line_says_what_to_fetch(study: object, told: str) -> None:
    with pytest.raises(MissingError, match=rf"can't be downloaded.*{told}.*--data"):
        study.load(None, Silent())  # type: ignore[attr-defined]


def test_descriptions_and_their_summaries() -> None:
    words = "A tool that turns one thing into another thing, quickly and well, on every machine."
    text = ENTRY.format(name="tool", summary="turns things", text=f" {words}\n .\n It has many  options.")
    corpus = summarization.corpus_of(f"{text}\n{text}", {})
    pairs = (*corpus.train, *corpus.validation, *corpus.test)
    assert pairs == ((f"{words} It has many options.", "turns things"),), "once, with its paragraphs in one line"


def test_short_descriptions_tell_nothing() -> None:
    text = ENTRY.format(name="tool-dbg", summary="symbols", text=" Symbols.")
    corpus = summarization.corpus_of(text, {})
    assert not corpus.train + corpus.validation + corpus.test


def test_packages_of_one_source_are_in_one_part() -> None:
    """They share a paragraph: what was trained on must not be judged on."""
    entries = []
    for number in range(200):
        own = f" This is program number {number}, which does what programs of that number do, and a little more."
        entries += [
            ENTRY.format(name=f"p{number}{kind}", summary=f"s{number}{kind}", text=f"{own}\n .\n X{kind}")
            for kind in ("", "-data", "-doc")
        ]
    corpus = summarization.corpus_of("\n".join(entries), {})
    parts = [{source.split(",")[0] for source, _ in part} for part in (corpus.train, corpus.validation, corpus.test)]
    assert all(parts), "each part has some"
    assert sum(map(len, parts)) == 200


@pytest.mark.parametrize("task", ["translation", "summarization"])
def test_made_up_sentences_depend_on_the_seed_only(task: str) -> None:
    one, other = (made_up.load(task, 40, seed) for seed in (0, 0))  # type: ignore[arg-type]
    assert one == other
    assert (len(one.train), len(one.validation), len(one.test)) == (40, 4, 4)
    assert made_up.load(task, 40, 1) != one  # type: ignore[arg-type]


def test_files_of_pairs_are_written_once(tmp_path: Path) -> None:
    corpus = Corpus("t", "translation", (("ä", "b\n"),), (("c", "d"),), (("e", "f"),), {})
    corpus.write(tmp_path)
    assert json.loads((tmp_path / "train.jsonl").read_text("utf-8")) == {"source": "ä", "target": "b\n"}
    before = (tmp_path / "test.jsonl").stat().st_mtime_ns
    corpus.write(tmp_path)
    assert (tmp_path / "test.jsonl").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
