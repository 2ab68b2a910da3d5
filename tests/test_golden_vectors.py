"""What a bundle of a network that writes keeps to be written again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgeopt.generation.tokens import Tokens
from edgeopt.generation.writer import Written
from edgeopt.golden_vectors import golden_sequences
from edgeopt.types import Array, Generation, Sample

tokenizers = pytest.importorskip("tokenizers")

TRANSLATES = Generation("encoder-decoder", "translation", 8, (3,), (1,), 0, 6, 9, 1)
CONTINUES = Generation("decoder", "text-generation", 8, (), (1,), 0, 3, 9, 1)
HEARS = Generation("encoder-decoder", "speech-recognition", 8, (3,), (1,), 0, 6, 9, 1)


class Ends:
    """A writer that reads `reads`, no more than its generation's `max_source` tokens, and writes one word."""

    def __init__(self, generation: Generation, *reads: str) -> None:
        self.reads = frozenset(reads)
        self._generation = generation

    def most_new(self, inputs: Mapping[str, Array]) -> int:
        del inputs
        return 5

    def write(self, inputs: Mapping[str, Array], max_new: int) -> Written:
        assert set(inputs) <= self.reads
        assert max_new == 5
        if "input_ids" in inputs:
            assert inputs["input_ids"].shape[1] <= self._generation.max_source
        return Written((4, 1), True, 1.0, 1.0, (1.0,), ())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "<s>": 3, "ein": 4, "Hund": 5, "schläft": 6, "x:": 7}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def sample(**inputs: list[int]) -> Sample:
    return Sample({name: np.array([values]) for name, values in inputs.items()}, None, "row 0")


def test_the_prompt_is_the_text_without_its_prefix(file: Path) -> None:
    data = [sample(input_ids=[7, 5, 6, 1], attention_mask=[1] * 4, decoder_input_ids=[3, 4])]
    tokens = Tokens(file, TRANSLATES, "x: ")
    writer = Ends(TRANSLATES, "input_ids", "attention_mask")
    (found,) = golden_sequences(writer, data, TRANSLATES, tokens, 1)  # type: ignore[arg-type]
    assert (found.prompt, found.text, found.ids, dict(found.inputs)) == ("Hund schläft", "ein", (4, 1), {})


def test_a_prompt_that_would_be_read_as_others_is_kept_as_tokens(file: Path) -> None:
    data = [sample(input_ids=[7, 2, 2, 6, 1], attention_mask=[1] * 5)]
    tokens = Tokens(file, TRANSLATES, "ein ")
    writer = Ends(TRANSLATES, "input_ids", "attention_mask")
    (found,) = golden_sequences(writer, data, TRANSLATES, tokens, 1)  # type: ignore[arg-type]
    assert found.prompt is None
    assert set(found.inputs) == {"input_ids", "attention_mask"}


def test_a_text_longer_than_a_prompt_may_be_is_begun(file: Path) -> None:
    """A language model's texts fill the cache, its prompts a part of it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save(str(file))
    data = [sample(tokens=[4, 5, 6, 4, 5, 6, 4, 5])]
    (found,) = golden_sequences(
        Ends(CONTINUES, "input_ids", "length"),
        data,
        CONTINUES,
        Tokens(file, CONTINUES),
        1,  # type: ignore[arg-type]
    )
    assert found.prompt == "ein Hund schläft"


def test_what_is_heard_has_no_prompt(file: Path) -> None:
    heard = Sample({"input_features": np.zeros((1, 2, 3), np.float32)}, None, "row 0")
    (found,) = golden_sequences(
        Ends(HEARS, "input_features"),
        [heard],
        HEARS,
        Tokens(file, HEARS),
        1,  # type: ignore[arg-type]
    )
    assert found.prompt is None
    assert set(found.inputs) == {"input_features"}
    assert found.text == "ein"
