from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.generation.search import Beam, Greedy, Rules
from edgeopt.generation.writer import Writer
from edgeopt.runtimes.base import Session, dequantize, quantize
from edgeopt.types import Array, Generation, PartName, QuantParams, Signature, SignatureTensor

VOCABULARY, SOURCE, ROWS, END, START, PAD = 20, 6, 9, 0, 1, 2
TRANSLATES = Generation("encoder-decoder", "translation", VOCABULARY, (START,), (END,), PAD, SOURCE, ROWS, 1)
CONTINUES = Generation("decoder", "text-generation", VOCABULARY, (), (END,), PAD, SOURCE, ROWS, 1)


def tensor(name: str, shape: tuple[int, ...], dtype: str = "float32", **more: object) -> SignatureTensor:
    model_dtype = "float32" if dtype in ("int8", "float16") else dtype
    return SignatureTensor(name, name, shape, dtype, model_dtype, **more)


def scores_of(source: tuple[int, ...], read: tuple[int, ...], seed: int = 0) -> Array:
    """What the toy network answers: it depends on all that was read."""
    return np.random.default_rng([seed, *source, 99, *read]).normal(0, 2, VOCABULARY).astype(np.float32)


class Toy(Session):
    """A part in NumPy. Its cache holds the tokens read, its memory those of the source, as the tensors of a file do:
    whoever loses, swaps or forgets a row gets other scores."""

    def __init__(self, signature: Signature, seed: int = 0) -> None:
        super().__init__(signature)
        self.seed = seed
        self.runs = 0

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for t in self.signature.inputs:
            assert inputs[t.name].shape == t.shape, t.name
            assert inputs[t.name].dtype == t.dtype, t.name
            assert inputs[t.name].flags.c_contiguous, t.name
        self.runs += 1
        given = {t.name: _to_model(inputs[t.name], t) for t in self.signature.inputs}
        answer = self.answer(given)
        return {t.name: _to_file(answer[t.name], t) for t in self.signature.outputs}

    def answer(self, given: Mapping[str, Array]) -> dict[str, Array]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _to_model(values: Array, t: SignatureTensor) -> Array:
    values = dequantize(values, t.quantization) if t.quantization else values
    return values.transpose(np.argsort(t.permutation)) if t.permutation else values


def _to_file(values: Array, t: SignatureTensor) -> Array:
    values = values.transpose(t.permutation) if t.permutation else values
    return quantize(values, t.quantization, t.dtype) if t.quantization else values.astype(t.dtype)


class Encoder(Toy):
    def answer(self, given: Mapping[str, Array]) -> dict[str, Array]:
        memory = given["input_ids"].reshape(1, 1, SOURCE, 1).astype(np.float32)
        return {"memory_key_0": memory, "memory_value_0": memory}


class Prefill(Toy):
    def answer(self, given: Mapping[str, Array]) -> dict[str, Array]:
        length = int(given["length"][0])
        read = tuple(given["input_ids"][0, :length].tolist())
        rows = given["input_ids"].reshape(1, 1, SOURCE, 1).astype(np.float32)
        logits = scores_of((), read, self.seed)[None]
        return {"logits": logits, "present_key_0": rows, "present_value_0": rows + 1}


class Decoder(Toy):
    def answer(self, given: Mapping[str, Array]) -> dict[str, Array]:
        position = int(given["position"][0])
        logits = []
        for row, token in enumerate(given["token"][:, 0].tolist()):
            past = np.rint(given["past_key_0"][row, 0, :position, 0]).astype(int).tolist()
            values = np.rint(given["past_value_0"][row, 0, :position, 0]).astype(int)
            assert (values - 1).tolist() == past
            source = ()
            if "memory_key_0" in given:
                mask = given["source_mask"][0].astype(bool)
                source = tuple(np.rint(given["memory_key_0"][row, 0, mask, 0]).astype(int).tolist())
            logits.append(scores_of(source, (*past, token), self.seed))
        rows = given["token"].reshape(-1, 1, 1, 1).astype(np.float32)
        return {"logits": np.stack(logits), "present_key_0": rows, "present_value_0": rows + 1}


def decoder_signature(beams: int, memory: bool, past: dict[str, object], present: dict[str, object]) -> Signature:
    inputs = [tensor("token", (beams, 1), "int64"), tensor("position", (1,), "int64")]
    if memory:
        inputs.append(tensor("source_mask", (1, SOURCE), "int64"))
        inputs += [tensor(f"memory_{kind}_0", (beams, 1, SOURCE, 1)) for kind in ("key", "value")]
    shape = (beams, 1, ROWS, 1)
    if "permutation" in past:
        shape = tuple(shape[axis] for axis in past["permutation"])
    inputs += [tensor(f"past_{kind}_0", shape, **past) for kind in ("key", "value")]
    outputs = [tensor("logits", (beams, VOCABULARY))]
    outputs += [tensor(f"present_{kind}_0", (beams, 1, 1, 1), **present) for kind in ("key", "value")]
    return Signature(tuple(inputs), tuple(outputs))


