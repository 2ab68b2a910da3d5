"""`edgeopt generate`: what it reads and prints, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.main import get_command

from edgeopt.cli.console import Settings
from edgeopt.cli.failures import report_failure
from edgeopt.cli.generate import generate
from edgeopt.generation.writer import Written
from edgeopt.types import ArrayPreprocessing, Generation, TextPreprocessing

Run = Callable[..., tuple[int, str, str]]
GENERATION = Generation("encoder-decoder", "translation", 9, (2,), (1,), 0, 8, 8, 1)


class Echo:
    """A writer that gives back what it was to read."""

    cache_bytes = 64

    def __init__(self, *_: object, length_penalty: float) -> None:
        assert length_penalty == 1.0

    def write(self, inputs: Mapping[str, np.ndarray], max_new: int | None) -> Written:
        ids = tuple(inputs["input_ids"][0].tolist())
        return Written(ids[:max_new], max_new is None, 1.0, 2.0, (0.5,) * (len(ids[:max_new]) - 1), ())


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "</s>": 1, "<s>": 2, "de:": 3, "a": 4, "dog": 5, "two": 6, "men": 7, "\x1b": 8}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = SimpleNamespace(
        path=tmp_path,
        tokenizer=tmp_path / "tokenizer.json",
        preprocessing=TextPreprocessing(str(tmp_path / "tokenizer.json"), prefix="de: "),
        target=SimpleNamespace(runtimes=("onnxruntime",)),
        generation=GENERATION,
        beams=4,
        length_penalty=1.0,
        parts={},
    )
    monkeypatch.setattr("edgeopt.bundle.generation_reader.open_generation_bundle", lambda _: opened)
    monkeypatch.setattr("edgeopt.generation.writer.Writer", Echo)
    return opened


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    app = typer.Typer()
    app.command()(generate)

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        try:
            code = get_command(app).main([str(a) for a in arguments], "edgeopt", standalone_mode=False, obj=Settings())
        except Exception as error:
            code = report_failure(error, debug=False)
        captured = capsys.readouterr()
        return int(code or 0), captured.out, captured.err

    return call


@pytest.mark.usefixtures("bundle")
def test_texts_of_the_command_line(run: Run) -> None:
    code, out, err = run("somewhere", "a dog", "two men")
    assert (code, out) == (0, "de: a dog\nde: two men\n")
    assert err == "first token after 2.00 ms, then 2000 tokens/s (medians on this host, 1 thread)\n"


@pytest.mark.usefixtures("bundle")
def test_lines_of_standard_input_and_of_a_file(run: Run, tmp_path: Path) -> None:
    assert run("somewhere", stdin="a dog\n\ntwo\n")[1] == "de: a dog\n\nde: two\n"
    (tmp_path / "lines.txt").write_text("men\n")
    assert run("somewhere", "--file", tmp_path / "lines.txt")[1] == "de: men\n"


@pytest.mark.usefixtures("bundle")
def test_a_line_is_what_a_line_break_ends(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a\x0cdog\n\ntwo\u2028men\n")
    assert run("somewhere", "--file", tmp_path / "lines.txt")[1].split("\n") == ["de: a dog", "", "de: two men", ""]
    assert run("somewhere", stdin="")[:2] == (0, "")


@pytest.mark.usefixtures("bundle")
def test_texts_and_a_file(run: Run, tmp_path: Path) -> None:
    code, _, err = run("somewhere", "a dog", "--file", tmp_path / "lines.txt")
    assert (code, err) == (2, "error: generate: texts and --file are both given; drop one of them\n")


@pytest.mark.usefixtures("bundle")
def test_one_document(run: Run) -> None:
    code, out, err = run("somewhere", "a dog", "--json", "--max-new-tokens", "2", "--beams", "2", "--threads", "3")
    assert (code, err) == (0, "")
    document = json.loads(out)
    (text,) = document.pop("texts")
    assert text == {
        "source": "a dog", "text": "de: a", "tokens": 2, "ended": False, "time_to_first_token_ms": 2.0,
        "tokens_per_second": 2000.0,
    }  # fmt: skip
    assert document == {
        "bundle": "somewhere", "runtime": "onnxruntime", "beams": 2, "threads": 3, "cache_bytes": 64,
        "provenance": "measured-host", "time_to_first_token_ms": 2.0, "tokens_per_second": 2000.0,
    }  # fmt: skip


@pytest.mark.usefixtures("bundle")
def test_control_characters_are_shown_instead_of_obeyed(run: Run) -> None:
    assert run("somewhere", "\x1b")[1] == "de: \\x1b\n"


@pytest.mark.usefixtures("bundle")
def test_a_file_that_is_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfe\x00")
    code, _, err = run("somewhere", "--file", tmp_path / "lines.txt")
    assert (code, err) == (2, f"error: {tmp_path / 'lines.txt'}: is not UTF-8 text\n")
    code, _, err = run("somewhere", "--file", tmp_path / "none.txt")
    assert (code, err) == (2, f"error: {tmp_path / 'none.txt'}: no such file\n")


def test_a_network_that_reads_no_text(run: Run, bundle: SimpleNamespace) -> None:
    bundle.preprocessing = ArrayPreprocessing()
    code, _, err = run("somewhere", "a dog")
    problem = "its network does not read text, or has no tokenizer; generate.py in the bundle takes arrays"
    assert (code, err) == (2, f"error: {bundle.path}: {problem}\n")
