"""JSON lines and plain texts, tokenized or as arrays."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeopt.datasets import open_dataset
from edgeopt.errors import ConfigError, DataError, MissingError, UsageError
from edgeopt.types import Dim, DType, TensorSpec, TextPreprocessing

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A word-level tokenizer that adds [CLS] and [SEP], and pads to 512 unless told otherwise."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_padding(length=512)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def bert(length: int | Dim, *names: str, dtype: DType = "int64") -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, (1, length), dtype) for name in names or ("input_ids", "attention_mask"))


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_are_padded_to_the_models_length(tmp_path: Path, tokenizer: Path) -> None:
    spec = write(tmp_path / "d.jsonl", {"text": "a good film", "label": 1}, {"text": "bad", "label": 0})
    inputs = bert(6, "token_type_ids", "mask", "input_ids", dtype="int32")
    dataset = open_dataset(spec, inputs, TextPreprocessing(str(tokenizer)))
    sample = dataset[1]
    assert {name: array.tolist() for name, array in sample.inputs.items()} == {
        "input_ids": [[2, 6, 3, 0, 0, 0]],
        "mask": [[1, 1, 1, 0, 0, 0]],
        "token_type_ids": [[0] * 6],
    }
    assert sample.inputs["mask"].dtype == np.int32
    assert ([s.label for s in dataset], sample.name, dataset.class_names) == ([1, 0], "row 1", ())


@pytest.mark.parametrize(
    ("length", "declared", "expected"),
    [
        (Dim("seq", 1, 512), {"max_length": 8}, 8),
        (Dim("seq", 1, 512), {"max_length": 8, "padding": "none"}, 5),
        (Dim("seq", 1, 4), {"max_length": 8, "padding": "none"}, 4),
        (Dim("seq", 7, 9), {"max_length": 8, "padding": "none"}, 7),
        (16, {"max_length": 8}, 16),
        (4, {"max_length": 8, "padding": "none"}, 4),
    ],
)
def test_length(tmp_path: Path, tokenizer: Path, length: int | Dim, declared: dict[str, object], expected: int) -> None:
    spec = write(tmp_path / "d.jsonl", {"text": "a good film"})
    sample = open_dataset(spec, bert(length), TextPreprocessing(str(tokenizer), **declared))[0]
    assert sample.inputs["input_ids"].shape == (1, expected)
    assert sample.inputs["input_ids"][0, 0] == 2
    assert sample.inputs["attention_mask"].sum() == min(5, expected)


def test_pairs_and_inputs_known_only_by_order(tmp_path: Path, tokenizer: Path) -> None:
    spec = write(tmp_path / "d.jsonl", {"premise": "a film", "hypothesis": "good", "label": "entailment"})
    declared = TextPreprocessing(str(tokenizer / "tokenizer.json"), 8, text_keys=("premise", "hypothesis"))
    dataset = open_dataset(spec, bert(8, "args_0", "args_1", "args_2"), declared)
    assert [array.tolist() for array in dataset[0].inputs.values()] == [
        [[2, 4, 7, 3, 5, 3, 0, 0]],
        [[1, 1, 1, 1, 1, 1, 0, 0]],
        [[0, 0, 0, 0, 1, 1, 0, 0]],
    ]
    assert dataset.class_names == ("entailment",)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_masks_of_other_types(tmp_path: Path, tokenizer: Path, dtype: DType) -> None:
    spec = write(tmp_path / "d.jsonl", {"text": "a"})
    inputs = (*bert(4, "input_ids"), *bert(4, "attention_mask", dtype=dtype))
    mask = open_dataset(spec, inputs, TextPreprocessing(str(tokenizer)))[0].inputs["attention_mask"]
    assert (mask.dtype.name, mask.astype(int).tolist()) == (dtype, [[1, 1, 1, 0]])


def test_plain_texts_blank_lines_and_compression(tmp_path: Path, tokenizer: Path) -> None:
    text = "\ufeffgood film\r\n\r\nbad\n\n\na"
    (tmp_path / "d.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(text.encode()))
    ids = [
        [
            s.inputs["input_ids"].tolist()
            for s in open_dataset(str(tmp_path / name), bert(4), TextPreprocessing(str(tokenizer)))
        ]
        for name in ("d.txt", "d.txt.gz")
    ]
    assert ids[0] == ids[1] == [[[2, 5, 7, 3]], [[2, 6, 3, 0]], [[2, 4, 3, 0]]]


def test_gzipped_json_lines_equal_plain_ones(tmp_path: Path) -> None:
    rows = [{"x": [i, 2.5], "label": f"c{i % 2}"} for i in range(5)]
    plain = write(tmp_path / "d.jsonl", *rows)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    inputs = (TensorSpec("x", (1, 2), "float32"),)
    one, two = (open_dataset(spec, inputs, None) for spec in (plain, plain + ".gz"))
    assert one.fingerprint() == two.fingerprint()
    assert [s.label for s in one] == [s.label for s in two] == [0, 1, 0, 1, 0]
    assert two[4].inputs["x"].tolist() == [[4, 2.5]]


def test_numeric_rows_by_input_name(tmp_path: Path) -> None:
    inputs = (TensorSpec("age", (1,), "float32"), TensorSpec("code", (1, 2), "int64"))
    spec = write(
        tmp_path / "d.jsonl", {"age": 40, "code": [1, 2], "label": [0.5]}, {"age": 41, "code": [3, 4], "label": [1]}
    )
    dataset = open_dataset(spec, inputs, None)
    assert dataset[1].inputs["age"].dtype == np.float32
    assert dataset[1].inputs["code"].tolist() == [[3, 4]]
    np.testing.assert_array_equal(dataset[0].label, [0.5])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"x": [1]}\n\n{"x": \n', r"d.jsonl, line 3: is not JSON"),
        ('{"x": [1]}\n[1]\n', r"d.jsonl, line 2: is not a JSON object"),
        ("[" * 200_000 + "\n", r"line 1: is not JSON"),
        ('{"x": [1], "label": 0}\n{"x": [1]}\n', r"line 2: has no 'label', though the first line has"),
        ('{"x": [1], "label": 0}\n{"x": [1], "label": 0.5}\n', r"line 2: the label 0.5 is no class index"),
        ('{"x": [1], "label": 0}\n{"x": [1], "label": "cat"}\n', r"line 2: labels mix class indices and class names"),
        ('{"x": [[1], [2, 3]]}\n', r"line 1, 'x': is not an array"),
        ('{"x": "one"}\n', r"line 1, 'x': is text, not an array of numbers"),
        ('{"z": [1]}\n', r"line 1: has no array for the model's input 'x'"),
        ('{"x": [1, 2]}\n', r"line 1, input 'x': has shape \(1, 2\), the model takes \(1, 1\)"),
        ("\n \n", r"is empty"),
        ("", r"is empty"),
    ],
)
def test_bad_lines_are_numbered(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / "d.jsonl"), (TensorSpec("x", (1, 1), "float32"),), None)


def test_a_misfit_after_blank_lines_has_the_files_line_number(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('\n{"x": [1]}\n\n\n{"x": [1, 2]}\n\n')
    dataset = open_dataset(str(tmp_path / "d.jsonl"), (TensorSpec("x", (1, 1), "float32"),), None)
    with pytest.raises(DataError, match="line 5, input 'x'"):
        dataset[1]


def test_texts_under_another_key(tmp_path: Path, tokenizer: Path) -> None:
    spec = write(tmp_path / "d.jsonl", {"sentence": "a"})
    with pytest.raises(DataError, match=r"line 1: has no 'text' \(it has sentence\); set text_keys"):
        open_dataset(spec, bert(4), TextPreprocessing(str(tokenizer)))


def test_texts_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("hello\n")
    with pytest.raises(UsageError, match="texts need a tokenizer; declare preprocessing"):
        open_dataset(str(tmp_path / "d.txt"), bert(4), None)


def test_tokenizer_mistakes(tmp_path: Path, tokenizer: Path) -> None:
    spec = write(tmp_path / "d.jsonl", {"text": "a"})
    with pytest.raises(ConfigError, match="no such tokenizer"):
        open_dataset(spec, bert(4), TextPreprocessing(str(tmp_path / "none")))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad.json: is not a tokenizer"):
        open_dataset(spec, bert(4), TextPreprocessing(str(tmp_path / "bad.json")))
    with pytest.raises(ConfigError, match="no field for the model's input 'pixel_values'"):
        open_dataset(spec, bert(4, "input_ids", "pixel_values"), TextPreprocessing(str(tokenizer)))
    with pytest.raises(ConfigError, match=r"token ids are \(batch, sequence\), this input has 3 dimensions"):
        open_dataset(spec, (TensorSpec("input_ids", (1, 4, 4), "int64"),), TextPreprocessing(str(tokenizer)))


def test_the_padding_token_may_be_named_beside_the_tokenizer(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    made.save(str(tmp_path / "tokenizer.json"))
    spec = write(tmp_path / "d.jsonl", {"text": "a"})
    with pytest.raises(ConfigError, match="names no padding token"):
        open_dataset(spec, bert(3), TextPreprocessing(str(tmp_path)))
    config = {"pad_token": {"content": "<end>"}, "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    sample = open_dataset(spec, bert(3), TextPreprocessing(str(tmp_path)))[0]
    assert sample.inputs["input_ids"].tolist() == [[1, 1, 0]]
    assert sample.inputs["attention_mask"].tolist() == [[0, 0, 1]]


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    spec = write(tmp_path / "d.jsonl", {"text": "a"})
    with pytest.raises(MissingError, match=r"pip install 'edgeopt\[hf\]'"):
        open_dataset(spec, bert(4), TextPreprocessing(str(tokenizer)))


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"x": [1]}\n' * 1000)
    inputs = (TensorSpec("x", (1, 1), "float32"),)
    for name, data in [("cut", whole[:-20]), ("text", b"hello"), ("bits", whole[:20] + b"\xff" * 20 + whole[40:])]:
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.jsonl.gz: is corrupt"):
            open_dataset(str(tmp_path / f"{name}.jsonl.gz"), inputs, None)
