"""Targets that a teacher writes token by token, many at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.datasets import open_dataset
from edgeopt.datasets.base import Dataset
from edgeopt.progress import Silent
from edgeopt.tuning.sequences import teacher_sequences
from edgeopt.types import Array, Dim, Generation, Model, TensorSpec

TOKENS, PAD, END, START = 12, 0, 1, 2
INPUTS = (
    TensorSpec("input_ids", (1, Dim("source", 2, 30)), "int64", padding=PAD),
    TensorSpec("attention_mask", (1, Dim("source", 2, 30)), "int64", padding=0),
    TensorSpec("decoder_input_ids", (1, Dim("target", 2, 30)), "int64", padding=PAD),
)


class Copyist(nn.Module):
    """Writes the source, token by token, and then END; checks that the cache holds what it has read."""

    def __init__(self, *, fixed_batch: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.fixed_batch = fixed_batch
        self.batches: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, source: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        if self.fixed_batch:
            source = source.view(1, -1)
        self.batches.append(len(source))
        told = torch.where(mask.bool(), source, END).float() * self.weight
        memory = told[:, None, :, None]
        return memory, memory

    def decode(
        self,
        token: Tensor,
        position: Tensor,
        source_mask: Tensor | None,
        memory: tuple[Tensor, ...],
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        del source_mask
        place = int(position)
        assert past[0].shape[:2] == (len(token), 1)
        if place > 1:
            # Row k holds the token that was read at k: the start, then the source's own.
            assert bool((past[0][:, 0, 1:place, 0] <= memory[0][:, 0, : place - 1, 0]).all())
        told = memory[0][:, 0, :, 0]
        wanted = told[:, place] if place < told.shape[1] else torch.full_like(told[:, 0], END)
        logits = nn.functional.one_hot(wanted.long(), TOKENS).float()
        logits[:, 3] += 0.5
        row = token[:, None, :, None].float()
        return logits, (row, row)


def teacher(module: nn.Module, **changes: object) -> Model:
    settings: dict[str, object] = {
        "kind": "encoder-decoder", "task": "translation", "vocabulary": TOKENS, "start_ids": (START,),
        "end_ids": (END,), "pad_id": PAD, "max_source": 30, "max_target": 30, "layers": 1,
    }  # fmt: skip
    generation = Generation(**(settings | changes))  # type: ignore[arg-type]
    output = TensorSpec("logits", (1, Dim("target", 2, 30), TOKENS), "float32")
    example = {spec.name: np.full((1, 2), 5) for spec in INPUTS}
    return Model(
        "copyist", module.eval(), None, INPUTS, (output,), example, None, (), (), "0" * 64, generation=generation
    )


def sources(lengths: list[int]) -> list[Array]:
    random = np.random.default_rng(0)
    return [random.integers(4, TOKENS, length) for length in lengths]


def data_of(rows: list[Array]) -> Dataset:
    items = [
        {"input_ids": row, "attention_mask": np.ones_like(row), "decoder_input_ids": np.array([START, PAD])}
        for row in rows
    ]
    return open_dataset(items, INPUTS, None)


LENGTHS = [3, 25, 2, 2, 7, 20, 3, 4, 9, 5]


@pytest.mark.parametrize("fixed_batch", [False, True])
def test_every_source_is_written_whole(tmp_path: Path, fixed_batch: bool) -> None:
    rows = sources(LENGTHS)
    written = teacher_sequences(teacher(Copyist(fixed_batch=fixed_batch)), data_of(rows), tmp_path, 4, Silent())
    assert written.is_labelled
    for row, sample in zip(rows, written, strict=True):
        assert isinstance(sample.label, np.ndarray)
        assert sample.label.tolist() == [[*row.tolist(), END]]
        assert sample.inputs["decoder_input_ids"].tolist() == [[START, *row.tolist()]]
        assert sample.inputs["input_ids"].tolist() == [row.tolist()]
    assert written[1].inputs["decoder_input_ids"].shape == (1, 26)


def test_it_is_written_once_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    model, data = teacher(Copyist()), data_of(sources(LENGTHS))
    whole = teacher_sequences(model, data, tmp_path, 3, Silent())
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()

    class Fails(Silent):
        def step(self, title: str) -> None:
            raise AssertionError(title)

    assert teacher_sequences(model, data, tmp_path, 3, Fails()).fingerprint() == whole.fingerprint()
    for cut in (len(content) - 3, len(content) // 2, 0):
        file.write_bytes(content[:cut])
        assert teacher_sequences(model, data, tmp_path, 3, Silent()).fingerprint() == whole.fingerprint()
        assert len(file.read_bytes()) == len(content)
    file.write_bytes(b"no such thing, really")
    assert teacher_sequences(model, data, tmp_path, 3, Silent()).fingerprint() == whole.fingerprint()


def test_a_teacher_that_never_ends_is_stopped(tmp_path: Path) -> None:
    model = teacher(Copyist(), end_ids=(3,), max_target=6, start_ids=(START, START))
    sample = teacher_sequences(model, data_of(sources([9])), tmp_path, 4, Silent())[0]
    assert isinstance(sample.label, np.ndarray)
    assert sample.label.shape == sample.inputs["decoder_input_ids"].shape == (1, 6)
    assert sample.label[0, 0] == -100


def test_suppressed_tokens_are_not_written(tmp_path: Path) -> None:
    row = np.array([5, 6, 5])
    model = teacher(Copyist(), begin_suppressed_ids=(5,))
    first = teacher_sequences(model, data_of([row]), tmp_path, 4, Silent())[0].label
    assert isinstance(first, np.ndarray)
    assert first.tolist() == [[3, 6, 5, END]]
    never = teacher_sequences(teacher(Copyist(), suppressed_ids=(5,)), data_of([row]), tmp_path, 4, Silent())[0].label
    assert isinstance(never, np.ndarray)
    assert never.tolist() == [[3, 6, 3, END]]
