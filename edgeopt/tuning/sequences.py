"""Sequence-level distillation: a generator learns from what its teacher writes (Kim and Rush 2016).

The teacher continues every training prompt, always with its likeliest token; the student is trained with cross-entropy
on the result. The teacher writes once: its sequences are kept in a file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from edgeopt.compression.base import forward, state_digest
from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Array, Model, Sample, TensorSpec

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

#: Share of a training sequence that a causal language model is given to continue.
PROMPT = 0.25
#: A position that no loss counts.
SKIPPED = -100
#: Training samples whose last tokens tell how a sequence ends.
_LOOKED_AT = 64
#: Columns of the file before the tokens: where the teacher began to write, and where it stopped.
_BOUNDS = 2

_EXPECTED = (
    "give a causal language model (token ids (batch, length) -> scores (batch, length, tokens)), or an "
    "encoder-decoder with an input called decoder_input_ids"
)


@dataclass(frozen=True, slots=True)
class Generator:
    """How a model is made to write.

    Attributes:
        tokens: name of the input that holds what is written so far.
        mask: name of the input that marks it, 1 for tokens; None where there is none.
        scores: place of the output (batch, length, tokens) with the next token at each position.
        is_decoder: the prompt is in other inputs, and writing starts after the first token.
    """

    tokens: str
    mask: str | None
    scores: int
    is_decoder: bool


def generator_of(model: Model) -> Generator:
    """Recognise a generator by its signature, and try it on its example input.

    Raises UsageError saying what was expected where it is none, or where a later token changes earlier scores.
    """
    integers = [spec for spec in model.inputs if spec.dtype in ("int32", "int64") and len(spec.shape) == 2]
    decoder = [spec for spec in integers if re.fullmatch(r"decoder_(input_)?(ids|tokens)", spec.name)]
    masks = [spec for spec in integers if "mask" in spec.name]
    if decoder:
        tokens = decoder[0]
        mask = next((spec.name for spec in masks if "decoder" in spec.name and "cross" not in spec.name), None)
    else:
        words = [spec for spec in integers if spec not in masks]
        if len(words) != 1 or len(words) + len(masks) != len(model.inputs) or len(masks) > 1:
            raise _no_generator(model, f"its inputs are {', '.join(spec.name for spec in model.inputs)}")
        tokens, mask = words[0], masks[0].name if masks else None
    return Generator(tokens.name, mask, _place_of_scores(model, tokens), bool(decoder))


def _place_of_scores(model: Model, tokens: TensorSpec) -> int:
    arrays = {name: array.copy() for name, array in model.example_inputs.items()}
    ids = arrays[tokens.name]
    outputs = forward(model, arrays)
    shapes = [tuple(output.shape) for output in outputs]
    place = next(
        (i for i, output in enumerate(outputs) if output.is_floating_point() and shapes[i][:-1] == ids.shape), None
    )
    if place is None:
        raise _no_generator(model, f"for tokens {ids.shape} it gives {', '.join(map(str, shapes))}")
    length = ids.shape[1]
    if length < 2:
        raise _no_generator(model, "its example input has a single token")
    ids[:, -1] = (ids[:, -1] + 1) % shapes[place][-1]
    early, later = (scores[place][:, : length - 1] for scores in (outputs, forward(model, arrays)))
    if bool(((early - later).abs() > 1e-3 * early.abs().max()).any()):
        raise _no_generator(model, "a token changes the scores of those before it")
    return place


def _no_generator(model: Model, why: str) -> UsageError:
    return UsageError(f"is no generator: {why}", where=f"sequence-level: {model.name}", fix=_EXPECTED)


def teacher_sequences(teacher: Model, data: Dataset, folder: Path, batch_size: int, progress: Progress) -> Dataset:
    """The data with the teacher's own continuations for their sequences and labels, written now or read from `folder`.

    Args:
        folder: holds one file per teacher and data set; made when needed.
        batch_size: sequences that the teacher continues at a time, where it takes batches.

    Raises:
        UsageError: the teacher is no generator.
        DataError: a sample lacks an input or has nothing to continue.
    """
    if teacher.generation is not None and teacher.generation.kind == "encoder-decoder":
        return _written_by_cache(teacher, data, folder, batch_size, progress)
    generator = generator_of(teacher)
    if teacher.module is None:
        raise ValueError("generator_of runs the module")
    key = hashlib.sha256(
        repr((generator, PROMPT, state_digest(teacher.module), data.fingerprint())).encode()
    ).hexdigest()
    path = folder / f"sequences-{key[:16]}.npz"
    rows = _read(path, len(data))
    if rows is None:
        end = _end_token(data)
        written = _write_all(teacher, generator, data, end, batch_size, progress)
        rows = _stacked(written, len(data))
        _save(path, rows)
    return TeacherSequences(data, generator, rows)


def _written_by_cache(teacher: Model, data: Dataset, folder: Path, batch_size: int, progress: Progress) -> Dataset:
    """The same by a teacher that can write token by token."""
    from edgeopt.tuning.written_targets import WrittenTargets, written_targets

    if teacher.module is None:
        raise ValueError("a teacher needs a torch module; see sources.as_torch")
    parts = (teacher.generation, state_digest(teacher.module), data.fingerprint(), len(data))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    path = folder / f"targets-{key[:16]}.bin"
    return WrittenTargets(data, teacher, written_targets(teacher, data, path, batch_size, progress))


class TeacherSequences(IndexedDataset):
    """Samples whose tokens the teacher wrote, labelled with the next token at each position; prompt and padding have
    the label -100, which no loss counts.

    Args:
        data: where prompts come from.
        rows: int32 (samples, 2 + length): where the teacher began and stopped, and the tokens.
    """

    def __init__(self, data: Dataset, generator: Generator, rows: Array) -> None:
        self._data = data
        self._generator = generator
        self._rows = rows
        self.is_sequential = isinstance(data, IndexedDataset) and data.is_sequential
        self.is_fixed = isinstance(data, IndexedDataset) and data.is_fixed

    @property
    def is_labelled(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self._rows)

    def _load(self, index: int) -> Sample:
        return self._written(self._data[index], self._rows[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self._written(sample, row) for sample, row in zip(self._data, self._rows, strict=True))

    def digest_of(self, index: int) -> bytes:
        known = self._data.digest_of(index) if isinstance(self._data, IndexedDataset) else str(index).encode()
        return hashlib.sha256(known + self._rows[index].tobytes()).digest()

    def fingerprint(self) -> str:
        whole = hashlib.sha256(self._data.fingerprint().encode())
        whole.update(np.ascontiguousarray(self._rows).tobytes())
        return whole.hexdigest()

    def _written(self, sample: Sample, row: Array) -> Sample:
        generator = self._generator
        start, stop = int(row[0]), int(row[1])
        given = sample.inputs[generator.tokens]
        # One token more than the input has places for: the last is only ever a label.
        ids = row[_BOUNDS : _BOUNDS + given.shape[1] + 1]
        length = len(ids) - 1
        label = np.full(length, SKIPPED, np.int64)
        label[start - 1 : stop - 1] = ids[start:stop]
        inputs = dict(sample.inputs)
        inputs[generator.tokens] = ids[:length].astype(given.dtype)[np.newaxis]
        if generator.mask is not None:
            marked = np.arange(length) < stop
            inputs[generator.mask] = marked.astype(sample.inputs[generator.mask].dtype)[np.newaxis]
        return replace(sample, inputs=inputs, label=label)


@dataclass(slots=True)
class _Draft:
    """One sequence as it is written: (length + 1) tokens, of which [start, stop) are the teacher's."""

    sample: Sample
    ids: Array
    start: int
    stop: int
    limit: int
    is_finished: bool = False


