"""Targets that a teacher with encoder and decoder writes for the sources of a data set, many at a time.

It writes token by token through `encode` and `decode` (see `edgeopt.sources.generative`), always the likeliest one.
Sources of about equal length share a batch. What is written is kept after every batch, so that a killed run goes on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.datasets.sequences import given_target
from edgeopt.errors import DataError
from edgeopt.sources.generative import Encodes, cache_shapes, encodes, is_mask, writer_of
from edgeopt.training.loop import frozen_copy
from edgeopt.training.padding import stack
from edgeopt.types import Array, Generation, Model, Sample, TensorSpec

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

#: Rows by which the cache grows; a longer one costs time in every step.
_ROWS = 16
#: Sources that are written for together and alone, to see whether that is the same.
_COMPARED = 3
_TOLERANCE = 1e-3
#: Share of the rows of a batch that may have ended before the others go on without them.
_ENDED = 0.25


class WrittenTargets(IndexedDataset):
    """A data set's sources with the targets that a teacher wrote for them.

    Args:
        data: where the sources come from.
        teacher: who wrote. targets: for each sample its tokens, with the one that ends it.
    """

    def __init__(self, data: Dataset, teacher: Model, targets: Sequence[Array]) -> None:
        self._data = data
        self._decoder = teacher.inputs[-1:]
        self._start = _generation_of(teacher).start_ids
        self._targets = targets
        self.is_sequential = isinstance(data, IndexedDataset) and data.is_sequential
        self.is_fixed = isinstance(data, IndexedDataset) and data.is_fixed

    @property
    def is_labelled(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[Sample]:
        return (self._taught(sample, target) for sample, target in zip(self._data, self._targets, strict=True))

    def _load(self, index: int) -> Sample:
        return self._taught(self._data[index], self._targets[index])

    def digest_of(self, index: int) -> bytes:
        known = self._data.digest_of(index) if isinstance(self._data, IndexedDataset) else str(index).encode()
        return hashlib.sha256(known + self._targets[index].tobytes()).digest()

    def fingerprint(self) -> str:
        whole = hashlib.sha256(self._data.fingerprint().encode())
        for target in self._targets:
            whole.update(hashlib.sha256(target.tobytes()).digest())
        return whole.hexdigest()

    def _taught(self, sample: Sample, target: Array) -> Sample:
        decoder, label = given_target(self._decoder, self._start, target.tolist())
        return replace(sample, inputs={**sample.inputs, **decoder}, label=label)


def written_targets(teacher: Model, data: Dataset, path: Path, batch_size: int, progress: Progress) -> list[Array]:
    """What the teacher writes for each sample of the data, int32 tokens with the one that ends them.

    Args:
        teacher: an encoder-decoder with `generation`.
        path: file that keeps what was written; it belongs to this teacher and these data alone.

    Raises:
        UsageError: the teacher can't be run token by token.
        DataError: a sample lacks an input.
    """
    known = _read(path, len(data))
    if len(known) < len(data):
        known = _go_on(teacher, data, path, batch_size, progress, known)
    return [known[index] for index in range(len(data))]


def _go_on(
    teacher: Model, data: Dataset, path: Path, batch_size: int, progress: Progress, known: dict[int, Array]
) -> dict[int, Array]:
    """Write what is not known yet."""
    assert teacher.module is not None
    generation, encoder = _generation_of(teacher), teacher.inputs[:-1]
    lengths = [_length(sample, encoder) for sample in progress.track(data, "Reading the sources", len(data))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = frozen_copy(teacher.module).to(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream, torch.inference_mode():
        scribe = _Scribe(encodes(writer_of(module, generation)), generation, encoder, device)
        order = sorted((index for index in range(len(data)) if index not in known), key=lengths.__getitem__)
        # The longest come first: what doesn't fit into memory is told at once.
        order.reverse()
        if not scribe.takes_batches([data[index] for index in order[:_COMPARED]]):
            batch_size = 1
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for batch in progress.track(batches, "The teacher writes", len(batches)):
            written = scribe.write([data[index] for index in batch])
            for index, ids in zip(batch, written, strict=True):
                known[index] = np.asarray(ids, np.int32)
                stream.write(np.asarray([index, len(ids), *ids], np.int32).tobytes())
            stream.flush()
    return known


@dataclass(frozen=True, slots=True)
class _Scribe:
    """Writes for a batch of samples."""

    writer: Encodes
    generation: Generation
    encoder: tuple[TensorSpec, ...]
    device: torch.device

    def write(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The tokens of each, with the one that ends it."""
        generation = self.generation
        page = self._opened(samples)
        written: list[list[int]] = [[] for _ in samples]
        rows = torch.arange(len(samples), device=self.device)
        ended = torch.zeros(len(samples), dtype=torch.bool, device=self.device)
        ends = torch.tensor(generation.end_ids, device=self.device)
        most = generation.max_target - len(generation.start_ids) + 1
        for count in range(most):
            token = page.likeliest(generation.suppressed_ids + (() if count else generation.begin_suppressed_ids))
            for row, chosen in zip(rows.tolist(), token.tolist(), strict=True):
                written[row].append(chosen)
            ended |= torch.isin(token, ends)
            if count + 1 == most or bool(ended.all()):
                break
            if float(ended.float().mean()) > _ENDED:
                page.keep(~ended)
                rows, token, ended = rows[~ended], token[~ended], ended[~ended]
            page.step(token)
        return [self._cut(ids) for ids in written]

    def takes_batches(self, samples: Sequence[Sample]) -> bool:
        """Whether samples together get the scores that each gets alone."""
        try:
            together = self._opened(samples).scores
        except Exception:  # a fixed batch size shows in whatever error the operator that trips over it has
            return False
        alone = torch.cat([self._opened([sample]).scores for sample in samples])
        return together.shape == alone.shape and bool((together - alone).norm() <= _TOLERANCE * alone.norm())

    def _opened(self, samples: Sequence[Sample]) -> _Page:
        """The sources read, and what begins every target."""
        source = [stack(spec, samples).to(self.device) for spec in self.encoder]
        mask = next((tensor for tensor, spec in zip(source, self.encoder, strict=True) if is_mask(spec.name)), None)
        page = _Page(self.writer, self.generation, self.writer.encode(*source), mask)
        for token in self.generation.start_ids:
            page.step(torch.full((len(samples),), token, device=self.device))
        return page

    def _cut(self, ids: list[int]) -> list[int]:
        """Rows that have ended go on for a while with those that have not."""
        end = next((place for place, token in enumerate(ids) if token in self.generation.end_ids), len(ids))
        return ids[: end + 1]


