"""Tokenizers that come as SentencePiece files cut texts as before once they are a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeopt.errors import MissingError, UsageError
from edgeopt.sources.huggingface_tokenizer import tokenizer_of

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

ENGLISH = [
    "two dogs play in the snow",
    "a man rides a red bike",
    "a woman in a red coat sings",
    "dogs and men play",
] * 5
GERMAN = ["zwei hunde spielen im schnee", "ein mann fährt rad", "eine frau im roten mantel singt"] * 5


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def train(texts: list[str], path: Path, size: int) -> list[str]:
    """Write a SentencePiece model; returns its pieces."""
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=stream, vocab_size=size, minloglevel=2, hard_vocab_limit=False
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def marian(folder: Path) -> Path:
    folder.mkdir()
    pieces = [*train(ENGLISH, folder / "source.spm", 50), *train(GERMAN, folder / "target.spm", 50)]
    named = ["</s>", "<unk>", *(p for p in dict.fromkeys(pieces) if p not in ("<s>", "</s>", "<unk>")), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(named)}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_marian(tmp_path: Path, home: Path) -> None:
    from tokenizers import Tokenizer

    folder = marian(tmp_path / "net")
    path = tokenizer_of(folder)
    assert path is not None
    assert home in path.parents
    assert (path.parent / "tokenizer_config.json").is_file()
    made = Tokenizer.from_file(str(path))
    theirs = transformers.MarianTokenizer.from_pretrained(folder)
    for text in (*ENGLISH[:4], "  two  bikes sing ", "men in snow"):
        assert made.encode(text).ids == theirs(text).input_ids
    written = [theirs.get_vocab()[piece] for piece in theirs.spm_target.encode(GERMAN[1], out_type=str)]
    assert made.decode([*written, theirs.eos_token_id]) == GERMAN[1]
    before = path.stat().st_mtime_ns
    assert tokenizer_of(folder) == path
    assert path.stat().st_mtime_ns == before
    assert [entry.name for entry in path.parent.parent.iterdir()] == [path.parent.name]


def test_one_file_of_pieces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "net"
    folder.mkdir()
    train(ENGLISH, folder / "spiece.model", 50)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    path = tokenizer_of(folder)
    assert path is not None
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    made = Tokenizer.from_file(str(path))
    for text in ENGLISH[:4]:
        assert made.encode(text, add_special_tokens=False).tokens == pieces.encode(text, out_type=str)


def test_with_and_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer_of(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "source.spm").write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"can't be made a tokenizer.json"):
        tokenizer_of(tmp_path)
    monkeypatch.setattr("edgeopt.sources.huggingface_tokenizer.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="pip install sentencepiece"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_of(tmp_path) == tmp_path / "tokenizer.json"
