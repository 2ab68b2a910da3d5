"""The loop around a network's parts: reads a source or a prompt once, then writes token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import numpy as np

from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.generation.search import Forced, Replay, Rules, Search, Step, search_for
from edgeopt.generation.writer_buffers import Buffer
from edgeopt.runtimes.base import Session, decode
from edgeopt.sources.generative import is_mask
from edgeopt.types import Array, Generation, PartName, SignatureTensor


@dataclass(frozen=True, slots=True)
class Written:
    """One sequence and what it cost.

    Attributes:
        ids: what was written, the end token included, without what the decoder was started with.
        ended: an end token closed it; False where it was cut at the most tokens allowed.
        reading_ms: of the encoder, or of the prefill.
        first_token_ms: from the source to the first token, reading included.
        token_ms: of each later token: one run of the decoder, its cache's new rows, the choice of the token.
        steps: what the search decided, for `Writer.replay`.
    """

    ids: tuple[int, ...]
    ended: bool
    reading_ms: float
    first_token_ms: float
    token_ms: tuple[float, ...]
    steps: tuple[Step, ...]

    @property
    def total_ms(self) -> float:
        return self.first_token_ms + sum(self.token_ms)


@dataclass(frozen=True, slots=True)
class Scored:
    """What a network thinks of a given text, token by token, where those before it are given.

    Attributes:
        log_likelihoods: natural logarithm of the token's probability.
        choices: the token that it holds to be likeliest.
    """

    log_likelihoods: tuple[float, ...]
    choices: tuple[int, ...]


class Writer:
    """Writes with opened parts. Not thread-safe; the sessions stay the caller's to close.

    Caches are held as the decoder's file takes them. A decoder that was exported for several beams also serves fewer:
    its other rows then repeat the first.

    Attributes:
        cache_bytes: what the loop holds for the decoder: its own keys and values, and those of the source.
    """

    def __init__(
        self,
        sessions: Mapping[PartName, Session],
        generation: Generation,
        beams: int = 1,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> None:
        """Raises UsageError where a part is missing or the decoder has fewer rows than beams, ConversionError where the
        parts' tensors don't belong together."""
        first: PartName = "encoder" if generation.kind == "encoder-decoder" else "prefill"
        for part in (first, "decoder"):
            if part not in sessions:
                raise UsageError(f"has no {part}", where="network that writes", fix=f"it has {', '.join(sessions)}")
        self._first, self._decoder = sessions[first], sessions["decoder"]
        self._generation = generation
        self._beams = beams
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self._buffers = {t.name: Buffer(t) for t in self._decoder.signature.inputs}
        self._feed = {name: buffer.array for name, buffer in self._buffers.items()}
        self._logits = _named(self._decoder, "logits")
        self._rows = self._buffers["token"].view.shape[0] if "token" in self._buffers else 0
        self._memory = [(t, self._paired(t, t.name)) for t in self._first.signature.outputs if _is_memory(t)]
        self._given = [(t, self._paired(t, _past(t))) for t in self._first.signature.outputs if _is_present(t)]
        self._past = [(t, self._paired(t, _past(t))) for t in self._decoder.signature.outputs if _is_present(t)]
        self._mask = next((t for t in self._first.signature.inputs if is_mask(t.name)), None)
        if not 1 <= beams <= self._rows:
            raise UsageError(
                f"its decoder follows {self._rows} sequence{'s'[: self._rows != 1]} at once, not {beams}",
                where="network that writes",
                fix="write with fewer beams, or export it again with num-beams",
            )

    @property
    def reads(self) -> frozenset[str]:
        """Names of what it writes from: the inputs of the encoder, or of the prefill."""
        return frozenset(tensor.name for tensor in self._first.signature.inputs)

    @property
    def cache_bytes(self) -> int:
        return sum(buffer.array.nbytes for _, buffer in (*self._memory, *self._past))

    def write(self, inputs: Mapping[str, Array], max_new: int | None = None) -> Written:
        """Write one sequence.

        Args:
            inputs: of the encoder, or `input_ids` (1, n), n tokens of a prompt. Shorter ones than the file takes are
                padded; without a mask, none of a source is taken to be padding.
            max_new: tokens at most; never more than the cache has rows for.

        Raises:
            DataError: when the source or the prompt is longer than the file takes, or empty.
            ConversionError: when the decoder answers NaN.
        """
        return self._run(inputs, search_for(self._rules(inputs, max_new), self._beams))

    def replay(self, inputs: Mapping[str, Array], written: Written) -> tuple[Written, list[tuple[int, ...]]]:
        """Take the steps of another writer with as many beams: same work, same prefixes. Returns beside the times the
        token that these parts would have chosen, for each step and row. Raises as `write` does."""
        search = Replay(search_for(self._rules(inputs, None), self._beams), written.steps)
        return self._run(inputs, search), search.choices

    def score(self, inputs: Mapping[str, Array], ids: Sequence[int]) -> Scored:
        """How well the network predicts a text's tokens. Raises as `write` does, and DataError where there are no
        tokens or more than the cache has rows for."""
        most = self.most_new(inputs)
        if not 1 <= len(ids) <= most:
            raise DataError(f"has {len(ids)} tokens, the network can write 1 to {most}", where="text to be scored")
        search = Forced(ids)
        choices = tuple(step.choices[0] for step in self._run(inputs, search).steps)
        return Scored(tuple(search.log_likelihoods), choices)

    def most_new(self, inputs: Mapping[str, Array]) -> int:
        """How many tokens there is room for: the last one is written but never read."""
        generation = self._generation
        prompt = len(generation.start_ids) if generation.kind == "encoder-decoder" else _prompt(inputs).shape[1]
        return generation.max_target - prompt + 1

    def decoder_inputs(self) -> dict[str, Array]:
        """What the decoder was last given, in the model's terms; for profiling it."""
        return {t.name: decode(self._feed[t.name], t) for t in self._decoder.signature.inputs}

    def reader_inputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What the encoder or the prefill is given, padded, in the model's terms."""
        if self._generation.kind == "decoder":
            prompt = _prompt(inputs)
            filled = {"input_ids": prompt, "length": np.array([prompt.shape[1]])}
        else:
            filled = {**inputs}
            ids = next((inputs[t.name] for t in self._first.signature.inputs if t.name in inputs), None)
            if self._mask is not None and ids is not None:
                filled.setdefault(self._mask.name, np.ones(ids.shape, np.int64))
        missing = [t.name for t in self._first.signature.inputs if t.name not in filled]
        if missing:
            raise DataError(f"the sample lacks the input {missing[0]!r}", where="data set")
        return {t.name: self._padded(filled[t.name], t) for t in self._first.signature.inputs}

    def _rules(self, inputs: Mapping[str, Array], max_new: int | None) -> Rules:
        room = self.most_new(inputs)
        if room < 1:
            raise DataError(
                f"leaves no room to write: the cache has {self._generation.max_target} rows", where="prompt"
            )
        most = room if max_new is None else min(max_new, room)
        return Rules.of(self._generation, most, self._length_penalty, self._early_stopping)

    def _run(self, inputs: Mapping[str, Array], search: Search) -> Written:
        start = perf_counter()
        logits, position, reading_ms = self._read(inputs)
        times, steps = [], []
        while True:
            step = search.advance(logits[: search.width])
            steps.append(step)
            times.append(perf_counter())
            if search.done:
                break
            # Rows that are not in use repeat the first, so that a scale taken over the whole batch is the first's own.
            # Where all of them do, they all read the same tokens anyway.
            parents = (*step.parents, *(self._rows - search.width) * step.parents[:1])
            if search.width > 1 and parents != tuple(range(self._rows)):
                for _, buffer in self._past:
                    buffer.reorder(parents, position)
            logits = self._decode(step.tokens, position)
            position += 1
        later = tuple(1e3 * (after - before) for before, after in pairwise(times))
        ended = bool(search.ids) and search.ids[-1] in self._generation.end_ids
        return Written(search.ids, ended, reading_ms, 1e3 * (times[0] - start), later, tuple(steps))

    def _read(self, inputs: Mapping[str, Array]) -> tuple[Array, int, float]:
        """Run the first part and whatever starts the decoder: the scores of the first token, the next position."""
        start = perf_counter()
        filled = self.reader_inputs(inputs)
        # What an earlier sequence left there is masked, but ranges that a runtime takes of the whole would see it.
        for _, buffer in self._past:
            buffer.clear()
        given = self._first.run_native(self._first.encode(filled))
        for tensor, buffer in self._memory:
            buffer.take(given[tensor.name], tensor)
        reading_ms = 1e3 * (perf_counter() - start)
        if self._generation.kind == "decoder":
            length = int(filled["length"][0])
            rows = (slice(None), slice(None), slice(0, length))
            for tensor, buffer in self._given:
                buffer.take(given[tensor.name], tensor, part=rows, where=rows)
            logits = _answer(given["logits"], _named(self._first, "logits"), "prefill")
            return np.broadcast_to(logits, (self._rows, logits.shape[1])), length, reading_ms
        if self._mask is not None and "source_mask" in self._buffers:
            self._buffers["source_mask"].set(filled[self._mask.name])
        for position, token in enumerate(self._generation.start_ids):
            logits = self._decode((token,), position)
        return logits, len(self._generation.start_ids), reading_ms

    def _decode(self, tokens: Sequence[int], position: int) -> Array:
        """Let the decoder read one token per beam; its new rows join the cache. Returns (rows, vocabulary)."""
        token = self._buffers["token"].view
        token[:] = tokens[0]
        token[: len(tokens), 0] = tokens
        if "position" in self._buffers:
            self._buffers["position"].set(position)
        given = self._decoder.run_native(self._feed)
        row = (slice(None), slice(None), slice(position, position + 1))
        for tensor, buffer in self._past:
            buffer.take(given[tensor.name], tensor, where=row)
        return _answer(given["logits"], self._logits, "decoder")

    def _padded(self, values: Array, tensor: SignatureTensor) -> Array:
        """Filled up to the length that the file fixes, with the padding token or, in masks and signals, with 0."""
        wanted = _model_shape(tensor)
        if values.ndim != len(wanted):
            raise DataError(
                f"has {values.ndim} dimensions, the network takes {len(wanted)}", where=f"input {tensor.name!r}"
            )
        if values.size == 0:
            raise DataError("is empty", where=f"input {tensor.name!r}")
        for given, size in zip(values.shape, wanted, strict=True):
            if given > size:
                raise DataError(
                    f"is {given} long, the exported file takes {size}",
                    where=f"input {tensor.name!r}",
                    fix="shorten the text, or export with a larger max-source-length",
                )
        missing = [(0, size - given) for given, size in zip(values.shape, wanted, strict=True)]
        is_ids = values.dtype.kind in "iu" and tensor is not self._mask
        return np.pad(values, missing, constant_values=self._generation.pad_id if is_ids else 0)

    def _paired(self, tensor: SignatureTensor, name: str) -> Buffer:
        if name not in self._buffers:
            raise ConversionError(f"gives {tensor.name!r}, but the decoder takes no {name!r}", where="parts")
        return self._buffers[name]