def translator(
    beams: int = 1, seed: int = 0, past: dict[str, object] | None = None, present: dict[str, object] | None = None
) -> dict[PartName, Session]:
    ids, mask = tensor("input_ids", (1, SOURCE), "int64"), tensor("attention_mask", (1, SOURCE), "int64")
    memory = tuple(tensor(f"memory_{kind}_0", (1, 1, SOURCE, 1)) for kind in ("key", "value"))
    decoder = Decoder(decoder_signature(beams, True, past or {}, present or {}), seed)
    return {"encoder": Encoder(Signature((ids, mask), memory)), "decoder": decoder}


def continuer(beams: int = 1) -> dict[PartName, Session]:
    inputs = (tensor("input_ids", (1, SOURCE), "int64"), tensor("length", (1,), "int64"))
    rows = tuple(tensor(f"present_{kind}_0", (1, 1, SOURCE, 1)) for kind in ("key", "value"))
    prefill = Prefill(Signature(inputs, (tensor("logits", (1, VOCABULARY)), *rows)))
    return {"prefill": prefill, "decoder": Decoder(decoder_signature(beams, False, {}, {}))}


def expected(source: tuple[int, ...], start: tuple[int, ...], rules: Rules, beams: int) -> tuple[int, ...]:
    """The same search without any cache."""
    search = Greedy(rules) if beams == 1 else Beam(rules, beams)
    sequences = [start] * search.width
    while True:
        step = search.advance(np.stack([scores_of(source, sequence) for sequence in sequences]))
        if search.done:
            return search.ids
        sequences = [(*sequences[p], token) for token, p in zip(step.tokens, step.parents, strict=True)]


def source_of(*ids: int) -> dict[str, Array]:
    return {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}


SOURCES = [(3, 4, 5), (7,), (8, 9, 10, 11, 12, 13), (5, 5, 5, 6)]


@pytest.mark.parametrize(("rows", "beams"), [(1, 1), (4, 4), (4, 1), (4, 3)])
def test_writes_what_a_loop_without_caches_writes(rows: int, beams: int) -> None:
    writer = Writer(translator(rows), TRANSLATES, beams)
    rules = Rules.of(TRANSLATES, ROWS)
    for source in SOURCES:
        written = writer.write(source_of(*source))
        assert written.ids == expected(source, (START,), rules, beams)
        assert written.ended == (written.ids[-1] == END)


@pytest.mark.parametrize(("rows", "beams"), [(1, 1), (3, 3)])
def test_continues_a_prompt(rows: int, beams: int) -> None:
    writer = Writer(continuer(rows), CONTINUES, beams)
    for prompt in SOURCES:
        rules = Rules.of(CONTINUES, ROWS - len(prompt) + 1)
        assert writer.write({"input_ids": np.array([prompt])}).ids == expected((), prompt, rules, beams)


QUANTIZED = {"dtype": "int8", "quantization": QuantParams((0.25,), (-100,))}
OTHERWISE = {"dtype": "int8", "quantization": QuantParams((0.2,), (-110,))}


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ({"permutation": (0, 2, 3, 1)}, {"permutation": (0, 2, 3, 1)}),
        ({"permutation": (0, 2, 3, 1)}, {}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        (QUANTIZED, QUANTIZED),
        (QUANTIZED, OTHERWISE),
        (QUANTIZED, {}),
        ({}, QUANTIZED),
        (QUANTIZED | {"permutation": (0, 2, 3, 1)}, OTHERWISE | {"permutation": (0, 2, 3, 1)}),
    ],
)
def test_caches_in_whatever_form_the_file_takes_them(past: dict, present: dict) -> None:
    writer = Writer(translator(3, past=past, present=present), TRANSLATES, 3)
    rules = Rules.of(TRANSLATES, ROWS)
    for source in SOURCES[:2]:
        assert writer.write(source_of(*source)).ids == expected(source, (START,), rules, 3)


def test_a_cache_of_bytes_is_not_converted() -> None:
    writer = Writer(translator(past=QUANTIZED, present=QUANTIZED), TRANSLATES)
    assert writer.cache_bytes == 2 * ROWS + 2 * SOURCE * 4


def test_no_more_tokens_than_the_cache_has_rows() -> None:
    """The last token is written and never read, so there may be one more than rows."""
    endless = replace(TRANSLATES, suppressed_ids=(END,))
    sessions = translator()
    written = Writer(sessions, endless).write(source_of(3))
    assert len(written.ids) == ROWS
    assert not written.ended
    assert sessions["decoder"].runs == ROWS
    assert len(written.token_ms) == ROWS - 1
    assert len(Writer(translator(), endless).write(source_of(3), max_new=4).ids) == 4


def test_several_start_tokens_are_read_in_turn() -> None:
    whisper = replace(TRANSLATES, start_ids=(START, 5, 6))
    rules = Rules.of(whisper, ROWS - 2)
    assert Writer(translator(2), whisper, 2).write(source_of(3)).ids == expected((3,), (START, 5, 6), rules, 2)


