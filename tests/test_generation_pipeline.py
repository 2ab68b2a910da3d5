"""What is decided or refused of networks that write before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.config import config_of
from edgeopt.datasets.base import Dataset
from edgeopt.errors import UsageError
from edgeopt.generation_pipeline import check_writer, metric_for, tokenizer_for
from edgeopt.plan import ExampleInput
from edgeopt.types import Dim, Generation, Model, Sample, TensorSpec, TextPreprocessing

TRANSLATES = Generation("encoder-decoder", "translation", 9, (1,), (0,), 2, 6, 6, 1)
MODEL = Model(
    name="net",
    module=None,
    native=None,
    inputs=(TensorSpec("input_ids", (1, Dim("source", 2, 6)), "int64", padding=2),),
    outputs=(TensorSpec("logits", (1, Dim("target", 2, 6), 9), "float32"),),
    example_inputs={"input_ids": np.array([[3, 4]])},
    preprocessing=None,
    labels=(),
    history=(),
    source_sha256="0" * 64,
    generation=TRANSLATES,
)
TOKENIZER = Path("tokenizer.json")


class _One(ExampleInput):
    """A data set of one sample."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample


def rows(*references: str, label: bool = False) -> Dataset:
    told = np.array([[3, 0]]) if label else None
    return _One(Sample(MODEL.example_inputs, told, "row 0", references))


@pytest.mark.parametrize(
    ("options", "data", "tokenizer", "metric"),
    [
        ({}, rows("a text"), TOKENIZER, "bleu"),
        ({}, rows(label=True), TOKENIZER, "bleu"),
        ({}, rows(label=True), None, "perplexity"),
        ({}, rows(), TOKENIZER, None),
        ({"metric": "chrf"}, rows("a text"), TOKENIZER, "chrf"),
        ({"metric": "perplexity"}, rows(label=True), None, "perplexity"),
    ],
)
def test_the_metric(options: dict[str, str], data: Dataset, tokenizer: Path | None, metric: str | None) -> None:
    assert metric_for(config_of(options), TRANSLATES, data, tokenizer) == metric


@pytest.mark.parametrize(
    ("options", "data", "tokenizer", "problem"),
    [
        ({"metric": "blue"}, rows("a text"), TOKENIZER, "did you mean bleu"),
        ({"metric": "bleu"}, rows(label=True), None, "has no tokenizer.json"),
        ({"metric": "bleu"}, rows(), TOKENIZER, "which the evaluation data don't say"),
        ({"metric": "perplexity"}, rows(), None, "which the evaluation data don't say"),
        ({"min-accuracy-kept": 0.9}, rows(), TOKENIZER, "min-accuracy-kept: can't be measured"),
    ],
)
def test_a_metric_that_can_not_judge(
    options: dict[str, object], data: Dataset, tokenizer: Path | None, problem: str
) -> None:
    with pytest.raises(UsageError) as refused:
        metric_for(config_of(options), TRANSLATES, data, tokenizer)
    assert problem in refused.value.line()


def test_a_limit_that_no_text_can_keep() -> None:
    with pytest.raises(UsageError, match="min-sqnr-db: limits the error of tensors"):
        check_writer(config_of({"min-sqnr-db": 30.0}), ())


def test_the_tokenizer_of_what_is_only_written_lies_beside_the_model(tmp_path: Path) -> None:
    """As Whisper's, which hears."""
    beside = config_of({"model": f"hf:{tmp_path}"})
    assert tokenizer_for(beside, MODEL) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_for(beside, MODEL) == tmp_path / "tokenizer.json"
    assert tokenizer_for(config_of({"model": "net.py:build"}), MODEL) is None


def test_the_tokenizer_of_what_is_read(tmp_path: Path) -> None:
    read = TextPreprocessing(str(tmp_path), max_length=6, padding="none", target_key="target", start_ids=(1,))
    config = config_of({"model": "net.py:build"})
    assert tokenizer_for(config, replace(MODEL, preprocessing=read)) == tmp_path / "tokenizer.json"
    named = replace(read, tokenizer=str(tmp_path / "own.json"))
    assert tokenizer_for(config, replace(MODEL, preprocessing=named)) == tmp_path / "own.json"
