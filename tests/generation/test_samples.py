"""Samples of the parts are what the parts would be given while the float network reads the whole samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.datasets.subset import Subset, select
from edgeopt.errors import DataError, UsageError
from edgeopt.generation.parts import split
from edgeopt.generation.samples import part_dataset
from edgeopt.types import Array, Dim, Generation, Model, PartName, Sample, TensorSpec

VOCABULARY, WIDTH, SOURCE, TARGET = 11, 4, 6, 8
PAD, END, START = 0, 1, 2


class Translator(nn.Module):
    """The smallest network that has the methods: the memory and the cache are the embeddings themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory = self.encode(input_ids, attention_mask)
        read = self.table(decoder_input_ids).cumsum(1)
        return self.head(read + memory[0].sum((1, 2))[:, None])

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        rows = (self.table(input_ids) * attention_mask[..., None])[:, None]
        return rows, 2 * rows

    def decode(
        self,
        token: Tensor,
        position: Tensor,
        source_mask: Tensor,
        memory: tuple[Tensor, ...],
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        row = self.table(token)[:, None]
        seen = (torch.arange(past[0].shape[2]) < position)[None, :, None]
        read = (past[0][:, 0] * seen).sum(1) + row[:, 0, 0]
        return self.head(read + memory[0].sum((1, 2)) + 0 * source_mask.sum()), (row, 3 * row)


class TranslatorInRows(Translator):
    """Gives the rows of a whole target at once; how often it was asked tells that it was."""

    asked = 0

    def rows(self, target_ids: Tensor, source_mask: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del source_mask, memory
        self.asked += 1
        row = self.table(target_ids)[:, None]
        return row, 3 * row


class Continuer(nn.Module):
    """The same without a source."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids).cumsum(1))

    def prefill(self, input_ids: Tensor, length: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = self.table(input_ids)
        return self.head(rows.cumsum(1)).index_select(1, length - 1)[:, 0], (rows[:, None], rows[:, None])

    def decode(
        self,
        token: Tensor,
        position: Tensor,
        source_mask: Tensor | None,
        memory: tuple[Tensor, ...],
        past: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        del source_mask, memory
        row = self.table(token)[:, None]
        seen = (torch.arange(past[0].shape[2]) < position)[None, :, None]
        return self.head((past[0][:, 0] * seen).sum(1) + row[:, 0, 0]), (row, row)


class Samples:
    """`count` sentences of 2 to 5 words, padded to a common length."""

    is_labelled = True
    class_names = ()

    def __init__(
        self, count: int, kind: str = "encoder-decoder", has_targets: bool = True, only: Sample | None = None
    ) -> None:
        self.count, self.kind, self.has_targets, self.only = count, kind, has_targets, only

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if self.only is not None:
            return self.only
        words = 2 + index % 4
        text = [3 + (index + k) % (VOCABULARY - 3) for k in range(words)]
        if self.kind == "decoder":
            return Sample({"input_ids": _row([*text, PAD])}, None, f"row {index}")
        inputs = {"input_ids": _row([*text, END, PAD]), "attention_mask": _row([1] * (words + 1) + [0])}
        inputs["decoder_input_ids"] = _row([START, *text, PAD] if self.has_targets else [START, PAD])
        return Sample({name: array[:, :SOURCE] for name, array in inputs.items()}, _row(text), f"row {index}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.count))

    def fingerprint(self) -> str:
        return "samples"


def _row(values: list[int]) -> Array:
    return np.array([values], np.int64)


def translator(network: nn.Module | None = None) -> Model:
    source, target = Dim("source", 2, SOURCE), Dim("target", 2, TARGET)
    inputs = (
        TensorSpec("input_ids", (1, source), "int64", padding=PAD),
        TensorSpec("attention_mask", (1, source), "int64", padding=0),
        TensorSpec("decoder_input_ids", (1, target), "int64", padding=PAD),
    )
    return _model(network or Translator(), inputs, "encoder-decoder", (START,))


def continuer() -> Model:
    inputs = (TensorSpec("input_ids", (1, Dim("target", 2, TARGET)), "int64", padding=PAD),)
    return _model(Continuer(), inputs, "decoder", ())


def _model(network: nn.Module, inputs: tuple[TensorSpec, ...], kind: str, start: tuple[int, ...]) -> Model:
    generation = Generation(
        "decoder" if kind == "decoder" else "encoder-decoder", "translation", VOCABULARY, start, (END,), PAD, SOURCE,
        TARGET, 1,
    )  # fmt: skip
    logits = TensorSpec("logits", (1, Dim("target", 2, TARGET), VOCABULARY), "float32")
    examples = {spec.name: np.ones((1, 4), np.int64) for spec in inputs}
    return Model("t", network.eval(), None, inputs, (logits,), examples, None, (), (), "0" * 64, {}, generation)


def made(model: Model, part: PartName, data: Samples, seed: int = 0, beams: int = 1) -> list[Sample]:
    return list(part_dataset(model, part, split(model, beams), data, seed))


def test_encoder_samples_are_padded_to_the_static_shape() -> None:
    first = made(translator(), "encoder", Samples(3))[0]
    assert first.inputs["input_ids"].tolist() == [[3, 4, END, PAD, PAD, PAD]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert (first.label, first.name) == (None, "row 0")


def test_decoder_samples_hold_what_the_network_has_read_so_far() -> None:
    model, data = translator(), Samples(12)
    network = model.module
    assert isinstance(network, Translator)
    for sample, whole in zip(made(model, "decoder", data), data, strict=True):
        position = int(sample.inputs["position"][0])
        target = whole.inputs["decoder_input_ids"][0]
        assert sample.inputs["token"].tolist() == [[target[position]]]
        with torch.no_grad():
            rows = network.table(torch.from_numpy(target[:position]))
            memory = network.encode(*(torch.from_numpy(whole.inputs[n]) for n in ("input_ids", "attention_mask")))
        expected = np.zeros((1, 1, TARGET, WIDTH), np.float32)
        expected[0, 0, :position] = rows.numpy()
        np.testing.assert_array_equal(sample.inputs["past_key_0"], expected)
        np.testing.assert_array_equal(sample.inputs["past_value_0"], 3 * expected)
        size = memory[0].shape[2]
        np.testing.assert_array_equal(sample.inputs["memory_value_0"][:, :, :size], memory[1].numpy())
        assert sample.inputs["source_mask"].sum() == whole.inputs["attention_mask"].sum()


def test_a_part_computes_from_its_sample_what_the_whole_network_does() -> None:
    model, data = translator(), Samples(8)
    parts = split(model)
    decoder = parts["decoder"]
    assert decoder.module is not None
    assert model.module is not None
    for sample, whole in zip(part_dataset(model, "decoder", parts, data, 0), data, strict=True):
        arrays = [torch.from_numpy(sample.inputs[spec.name]) for spec in decoder.inputs]
        with torch.no_grad():
            step = decoder.module(*arrays)[0]
            all_at_once = model.module(*(torch.from_numpy(whole.inputs[spec.name]) for spec in model.inputs))
        torch.testing.assert_close(step, all_at_once[:, int(sample.inputs["position"][0])])


def test_positions_spread_over_what_is_there_and_never_reach_padding() -> None:
    samples, data = made(translator(), "decoder", Samples(64)), Samples(64)
    shares = []
    for sample, whole in zip(samples, data, strict=True):
        real = int((whole.inputs["decoder_input_ids"] != PAD).sum())
        position = int(sample.inputs["position"][0])
        assert position < real
        shares.append(position / real)
    assert {0.0} < set(shares)
    assert max(shares) >= 0.75
    assert sum(share < 0.5 for share in shares) == pytest.approx(32, abs=12)


def test_rows_at_once_are_asked_for_where_the_network_has_them() -> None:
    network = TranslatorInRows()
    at_once = made(translator(network), "decoder", Samples(5))
    assert network.asked
    for one, other in zip(at_once, made(translator(), "decoder", Samples(5)), strict=True):
        for name, array in one.inputs.items():
            np.testing.assert_array_equal(array, other.inputs[name])


def test_without_a_target_the_network_writes_its_own() -> None:
    model = translator()
    network = model.module
    assert isinstance(network, Translator)
    written = [3, 3, 3]
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.zero_()
        network.head.bias[3] = 1.0
    samples = made(model, "decoder", Samples(16, has_targets=False))
    positions = {int(sample.inputs["position"][0]) for sample in samples}
    assert max(positions) > len(written)  # it never ends of its own accord: the cache does
    for sample in samples:
        position = int(sample.inputs["position"][0])
        assert sample.inputs["token"].tolist() == [[3 if position else START]]


def test_what_it_must_not_write_it_does_not_write() -> None:
    model = translator()
    network = model.module
    assert isinstance(network, Translator)
    assert model.generation is not None
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.linspace(1, 0, VOCABULARY))
    model = replace(model, generation=replace(model.generation, suppressed_ids=(0, 2), begin_suppressed_ids=(1,)))
    tokens = {int(s.inputs["token"][0, 0]) for s in made(model, "decoder", Samples(16, has_targets=False))}
    assert tokens == {START, 3}  # 1, the end, may come second


def test_a_network_without_start_needs_targets() -> None:
    model = translator()
    assert model.generation is not None
    model = replace(model, generation=replace(model.generation, start_ids=()))
    bare = Sample({**Samples(1)[0].inputs, "decoder_input_ids": _row([PAD, PAD])}, None, "row 0")
    with pytest.raises(DataError, match="has no target, and the network no token to start from"):
        made(model, "decoder", Samples(1, only=bare))


def test_beams_see_the_same() -> None:
    [sample] = made(translator(), "decoder", Samples(1), beams=3)
    assert sample.inputs["token"].shape == (3, 1)
    assert sample.inputs["past_key_0"].shape == (3, 1, TARGET, WIDTH)
    assert sample.inputs["source_mask"].shape == (1, SOURCE)
    assert (sample.inputs["memory_key_0"] == sample.inputs["memory_key_0"][:1]).all()


def test_a_prompt_is_a_beginning_of_the_text() -> None:
    data = Samples(12, "decoder")
    samples = made(continuer(), "prefill", data)
    lengths = []
    for sample, whole in zip(samples, data, strict=True):
        length = int(sample.inputs["length"][0])
        text = whole.inputs["input_ids"][0]
        assert 1 <= length <= (text != PAD).sum()
        assert sample.inputs["input_ids"].shape == (1, SOURCE)
        assert sample.inputs["input_ids"][0, :length].tolist() == text[:length].tolist()
        assert not sample.inputs["input_ids"][0, length:].any()
        lengths.append(length)
    assert len(set(lengths)) > 2


def test_a_decoder_only_network_goes_on_in_the_middle_of_a_text() -> None:
    model, data = continuer(), Samples(12, "decoder")
    network = model.module
    assert isinstance(network, Continuer)
    for sample, whole in zip(made(model, "decoder", data), data, strict=True):
        position = int(sample.inputs["position"][0])
        text = whole.inputs["input_ids"][0]
        assert 1 <= position < (text != PAD).sum()
        assert sample.inputs["token"].tolist() == [[text[position]]]
        rows = network.table(torch.from_numpy(text[:position])).detach().numpy()
        np.testing.assert_array_equal(sample.inputs["past_key_0"][0, 0, :position], rows)
        assert not sample.inputs["past_key_0"][0, 0, position:].any()


def test_the_same_seed_gives_the_same_samples_in_any_order() -> None:
    model, data = translator(), Samples(9)
    parts = split(model)
    one, again, other = (part_dataset(model, "decoder", parts, data, seed) for seed in (1, 1, 2))
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    in_order = [_at(sample) for sample in again]
    assert [_at(one[i]) for i in (8, 0, 3)] == [in_order[i] for i in (8, 0, 3)]
    assert [_at(sample) for sample in one] != [_at(sample) for sample in other]
    assert (len(one), one.is_labelled, one.class_names) == (9, False, ())
    assert len(select(one, 4, seed=0)) == 4
    with pytest.raises(IndexError):
        one[9]


def test_only_samples_of_what_never_changes_are_fixed() -> None:
    """Regression: parts of the user's own data, different at each reading, were taken to be always the same."""
    model, data = translator(), Samples(3)
    parts = split(model)
    known = select(part_dataset(model, "encoder", parts, data, 0), 2, seed=0)
    assert not known.is_fixed
    fixed = Subset(data, [0, 1])
    fixed.is_fixed = True
    assert part_dataset(model, "encoder", parts, fixed, 0).is_fixed


def test_what_changes_at_each_reading_is_told() -> None:
    model = translator()
    samples = list(Samples(2))

    class Drawn(IndexedDataset):
        is_fixed = False
        is_labelled = False
        class_names = ()

        def __len__(self) -> int:
            return 2

        def _load(self, index: int) -> Sample:
            return samples[index]

        def digest_of(self, index: int) -> bytes:
            return bytes([index]) * 32

    fixed = Drawn()
    fixed.is_fixed = True
    for data in (Drawn(), fixed):
        part = part_dataset(model, "encoder", split(model), data, 0)
        assert isinstance(part, IndexedDataset)
        assert part.is_fixed is data.is_fixed


def _at(sample: Sample) -> int:
    return int(sample.inputs["position"][0])


def test_a_part_that_the_network_has_not() -> None:
    model = translator()
    with pytest.raises(UsageError, match=r"has no prefill.*encoder, decoder"):
        part_dataset(model, "prefill", split(model), Samples(1), 0)


def test_a_source_that_is_too_long_names_the_sample() -> None:
    model = translator()
    parts = split(model)
    long = Sample({name: np.ones((1, 9), np.int64) for name in Samples(1)[0].inputs}, None, "row 7")
    with pytest.raises(DataError, match="row 7, input 'input_ids'"):
        part_dataset(model, "encoder", parts, Samples(1, only=long), 0)[0]