def _write_all(
    teacher: Model, generator: Generator, data: Dataset, end: int | None, batch_size: int, progress: Progress
) -> Iterator[Array]:
    samples = progress.track(data, "The teacher writes", len(data))
    batched = _takes_batches(teacher, generator)
    while group := list(islice(samples, batch_size if batched else 1)):
        # Sequences of one length are continued together; others have groups of their own.
        by_shape: dict[tuple[tuple[int, ...], ...], list[_Draft]] = {}
        drafts = [_draft(generator, sample) for sample in group]
        for draft in drafts:
            shapes = tuple(array.shape for _, array in sorted(draft.sample.inputs.items()))
            by_shape.setdefault(shapes, []).append(draft)
        for alike in by_shape.values():
            _continue(teacher, generator, alike, end)
        for draft in drafts:
            yield np.concatenate([np.asarray([draft.start, draft.stop]), draft.ids]).astype(np.int32)


def _draft(generator: Generator, sample: Sample) -> _Draft:
    if generator.tokens not in sample.inputs:
        raise DataError(f"lacks the input {generator.tokens!r}", where=f"training sample {sample.name!r}")
    given = sample.inputs[generator.tokens][0]
    length = len(given)
    ids = np.zeros(length + 1, np.int64)
    if generator.is_decoder:
        start, limit = 1, length + 1
    else:
        marked = sample.inputs[generator.mask][0] if generator.mask is not None else np.ones(length)
        start, limit = max(1, int(marked.sum() * PROMPT)), length
        if length < 2 or not marked[:start].all():
            problem = "has nothing to continue" if length < 2 else "does not begin with its tokens"
            raise DataError(
                problem, where=f"training sample {sample.name!r}", fix="give whole sequences, padded at the end"
            )
    ids[:start] = given[:start]
    return _Draft(sample, ids, start, start, limit)