def _prompt(inputs: Mapping[str, Array]) -> Array:
    """The one input of a decoder-only network, whatever its author called it."""
    if len(inputs) != 1 and "input_ids" not in inputs:
        raise DataError("the sample lacks the input 'input_ids'", where="data set")
    return inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values()))


def _is_memory(tensor: SignatureTensor) -> bool:
    return tensor.name.startswith("memory_")


def _is_present(tensor: SignatureTensor) -> bool:
    return tensor.name.startswith("present_")


def _past(tensor: SignatureTensor) -> str:
    return tensor.name.replace("present_", "past_", 1)


def _named(session: Session, name: str) -> SignatureTensor:
    found = next((t for t in session.signature.outputs if t.name == name), None)
    if found is None:
        raise ConversionError(f"has no output {name!r}", where="decoder")
    return found


def _model_shape(tensor: SignatureTensor) -> tuple[int, ...]:
    native = [int(size) for size in tensor.shape]
    if tensor.permutation is None:
        return tuple(native)
    return tuple(native[axis] for axis in np.argsort(tensor.permutation))


def _answer(values: Array, tensor: SignatureTensor, part: str) -> Array:
    """Scores as float32. NaN is refused: the likeliest of such scores means nothing."""
    logits = decode(values, tensor)
    if np.isnan(logits.max()):
        raise ConversionError("answers NaN: its weights or its arithmetic are broken", where=part)
    return logits.astype(np.float32, copy=False)
