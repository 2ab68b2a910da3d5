"""What the teacher writes, and what a student is told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.datasets import open_dataset
from edgeopt.datasets.base import Dataset
from edgeopt.errors import DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.tuning.sequences import PROMPT, generator_of, teacher_sequences
from edgeopt.types import Array, Model, Sample, TensorSpec

TOKENS, LENGTH, END = 12, 8, 11


class Counting(nn.Module):
    """The next token is the last one plus one, up to END."""

    def __init__(self, *, fixed_batch: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(TOKENS).roll(1, 1))
        self.fixed_batch = fixed_batch
        self.calls = 0

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.fixed_batch:
            ids = ids.view(1, -1)
        del mask
        return self.table[ids]


class Translator(nn.Module):
    """Counts down from the encoder's first token, which it adds to nothing else."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        positions = torch.arange(decoder_input_ids.shape[1])
        wanted = (input_ids[:, :1] + positions).clamp(max=END)
        return nn.functional.one_hot(wanted, TOKENS).float()


def model_of(module: nn.Module, *names: str, rows: int = 1) -> Model:
    specs = tuple(TensorSpec(name, (rows, LENGTH), "int64") for name in names)
    examples = {name: np.ones((rows, LENGTH), np.int64) for name in names}
    output = TensorSpec("logits", (rows, LENGTH, TOKENS), "float32")
    return Model("writer", module.eval(), None, specs, (output,), examples, None, (), (), "0" * 64)


def data_of(model: Model, rows: list[dict[str, Array]], labels: list[Array] | None = None) -> Dataset:
    items: list[object] = list(rows) if labels is None else list(zip(rows, labels, strict=True))
    return open_dataset(items, model.inputs, None)


def written(model: Model, data: Dataset, folder: Path) -> list[Sample]:
    return list(teacher_sequences(model, data, folder, 3, Silent()))


def ids_from(*starts: int) -> list[dict[str, Array]]:
    return [{"ids": np.arange(start, start + LENGTH) % TOKENS} for start in starts]


@pytest.mark.parametrize("fixed_batch", [False, True])
def test_a_language_model_continues_its_prompts(tmp_path: Path, fixed_batch: bool) -> None:
    model = model_of(Counting(fixed_batch=fixed_batch), "ids")
    rows = [{"ids": np.array([5, 2, 0, 0, 0, 0, 0, 0])}, *ids_from(1, 2, 3)]
    samples = written(model, data_of(model, rows), tmp_path)
    start = int(LENGTH * PROMPT)
    assert samples[0].inputs["ids"].tolist() == [[5, 2, 3, 4, 5, 6, 7, 8]]
    assert isinstance(samples[0].label, np.ndarray)
    assert samples[0].label.tolist() == [-100] * (start - 1) + [3, 4, 5, 6, 7, 8] + [-100]
    assert [sample.inputs["ids"].shape for sample in samples] == [(1, LENGTH)] * 4


def test_it_stops_where_labelled_sequences_end(tmp_path: Path) -> None:
    model = model_of(Counting(), "ids", "attention_mask")
    ids = np.array([8, 9, 10, 11, 0, 0, 0, 0])
    rows = [{"ids": ids, "attention_mask": (np.arange(LENGTH) < 4).astype(np.int64)}]
    sample = written(model, data_of(model, rows, [np.array([9, 10, 11, -100, -100, -100, -100, -100])]), tmp_path)[0]
    assert sample.inputs["ids"].tolist() == [[8, 9, 10, 11, 0, 0, 0, 0]]
    assert sample.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert isinstance(sample.label, np.ndarray)
    assert sample.label.tolist() == [9, 10, 11, -100, -100, -100, -100, -100]


def test_a_decoder_writes_from_its_first_token(tmp_path: Path) -> None:
    model = model_of(Translator(), "input_ids", "decoder_input_ids")
    rows = [{"input_ids": np.full(LENGTH, first), "decoder_input_ids": np.zeros(LENGTH, np.int64)} for first in (2, 7)]
    labels = [np.array([3, END, -100, -100, -100, -100, -100, -100])] * 2
    long, short = written(model, data_of(model, rows, labels), tmp_path)
    assert isinstance(long.label, np.ndarray)
    assert isinstance(short.label, np.ndarray)
    # The last label has no place in the input.
    assert long.inputs["decoder_input_ids"].tolist() == [[0, 2, 3, 4, 5, 6, 7, 8]]
    assert long.label.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert short.inputs["decoder_input_ids"].tolist() == [[0, 7, 8, 9, 10, 11, 0, 0]]
    assert short.label.tolist() == [7, 8, 9, 10, 11, -100, -100, -100]


def test_the_teacher_writes_once(tmp_path: Path) -> None:
    module = Counting()
    model = model_of(module, "ids")
    data = data_of(model, ids_from(1, 2, 3, 4))
    first = teacher_sequences(model, data, tmp_path, 2, Silent())
    (file,) = tmp_path.iterdir()
    calls, before = module.calls, file.read_bytes()
    again = teacher_sequences(model, data, tmp_path, 2, Silent())
    assert module.calls <= calls + 2  # the check that it is a generator
    assert first.fingerprint() == again.fingerprint()
    file.write_bytes(before[:100])
    assert teacher_sequences(model, data, tmp_path, 2, Silent()).fingerprint() == first.fingerprint()
    assert file.read_bytes() == before
    other = data_of(model, ids_from(2, 2, 3, 4))
    assert teacher_sequences(model, other, tmp_path, 2, Silent()).fingerprint() != first.fingerprint()
    assert len(list(tmp_path.iterdir())) == 2


class Bidirectional(Counting):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(ids, mask) + ids.float().mean(1)[:, None, None]


class Classifier(Counting):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(ids, mask).mean(1)


@pytest.mark.parametrize(
    ("make", "names", "why"),
    [
        (Classifier, ("ids",), r"is no generator: for tokens \(1, 8\) it gives \(1, 12\)"),
        (Bidirectional, ("ids",), "a token changes the scores of those before it"),
        (Counting, ("ids", "segments"), "its inputs are ids, segments"),
    ],
)
def test_other_models_are_refused(make: Callable[[], nn.Module], names: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        generator_of(model_of(make(), *names))
    assert "decoder_input_ids" in caught.value.line()


def test_left_padding_is_refused(tmp_path: Path) -> None:
    model = model_of(Counting(), "ids", "attention_mask")
    rows = [{"ids": np.arange(LENGTH), "attention_mask": (np.arange(LENGTH) > 2).astype(np.int64)}]
    with pytest.raises(DataError, match="does not begin with its tokens"):
        written(model, data_of(model, rows), tmp_path)