def test_suppressed_tokens() -> None:
    plain = Writer(translator(), TRANSLATES).write(source_of(3)).ids
    limited = replace(TRANSLATES, suppressed_ids=plain[1:2], begin_suppressed_ids=plain[:1])
    ids = Writer(translator(), limited).write(source_of(3)).ids
    assert ids[0] != plain[0]
    assert plain[1] not in ids


def test_replay_does_the_same_work() -> None:
    own, other = Writer(translator(4), TRANSLATES, 4), Writer(translator(4, seed=1), TRANSLATES, 4)
    written = own.write(source_of(3, 4))
    again, choices = own.replay(source_of(3, 4), written)
    assert again.steps == written.steps
    assert choices == [step.choices for step in written.steps]
    elsewhere, differing = other.replay(source_of(3, 4), written)
    assert elsewhere.steps == written.steps
    assert differing != choices


def test_log_likelihoods_of_a_text() -> None:
    text = (4, 7, END)
    found = Writer(translator(2), TRANSLATES, 2).score(source_of(3, 4), text)
    for length, (token, value) in enumerate(zip(text, found.log_likelihoods, strict=True)):
        scores = scores_of((3, 4), (START, *text[:length])).astype(np.float64)
        assert value == pytest.approx(scores[token] - np.log(np.exp(scores).sum()), abs=1e-5)
        assert found.choices[length] == scores.argmax()


def test_a_sample_without_a_mask_has_no_padding() -> None:
    ids = {"input_ids": np.array([[3, 4, 5]])}
    writer = Writer(translator(), TRANSLATES)
    assert writer.write(ids).ids == writer.write(source_of(3, 4, 5)).ids


def test_too_long_a_source_is_refused() -> None:
    line = "input 'input_ids': is 7 long, the exported file takes 6; shorten the text, or export with a larger"
    with pytest.raises(DataError, match=line):
        Writer(translator(), TRANSLATES).write(source_of(*range(3, 10)))
    with pytest.raises(DataError, match="is 7 long"):
        Writer(continuer(), CONTINUES).write({"input_ids": np.arange(3, 10)[None]})


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="input 'input_ids': is empty"):
        Writer(translator(), TRANSLATES).write(source_of())


def test_a_prompt_that_fills_the_cache() -> None:
    with pytest.raises(DataError, match="leaves no room to write: the cache has 4 rows"):
        Writer(continuer(), replace(CONTINUES, max_target=4)).write({"input_ids": np.arange(3, 9)[None]})


def test_too_long_a_text_to_be_scored() -> None:
    with pytest.raises(DataError, match="has 10 tokens, the network can write 1 to 9"):
        Writer(translator(), TRANSLATES).score(source_of(3), range(10))


@pytest.mark.parametrize(("network", "generation"), [(translator, TRANSLATES), (continuer, CONTINUES)])
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_that_are_not_in_use_are_the_first_ones_equals(
    network: Callable[[int], dict[PartName, Session]], generation: Generation, beams: int
) -> None:
    """A runtime that takes one scale of the whole batch would see what they hold."""
    sessions = network(4)
    decoder, seen = sessions["decoder"], []
    assert isinstance(decoder, Decoder)
    answer = decoder.answer

    def watched(given: Mapping[str, Array]) -> dict[str, Array]:
        batched = [values for name, values in given.items() if name == "token" or name.startswith("past_")]
        seen.append(all(np.array_equal(values[row], values[0]) for values in batched for row in range(beams, 4)))
        return answer(given)

    decoder.answer = watched  # type: ignore[method-assign]
    inputs = source_of(5, 6) if generation is TRANSLATES else {"input_ids": np.array([[5, 6]])}
    Writer(sessions, generation, beams).write(inputs)
    assert len(seen) > 1
    assert all(seen)


def test_a_sample_without_any_source() -> None:
    with pytest.raises(DataError, match="the sample lacks the input 'input_ids'"):
        Writer(translator(), TRANSLATES).write({"decoder_input_ids": np.array([[START]])})


def test_more_beams_than_rows() -> None:
    with pytest.raises(UsageError, match="follows 2 sequences at once, not 4; write with fewer beams, or"):
        Writer(translator(2), TRANSLATES, 4)


def test_a_missing_part() -> None:
    with pytest.raises(UsageError, match="has no decoder; it has encoder"):
        Writer({"encoder": translator()["encoder"]}, TRANSLATES)


def test_parts_that_do_not_belong_together() -> None:
    parts = translator()
    inputs = tuple(t for t in parts["decoder"].signature.inputs if t.name != "memory_value_0")
    parts["decoder"].signature = replace(parts["decoder"].signature, inputs=inputs)
    with pytest.raises(ConversionError, match="gives 'memory_value_0', but the decoder takes no 'memory_value_0'"):
        Writer(parts, TRANSLATES)


def test_nan_is_refused() -> None:
    class Broken(Decoder):
        def answer(self, given: Mapping[str, Array]) -> dict[str, Array]:
            return super().answer(given) | {"logits": np.full((1, VOCABULARY), np.nan, np.float32)}

    parts = translator()
    parts["decoder"] = Broken(parts["decoder"].signature)
    with pytest.raises(ConversionError, match="decoder: answers NaN"):
        Writer(parts, TRANSLATES).write(source_of(3))