class _Page:
    """Rows that are written together: what is remembered of each, and the scores of its next token."""

    def __init__(
        self, writer: Encodes, generation: Generation, memory: tuple[Tensor, ...], mask: Tensor | None
    ) -> None:
        self._writer = writer
        self._memory = memory
        self._mask = mask
        self._position = 0
        first = tuple(tensor[:1] for tensor in memory)
        shapes = cache_shapes(cast(torch.nn.Module, writer), generation, first, None if mask is None else mask[:1])
        count = len(memory[0])
        self._cache = [memory[0].new_zeros((count, heads, _ROWS, width)) for heads, width in shapes]
        self.scores = memory[0].new_zeros(())

    def step(self, token: Tensor) -> None:
        """Read the token of each row."""
        position = self._position
        if position == self._cache[0].shape[2]:
            more = [cache.new_zeros((*cache.shape[:2], _ROWS, cache.shape[3])) for cache in self._cache]
            self._cache = [torch.cat(both, 2) for both in zip(self._cache, more, strict=True)]
        past = tuple(cache[:, :, : position + 1] for cache in self._cache)
        place = torch.tensor([position], device=token.device)
        self.scores, rows = self._writer.decode(token[:, None], place, self._mask, self._memory, past)
        for cache, row in zip(self._cache, rows, strict=True):
            cache[:, :, position : position + 1] = row
        self._position = position + 1

    def likeliest(self, suppressed: Sequence[int]) -> Tensor:
        """The token of each row with the highest score that may be written."""
        if suppressed:
            place = torch.tensor(suppressed, device=self.scores.device)
            return self.scores.index_fill(1, place, float("-inf")).argmax(-1)
        return self.scores.argmax(-1)

    def keep(self, rows: Tensor) -> None:
        """Forget the others."""
        self._memory = tuple(tensor[rows] for tensor in self._memory)
        self._mask = None if self._mask is None else self._mask[rows]
        self._cache = [cache[rows] for cache in self._cache]


def _generation_of(teacher: Model) -> Generation:
    if teacher.generation is None:
        raise ValueError(f"{teacher.name} is no network that writes")
    return teacher.generation


def _length(sample: Sample, encoder: Sequence[TensorSpec]) -> int:
    for spec in encoder:
        if spec.name not in sample.inputs:
            raise DataError(f"lacks the input {spec.name!r}", where=f"training sample {sample.name!r}")
    return max(sample.inputs[spec.name].size for spec in encoder)


def _read(path: Path, count: int) -> dict[int, Array]:
    """What an earlier run has written; what it was about to write when it was killed is dropped from the file."""
    try:
        words = np.fromfile(path, np.int32)
    except OSError:
        return {}
    found: dict[int, Array] = {}
    place = 0
    while place + 2 <= len(words) and 0 <= words[place] < count and words[place + 1] > 0:
        end = place + 2 + int(words[place + 1])
        if end > len(words):
            break
        found[int(words[place])] = words[place + 2 : end].copy()
        place = end
    if path.stat().st_size != place * words.itemsize:
        os.truncate(path, place * words.itemsize)
    return found