def _continue(teacher: Model, generator: Generator, drafts: list[_Draft], end: int | None) -> None:
    """Write token by token until all have ended. A draft that is ahead waits: its place is computed again."""
    for stop in range(min(draft.stop for draft in drafts), max(draft.limit for draft in drafts)):
        open_ = [draft for draft in drafts if draft.stop == stop < draft.limit and not draft.is_finished]
        if not open_:
            continue
        scores = forward(teacher, _batch(generator, open_))[generator.scores]
        for draft, token in zip(open_, scores[:, stop - 1].argmax(-1).tolist(), strict=True):
            draft.ids[stop] = token
            draft.stop = stop + 1
            draft.is_finished = token == end


def _batch(generator: Generator, drafts: list[_Draft]) -> dict[str, Array]:
    inputs: dict[str, list[Array]] = {name: [] for name in drafts[0].sample.inputs}
    for draft in drafts:
        for name, array in draft.sample.inputs.items():
            if name == generator.tokens:
                array = draft.ids[:-1].astype(array.dtype)[np.newaxis]
            elif name == generator.mask:
                array = (np.arange(array.shape[1]) < draft.stop).astype(array.dtype)[np.newaxis]
            inputs[name].append(array)
    return {name: np.concatenate(arrays) for name, arrays in inputs.items()}


def _takes_batches(teacher: Model, generator: Generator) -> bool:
    """Whether two samples at once give what one gives twice."""
    arrays = dict(teacher.example_inputs)
    doubled = {name: np.concatenate([array, array]) for name, array in arrays.items()}
    single = forward(teacher, arrays)[generator.scores]
    try:
        both = forward(teacher, doubled)[generator.scores]
    except Exception:  # a fixed batch size shows in whatever error the operator that trips over it has
        return False
    rows = len(single)
    return len(both) == 2 * rows and bool(((both[rows:] - single).abs() <= 1e-3 * single.abs().max()).all())


def _end_token(data: Dataset) -> int | None:
    """The token that labelled sequences end with, if they agree on one: the teacher stops there too."""
    last: set[int] = set()
    for sample in islice(data, _LOOKED_AT):
        if not isinstance(sample.label, np.ndarray) or sample.label.dtype.kind not in "iu":
            return None
        counted = sample.label[sample.label >= 0]
        last |= {int(counted[-1])} if counted.size else set()
    return last.pop() if len(last) == 1 else None


def _stacked(rows: Iterator[Array], count: int) -> Array:
    """(count, longest); shorter rows are padded with zeros."""
    found = list(rows)
    table = np.zeros((count, max(map(len, found))), np.int32)
    for row, target in zip(found, table, strict=True):
        target[: len(row)] = row
    return table


def _read(path: Path, count: int) -> Array | None:
    """The rows of an earlier run; None where there is no file that holds them."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            rows: Array = file["rows"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    fits = rows.ndim == 2 and rows.dtype == np.int32 and len(rows) == count and rows.shape[1] > _BOUNDS
    return rows if fits else None


def _save(path: Path, rows: Array) -> None:
    """Beside and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        partial = Path(scratch) / path.name
        np.savez_compressed(partial, rows=rows)
        partial.replace(path)
