from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import ConfigError, DataError
from edgeopt.generation.tokens import Tokens
from edgeopt.types import Generation

tokenizers = pytest.importorskip("tokenizers")

TRANSLATES = Generation("encoder-decoder", "translation", 8, (3,), (1,), 0, 6, 6, 1)
CONTINUES = replace(TRANSLATES, kind="decoder", start_ids=())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3, "ein": 4, "Hund": 5, "schläft": 6, "x:": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=9)  # of its training, which is none of ours
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_there_and_back(file: Path) -> None:
    tokens = Tokens(file, TRANSLATES)
    inputs = tokens.inputs("ein Hund schläft")
    np.testing.assert_array_equal(inputs["input_ids"], [[4, 5, 6, 1]])
    np.testing.assert_array_equal(inputs["attention_mask"], [[1, 1, 1, 1]])
    assert inputs["input_ids"].dtype == np.int64
    assert tokens.text([3, 4, 5, 6, 1]) == "ein Hund schläft"


def test_text_ends_at_the_end_token(file: Path) -> None:
    assert Tokens(file, TRANSLATES).text([4, 5, 1, 6, 6]) == "ein Hund"
    assert Tokens(file, TRANSLATES).text([]) == ""


def test_long_texts_are_cut_and_still_closed(file: Path) -> None:
    np.testing.assert_array_equal(Tokens(file, TRANSLATES).inputs("ein " * 20)["input_ids"], [[4, 4, 4, 4, 4, 1]])


def test_texts_are_cut_where_the_data_were(file: Path) -> None:
    """A declared length below the network's own is that of the data set."""
    tokens = Tokens(file, TRANSLATES, max_length=3)
    np.testing.assert_array_equal(tokens.inputs("ein " * 20)["input_ids"], [[4, 4, 1]])
    assert Tokens(file, TRANSLATES, max_length=99).inputs("ein " * 20)["input_ids"].shape == (1, 6)


def test_the_prefix_is_read_too(file: Path) -> None:
    np.testing.assert_array_equal(Tokens(file, TRANSLATES, "x: ").inputs("Hund")["input_ids"], [[7, 5, 1]])


def test_a_prompt_is_left_open(file: Path) -> None:
    np.testing.assert_array_equal(Tokens(file, CONTINUES).inputs("ein Hund")["input_ids"], [[4, 5]])


def test_an_empty_prompt_is_refused(file: Path) -> None:
    with pytest.raises(DataError, match="text '': holds no tokens"):
        Tokens(file, CONTINUES).inputs("")


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such tokenizer"):
        Tokens(tmp_path / "tokenizer.json", TRANSLATES)


def test_something_else_than_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        Tokens(tmp_path / "tokenizer.json", TRANSLATES)
