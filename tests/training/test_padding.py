"""Samples of different lengths: how they share batches, and what of them counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.datasets import open_dataset
from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.errors import DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.training.data import EpochOrder, Parts, parts, training_batches, validation_batches
from edgeopt.training.fit import FitData, fit, score_of
from edgeopt.training.losses import Loss, cross_entropy, load_loss, relative_error
from edgeopt.training.padding import free_dims, real_positions, stack, stack_labels
from edgeopt.training.rehearsal import free_axes
from edgeopt.training.survey import PackedSamples, survey
from edgeopt.types import Array, Dim, Sample, TensorSpec

TOKENS, PAD = 11, 0
SOURCE, TARGET = Dim("source", 2, 16), Dim("target", 2, 16)
INPUTS = (
    TensorSpec("input_ids", (1, SOURCE), "int64", padding=PAD),
    TensorSpec("attention_mask", (1, SOURCE), "int64", padding=0),
    TensorSpec("decoder_input_ids", (1, TARGET), "int64", padding=PAD),
)


class Pairs(IndexedDataset):
    """Random sources, and their tokens in reverse."""

    def __init__(self, count: int, *, labelled: bool = True) -> None:
        random = np.random.default_rng(0)
        self.sources = [random.integers(3, TOKENS, random.integers(2, 12)) for _ in range(count)]
        self.labelled = labelled
        self.read = 0

    @property
    def is_labelled(self) -> bool:
        return self.labelled

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self.sources)

    def digest_of(self, index: int) -> bytes:
        return self.sources[index].tobytes().ljust(32)[:32]

    def _load(self, index: int) -> Sample:
        self.read += 1
        source = self.sources[index][np.newaxis]
        label = np.concatenate([source[:, ::-1], [[1]]], 1)
        inputs = {
            "input_ids": source,
            "attention_mask": np.ones_like(source),
            "decoder_input_ids": np.concatenate([[[2]], label[:, :-1]], 1),
        }
        return Sample(inputs, label if self.labelled else None, f"pair {index}")


class Writer(nn.Module):
    """Attends from every target token to the source, and to nothing that is filled in."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(TOKENS, 16)
        self.places = nn.Embedding(16, 16)
        self.head = nn.Linear(16, TOKENS)

    def forward(self, ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        target = self.table(decoder_ids) + self.places(torch.arange(decoder_ids.shape[1]))
        scores = target @ source.transpose(1, 2) + (mask[:, None] - 1) * 1e4
        shares = scores.softmax(-1)
        return self.head(target + shares @ source), source, shares[:, None]


def pieces(data: Pairs, batch_size: int) -> Iterator[Parts]:
    return (parts(batch, INPUTS) for batch in validation_batches(data, INPUTS, batch_size))


def test_a_batch_is_filled_up_to_its_longest() -> None:
    batch = next(pieces(Pairs(4), 4))
    lengths = [len(source) for source in Pairs(4).sources]
    assert batch.labels is not None
    assert batch.sizes is not None
    assert batch.sizes.tolist() == [[length, length + 1] for length in lengths]
    assert [tuple(argument.shape) for argument in batch.arguments] == [(4, max(lengths))] * 2 + [(4, max(lengths) + 1)]
    assert batch.arguments[1].sum(1).tolist() == lengths
    assert (batch.labels != -100).sum(1).tolist() == [length + 1 for length in lengths]


def test_lengths_that_may_not_be_filled_up_are_an_error() -> None:
    spec = TensorSpec("x", (1, Dim("n", 1, 9)), "float32")
    samples = [Sample({"x": np.zeros((1, n), np.float32)}, None, f"{n}") for n in (2, 3)]
    with pytest.raises(DataError, match="padding"):
        stack(spec, samples)
    fixed = TensorSpec("x", (1, Dim("n", 1, 9), 4), "float32", padding=0)
    odd = [Sample({"x": np.zeros((1, 2, n), np.float32)}, None, f"{n}") for n in (4, 5)]
    with pytest.raises(DataError, match="don't fit in one batch"):
        stack(fixed, odd)


def test_floats_are_filled_up_too() -> None:
    spec = TensorSpec("x", (1, Dim("n", 1, 9), 2), "float32", padding=0)
    stacked = stack(spec, [Sample({"x": np.ones((1, n, 2), np.float32)}, None, "") for n in (1, 3)])
    assert stacked.sum((1, 2)).tolist() == [2, 6]


@pytest.mark.parametrize("labels", [[np.zeros((1, 2)), np.zeros((1, 3))], [np.array([1]), np.zeros((1, 3), int)]])
def test_labels_that_do_not_fit(labels: list[Array]) -> None:
    samples = [Sample({}, label, "s") for label in labels]
    with pytest.raises(DataError, match="has a label of shape"):
        stack_labels(samples, may_pad=True)


def test_labels_are_not_filled_up_where_inputs_are_not() -> None:
    samples = [Sample({}, np.zeros((1, n), np.int64), "s") for n in (2, 3)]
    with pytest.raises(DataError, match="has a label of shape"):
        stack_labels(samples, may_pad=False)
    padded = stack_labels(samples, may_pad=True)
    assert padded is not None
    assert padded.tolist() == [[0, 0, -100], [0, 0, 0]]


def test_batches_hold_samples_of_like_lengths_and_every_sample_once() -> None:
    data = Pairs(203)
    sizes = survey(data, INPUTS, Silent()).sizes
    assert sizes is not None
    order = EpochOrder(data, 7, 10, sizes)
    first = list(order)
    order.epoch = 1
    second = list(order)
    assert sorted(first) == sorted(second) == list(range(203))
    assert first != second
    again = EpochOrder(data, 7, 10, sizes)
    assert list(again) == first
    spread = [np.ptp(sizes[first[start : start + 10], 0]) for start in range(0, 200, 10)]
    assert max(spread) <= 2
    batches = list(training_batches(data, INPUTS, 10, again))
    assert len(batches) == 20


def test_samples_are_read_once_and_kept() -> None:
    data = Pairs(30)
    found = survey(data, INPUTS, Silent())
    assert isinstance(found.data, PackedSamples)
    assert data.read == 30
    for index in (0, 29, 3):
        kept, sample = found.data[index], data[index]
        assert all((kept.inputs[name] == array).all() for name, array in sample.inputs.items())
        assert isinstance(kept.label, np.ndarray)
        assert isinstance(sample.label, np.ndarray)
        assert kept.label.shape == sample.label.shape
        assert (kept.label == sample.label).all()
    assert found.data.fingerprint() == data.fingerprint()
    assert len(list(found.data)) == 30


def test_samples_that_may_change_are_not_kept() -> None:
    items = [sample.inputs for sample in Pairs(5)]
    data = open_dataset(items, INPUTS, None)
    found = survey(data, INPUTS, Silent())
    assert found.data is data
    assert found.sizes is not None


def test_fixed_inputs_need_no_survey() -> None:
    data = Pairs(3)
    fixed = tuple(TensorSpec(spec.name, (1, 4), "int64", padding=0) for spec in INPUTS)
    assert free_dims(fixed) == ()
    assert survey(data, fixed, Silent()).data is data
    assert data.read == 0


def test_real_positions() -> None:
    sizes = torch.tensor([[2, 1], [1, 3]])
    real = real_positions(sizes, (1, 3, 2), (None, 1, 0))
    assert real.tolist() == [[[[True, True], [False, False], [False, False]]], [[[True, False]] * 3]]


def test_axes_are_found_by_running_other_lengths() -> None:
    arguments = next(pieces(Pairs(3), 3)).arguments
    assert free_axes(Writer(), arguments, INPUTS) == ((1, None), (0, None), (None, 1, 0))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("features", [1, None])
def test_what_is_filled_in_does_not_count(labelled: bool, features: int | None) -> None:
    """A batch with padding has the loss of its samples one by one, weighted by what they have."""
    data = Pairs(2, labelled=labelled)
    data.sources[0], data.sources[1] = np.array([5, 6, 7]), np.array([5, 6, 7, 3, 4, 9, 9])
    student, teacher = Writer(0), Writer(1)
    batch = next(pieces(data, 2))
    axes = free_axes(student, batch.arguments, INPUTS)
    loss = Loss(cross_entropy if labelled else None, 0.5, 2.0, TOKENS, outputs=features, feature_weight=0.0, axes=axes)

    def value(piece: Parts) -> float:
        mine, wanted = student(*piece.arguments), teacher(*piece.arguments)
        if features is None:
            mine, wanted = mine[:1], wanted[:1]
        return float(loss(mine, piece.labels, wanted, piece.sizes).detach())

    alone = [value(piece) for piece in pieces(data, 1)]
    assert value(batch) == pytest.approx((4 * alone[0] + 8 * alone[1]) / 12, rel=1e-5)


def test_features_are_compared_where_they_are_real() -> None:
    found, wanted = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    real = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = relative_error(torch.cat([found[0, :2], found[1]]), torch.cat([wanted[0, :2], wanted[1]]))
    found[0, 2:] = 1e6
    assert float(relative_error(found, wanted, real)) == pytest.approx(float(expected))


def test_smoothed_labels() -> None:
    scores, labels = torch.randn(2, 3, TOKENS), torch.tensor([[1, 2, -100], [3, -100, -100]])
    expected = nn.functional.cross_entropy(
        scores.reshape(-1, TOKENS), labels.reshape(-1), ignore_index=-100, label_smoothing=0.1
    )
    loss = load_loss("cross-entropy", True, 1.0, 1.0, label_smoothing=0.1)
    assert float(loss([scores], labels, [])) == pytest.approx(float(expected))
    with pytest.raises(UsageError, match="goes with cross-entropy"):
        load_loss("mse", True, 1.0, 1.0, label_smoothing=0.1)
    with pytest.raises(UsageError, match="not from 0 to below 1"):
        load_loss("cross-entropy", True, 1.0, 1.0, label_smoothing=1.0)


def test_a_batch_without_labels_that_count_says_nothing() -> None:
    scores = torch.randn(2, 3, TOKENS, requires_grad=True)
    loss = cross_entropy([scores], torch.full((2, 3), -100), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores.grad is not None


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_a_writer_learns_from_pairs(mixed: str) -> None:
    module, data = Writer(), Pairs(64)
    known = FitData(data, data, INPUTS, TOKENS)
    before = score_of(module, known, 16, Silent())
    config = TrainingConfig(epochs=4, batch_size=16, learning_rate=1e-2, mixed_precision=mixed)  # type: ignore[arg-type]
    teaching = Teaching(loss="cross-entropy", alpha=0.5, label_smoothing=0.1)
    result = fit(module, Writer(1), known, teaching, config, 0, Silent(), outputs=1)
    after = score_of(module, known, 16, Silent())
    assert before.is_accuracy
    assert before.count == sum(len(source) + 1 for source in data.sources)
    assert after.value > before.value
    assert result.score == pytest.approx(after.value)
