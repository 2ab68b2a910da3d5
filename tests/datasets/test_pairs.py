"""Pairs of texts: where they come from, and what a network that writes is given of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgeopt.datasets import Dataset, open_dataset
from edgeopt.datasets.pairs import TextPair
from edgeopt.errors import ConfigError, DataError, UsageError
from edgeopt.types import Array, Dim, Sample, TensorSpec, TextPreprocessing

PAD, END, START, BEGIN = 0, 1, 2, 3
WORDS = {"<pad>": PAD, "</s>": END, "<start>": START, "<begin>": BEGIN, "<unk>": 4} | {
    word: 5 + index for index, word in enumerate([*"abcdefgxyz", "translate"])
}
SOURCE, TARGET = Dim("source", 2, 8), Dim("target", 2, 6)
INPUTS = (
    TensorSpec("input_ids", (1, SOURCE), "int64", padding=PAD),
    TensorSpec("attention_mask", (1, SOURCE), "int64", padding=0),
    TensorSpec("decoder_input_ids", (1, TARGET), "int64", padding=PAD),
)
LANGUAGE_MODEL = (TensorSpec("input_ids", (1, Dim("target", 2, 8)), "int64", padding=PAD),)


@pytest.fixture
def preprocessing(tmp_path: Path) -> TextPreprocessing:
    return TextPreprocessing(
        tokenizer(tmp_path, "$A </s>"), 8, "none", ("source",), target_key="target", target_max_length=6,
        start_ids=(START,),
    )  # fmt: skip


def tokenizer(folder: Path, template: str | None, end: str | None = None) -> str:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, WORDS[token]) for token in template.split() if token in WORDS]
        )
    made.save(str(folder / "tokenizer.json"))
    if end is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
    return str(folder)


def ids(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def label(sample: Sample) -> list[int]:
    assert isinstance(sample.label, np.ndarray)
    assert sample.label.dtype == np.int64
    assert sample.label.shape[0] == 1
    return [int(token) for token in sample.label[0]]


def row(sample: Sample, name: str) -> list[int]:
    array: Array = sample.inputs[name]
    return [int(token) for token in array[0]]


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    text = "".join(json.dumps(each) + "\n" for each in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def parallel(folder: Path, source: str, target: str, preprocessing: TextPreprocessing) -> Dataset:
    (folder / "train.en").write_text(source)
    (folder / "train.de").write_text(target)
    return open_dataset(f"{folder}/train.{{en,de}}", INPUTS, preprocessing)


def test_the_decoder_reads_the_target_one_later_and_is_told_it(
    tmp_path: Path, preprocessing: TextPreprocessing
) -> None:
    data = parallel(tmp_path, "a b c\nd\n", "x y\nz\n", preprocessing)
    assert data.is_labelled
    first, second = data
    assert row(first, "input_ids") == [*ids("a b c"), END]
    assert row(first, "attention_mask") == [1, 1, 1, 1]
    assert row(first, "decoder_input_ids") == [START, *ids("x y")]
    assert label(first) == [*ids("x y"), END]
    assert first.references == ("x y",)
    assert second.references == ("z",)
    assert row(second, "input_ids") == [*ids("d"), END]


def test_what_is_shorter_than_the_model_takes_is_filled_up(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    bare = replace(preprocessing, tokenizer=tokenizer(tmp_path, None))
    sample = parallel(tmp_path, "a\n", "x\n", bare)[0]
    assert row(sample, "input_ids") == [*ids("a"), PAD]
    assert row(sample, "attention_mask") == [1, 0]
    assert row(sample, "decoder_input_ids") == [START, PAD]
    assert label(sample) == [*ids("x"), -100]


def test_texts_are_cut_and_keep_their_end(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    sample = parallel(tmp_path, "a b c d e f g a b c\n", "x y z a b c d\n", preprocessing)[0]
    assert row(sample, "input_ids") == [*ids("a b c d e f g"), END]
    assert label(sample) == [*ids("x y z a b"), END]
    assert row(sample, "decoder_input_ids") == [START, *ids("x y z a b")]


def test_an_end_that_the_tokenizer_leaves_out_is_put_there(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    bare = replace(preprocessing, tokenizer=tokenizer(tmp_path, None, end="</s>"))
    data = parallel(tmp_path, "a\na\n", "x y\nx y z a b c d\n", bare)
    assert label(data[0]) == [*ids("x y"), END]
    assert label(data[1]) == [*ids("x y z a b"), END]


def test_of_several_start_tokens_only_the_last_is_followed_by_the_target(
    tmp_path: Path, preprocessing: TextPreprocessing
) -> None:
    begun = replace(preprocessing, tokenizer=tokenizer(tmp_path, "<start> <begin> $A </s>"), start_ids=(START, BEGIN))
    sample = parallel(tmp_path, "a\n", "x y\n", begun)[0]
    assert row(sample, "decoder_input_ids") == [START, BEGIN, *ids("x y")]
    assert label(sample) == [-100, *ids("x y"), END]


def test_a_prefix_comes_before_the_source_alone(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    sample = parallel(tmp_path, "a\n", "x\n", replace(preprocessing, prefix="translate "))[0]
    assert row(sample, "input_ids") == [*ids("translate a"), END]
    assert label(sample) == [*ids("x"), END]


def test_fixed_sizes_are_filled(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    fixed = tuple(replace(spec, shape=(1, 5)) for spec in INPUTS)
    (tmp_path / "train.en").write_text("a\n")
    (tmp_path / "train.de").write_text("x\n")
    sample = open_dataset(f"{tmp_path}/train.{{en,de}}", fixed, preprocessing)[0]
    assert row(sample, "input_ids") == [*ids("a"), END, PAD, PAD, PAD]
    assert row(sample, "decoder_input_ids") == [START, *ids("x"), PAD, PAD, PAD]
    assert label(sample) == [*ids("x"), END, -100, -100, -100]


def test_packed_parallel_files(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    (tmp_path / "train.en.gz").write_bytes(gzip.compress("\ufeffa\r\n\n b \n".encode()))
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"x\n\ny"))
    data = open_dataset(f"{tmp_path}/train.{{en,de}}.gz", INPUTS, preprocessing)
    assert len(data) == 2
    assert [row(sample, "input_ids")[0] for sample in data] == ids("a b")
    assert [sample.name for sample in data] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "x\n", "train.en has 2 lines and train.de 1"),
        ("a\nb\n", "x\n\n", "train.de, line 2: is blank, and not so in train.en"),
        ("\n", "x\n", "train.en, line 1: is blank"),
    ],
)
def test_lines_that_do_not_go_together(
    tmp_path: Path, preprocessing: TextPreprocessing, source: str, target: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        parallel(tmp_path, source, target, preprocessing)


def test_a_missing_file_of_two(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    (tmp_path / "train.en").write_text("a\n")
    with pytest.raises(DataError, match="can't be read"):
        open_dataset(f"{tmp_path}/train.{{en,de}}", INPUTS, preprocessing)


def test_parallel_texts_are_for_networks_that_write(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    for side in ("en", "de"):
        (tmp_path / f"train.{side}").write_text("a\n")
    with pytest.raises(UsageError, match="need a tokenizer"):
        open_dataset(f"{tmp_path}/train.{{en,de}}", INPUTS, None)
    reading = replace(preprocessing, target_key=None, start_ids=())
    with pytest.raises(UsageError, match="target-key"):
        open_dataset(f"{tmp_path}/train.{{en,de}}", LANGUAGE_MODEL, reading)


@pytest.mark.parametrize(
    "given",
    [
        {"source": "a b", "target": "x"},
        {"document": "a b", "summary": "x"},
        {"article": "a b", "highlights": "x", "id": "7"},
        {"text": "a b", "summary": "x"},
        {"translation": {"en": "a b", "de": "x"}},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_usual_spellings(
    tmp_path: Path, preprocessing: TextPreprocessing, given: dict[str, object], suffix: str
) -> None:
    sample = open_dataset(write_lines(tmp_path / f"data{suffix}", [given]), INPUTS, preprocessing)[0]
    assert row(sample, "input_ids") == [*ids("a b"), END]
    assert label(sample) == [*ids("x"), END]


def test_declared_keys_win(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    declared = replace(preprocessing, text_keys=("de",), target_key="en")
    spec = write_lines(tmp_path / "data.jsonl", [{"source": "c", "target": "d", "de": "a", "en": "x"}])
    sample = open_dataset(spec, INPUTS, declared)[0]
    assert sample.references == ("x",)
    assert row(sample, "input_ids") == [*ids("a"), END]


def test_several_references(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    spec = write_lines(tmp_path / "data.jsonl", [{"source": "a", "target": ["x", "y"]}])
    sample = open_dataset(spec, INPUTS, preprocessing)[0]
    assert sample.references == ("x", "y")
    assert label(sample) == [*ids("x"), END]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"source": "a", "target": "x"}, {"source": "b"}], "line 2: has no target"),
        ([{"sentence": "a", "target": "x"}], "has no 'source' \\(it has 'sentence', 'target'\\)"),
        ([{"source": " ", "target": "x"}], "'source' is blank"),
        ([{"source": "a", "target": 7}], "'target' is not a text"),
        ([{"source": "a", "target": []}], "'target' is empty"),
    ],
)
def test_rows_that_are_no_pairs(
    tmp_path: Path, preprocessing: TextPreprocessing, rows: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(write_lines(tmp_path / "data.jsonl", rows), INPUTS, preprocessing)


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_sources_alone_have_no_label(tmp_path: Path, preprocessing: TextPreprocessing, name: str) -> None:
    (tmp_path / name).write_text("a b\n" if name.endswith("txt") else '{"source": "a b"}\n')
    data = open_dataset(str(tmp_path / name), INPUTS, preprocessing)
    assert not data.is_labelled
    assert data[0].label is None
    assert data[0].references == ()
    assert row(data[0], "decoder_input_ids") == [START, PAD]


def test_a_decoder_needs_its_start(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    with pytest.raises(ConfigError, match="start_ids"):
        parallel(tmp_path, "a\n", "x\n", replace(preprocessing, start_ids=()))


def test_a_language_model_reads_its_own_target(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    own = replace(preprocessing, text_keys=("text",), target_key="text", start_ids=())
    (tmp_path / "data.txt").write_text("a b c\n")
    data = open_dataset(str(tmp_path / "data.txt"), LANGUAGE_MODEL, own)
    assert data.is_labelled
    assert row(data[0], "input_ids") == [*ids("a b c"), END]
    assert label(data[0]) == [*ids("b c"), END, -100]


def test_a_language_model_is_told_the_answer_and_not_the_question(
    tmp_path: Path, preprocessing: TextPreprocessing
) -> None:
    asked = replace(preprocessing, tokenizer=tokenizer(tmp_path, None, end="</s>"), start_ids=())
    rows: list[dict[str, object]] = [{"source": "a b c", "target": "x y"}, {"source": "a b c d e f", "target": "x y z"}]
    data = open_dataset(write_lines(tmp_path / "data.jsonl", rows), LANGUAGE_MODEL, asked)
    assert row(data[0], "input_ids") == [*ids("a b c x y"), END]
    assert label(data[0]) == [-100, -100, *ids("x y"), END, -100]
    # The question is cut, so that the whole answer is told.
    assert row(data[1], "input_ids") == [*ids("a b c d x y z"), END]


def test_pairs_win_over_texts_that_are_their_own_target(tmp_path: Path, preprocessing: TextPreprocessing) -> None:
    own = replace(
        preprocessing,
        tokenizer=tokenizer(tmp_path, None, end="</s>"),
        text_keys=("text",),
        target_key="text",
        start_ids=(),
    )
    rows: list[dict[str, object]] = [{"source": "a b c", "target": "x y"}, {"text": "a b"}]
    data = open_dataset(write_lines(tmp_path / "data.jsonl", rows), LANGUAGE_MODEL, own)
    assert row(data[0], "input_ids") == [*ids("a b c x y"), END]
    assert label(data[0]) == [-100, -100, *ids("x y"), END, -100]
    assert row(data[1], "input_ids")[:2] == ids("a b")


@pytest.mark.parametrize(
    "item",
    [
        ("a b", "x"),
        {"source": "a b", "target": "x"},
        TextPair("a b", ("x",)),
    ],
)
def test_pairs_of_ones_own_code(preprocessing: TextPreprocessing, item: object) -> None:
    sample = open_dataset([item], INPUTS, preprocessing)[0]
    assert row(sample, "input_ids") == [*ids("a b"), END]
    assert label(sample) == [*ids("x"), END]
    assert sample.references == ("x",)


def test_arrays_of_ones_own_code_are_taken_as_they_are(preprocessing: TextPreprocessing) -> None:
    arrays = {spec.name: np.array([5, 6, 7]) for spec in INPUTS}
    sample = open_dataset([arrays | {"label": np.array([6, 7, 1])}], INPUTS, preprocessing)[0]
    assert row(sample, "decoder_input_ids") == [5, 6, 7]
    assert isinstance(sample.label, np.ndarray)


@pytest.mark.parametrize("change", [lambda text: text.replace("x", "y"), lambda text: text + "x\n"])
def test_the_target_is_part_of_the_identity(
    tmp_path: Path, preprocessing: TextPreprocessing, change: Callable[[str], str]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = parallel(tmp_path / "one", "a\nb\nc\n", "x\nz\nz\n", preprocessing)
    same = parallel(tmp_path / "two", "a\nb\nc\n", "x\nz\nz\n", preprocessing)
    assert one.fingerprint() == same.fingerprint()
    target = change("x\nz\nz\n")
    source = "a\nb\nc\n" if target.count("\n") == 3 else "a\nb\nc\nd\n"
    assert parallel(tmp_path / "two", source, target, preprocessing).fingerprint() != one.fingerprint()
