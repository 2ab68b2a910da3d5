"""Samples of one part of a network that writes, made from samples of the whole network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.datasets.base import Dataset
from edgeopt.datasets.indexed import IndexedDataset, combine
from edgeopt.errors import DataError, UsageError
from edgeopt.sources.generative import GivesRows, decodes, encodes, is_mask, prefills, writer_of
from edgeopt.types import Array, Dim, Generation, Model, PartName, Sample, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

#: The fractional parts of its multiples lie as evenly in [0, 1) as any sequence's can: positions and lengths are spread
#: over the samples, however few there are.
_GOLDEN = (5**0.5 - 1) / 2


def part_dataset(model: Model, part: PartName, parts: Mapping[PartName, Model], data: Dataset, seed: int) -> Dataset:
    """What a part would be given where the float network reads those samples and writes their targets.

    The decoder is shown one position of each sample, with the cache rows before it as the float network makes them;
    the prefill a beginning of each. Positions and lengths are spread evenly over what the samples really hold. Where
    a sample has no target the network writes its own, greedily.

    One sample is made at a time, and always the same one for the same index and seed.

    Args:
        model: the whole network, with `generation` set.
        parts: what `edgeopt.generation.parts.split` made of it.
        data: samples of the whole network.
        seed: shifts all positions.

    Raises UsageError where the network has no such part.
    """
    generation = model.generation
    if generation is None or part not in parts:
        raise UsageError(f"has no {part}", where=model.name, fix=f"its parts are {', '.join(parts) or 'none'}")
    padding = {spec.name: spec.padding for spec in model.inputs if spec.padding is not None}
    network = _Network(writer_of(model.module, generation), generation, parts, padding)
    identity = [model.source_sha256, *map(repr, model.history), part, repr(parts[part].inputs), str(seed)]
    return _PartDataset(network, part, parts[part].inputs, data, seed, identity)


class _PartDataset(IndexedDataset):
    def __init__(
        self,
        network: _Network,
        part: PartName,
        inputs: tuple[TensorSpec, ...],
        data: Dataset,
        seed: int,
        identity: Sequence[str],
    ) -> None:
        self._network = network
        self._part = part
        self._inputs = inputs
        self._data = data
        self._offset = float(np.random.default_rng(seed).random())
        self._identity = hashlib.sha256("\0".join(identity).encode()).digest()
        self.is_sequential = isinstance(data, IndexedDataset) and data.is_sequential
        self.is_fixed = isinstance(data, IndexedDataset) and data.is_fixed
        self.is_fixed = isinstance(data, IndexedDataset) and data.is_fixed

    @property
    def is_labelled(self) -> bool:
        return False

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self._data)

    def _load(self, index: int) -> Sample:
        import torch

        whole = self._data[index]
        share = (self._offset + index * _GOLDEN) % 1
        with torch.inference_mode():
            arrays = self._network.inputs_of(self._part, whole, share)
        fitted = {
            spec.name: _tiled(array.astype(spec.dtype, copy=False), spec)
            for spec, array in zip(self._inputs, arrays, strict=True)
        }
        return Sample(fitted, None, whole.name)

    def digest_of(self, index: int) -> bytes:
        if isinstance(self._data, IndexedDataset):
            return hashlib.sha256(self._identity + self._data.digest_of(index)).digest()
        return hashlib.sha256(self._identity + f"{self._data.fingerprint()} {index}".encode()).digest()

    def fingerprint(self) -> str:
        return combine([self._identity, self._data.fingerprint().encode()])


class _Network:
    """The float network, run part by part.

    Args:
        padding: what fills the end of each of the whole network's inputs.
    """

    def __init__(
        self, module: nn.Module, generation: Generation, parts: Mapping[PartName, Model], padding: Mapping[str, int]
    ) -> None:
        self._module = module
        self._generation = generation
        self._padding = padding
        self._source = parts["encoder"].inputs if "encoder" in parts else ()
        self._prompt = parts["prefill"].inputs[0] if "prefill" in parts else None
        self._caches = tuple(spec for spec in parts["decoder"].inputs if spec.name.startswith("past_"))
        self._is_masked = any(spec.name == "source_mask" for spec in parts["decoder"].inputs)

    def inputs_of(self, part: PartName, whole: Sample, share: float) -> tuple[Array, ...]:
        """The part's inputs in order. `share`, in [0, 1), tells the position or the length."""
        if part == "encoder":
            return self._source_of(whole)
        if part == "prefill":
            return self._prompt_of(whole, share)
        return self._continued(whole, share) if self._generation.kind == "decoder" else self._translated(whole, share)

    def _source_of(self, whole: Sample) -> tuple[Array, ...]:
        return tuple(self._padded(whole, whole.inputs[spec.name], spec) for spec in self._source)

    def _prompt_of(self, whole: Sample, share: float) -> tuple[Array, ...]:
        if self._prompt is None:
            raise ValueError("the network has no prefill")
        ids = self._text_of(whole)
        length = 1 + int(share * min(len(ids), self._generation.max_source))
        beginning = ids[np.newaxis, :length]
        return self._padded(whole, beginning, self._prompt), np.array([length])

    def _continued(self, whole: Sample, share: float) -> tuple[Array, ...]:
        """A decoder-only network in the middle of a text: it has read at least one token."""
        import torch

        ids = self._text_of(whole)[: self._generation.max_target]
        position = min(1 + int(share * (len(ids) - 1)), len(ids) - 1)
        past = self._empty_caches()
        if position:
            beginning = torch.from_numpy(ids[np.newaxis, :position])
            _, rows = prefills(self._module).prefill(beginning, torch.tensor([position]))
            _fill(past, 0, rows)
        return (np.array([[ids[position]]]), np.array([position]), *(cache.numpy() for cache in past))

    def _translated(self, whole: Sample, share: float) -> tuple[Array, ...]:
        """A decoder in the middle of its target."""
        import torch

        source = self._source_of(whole)
        memory = encodes(self._module).encode(*(torch.from_numpy(array) for array in source))
        mask = self._mask_in(source)
        target = self._target_of(whole)
        if len(target) <= len(self._generation.start_ids):
            target = self._written(mask, memory, whole)
        position = int(share * len(target))
        past = self._read(target[:position], mask, memory)
        return (
            np.array([[target[position]]]),
            np.array([position]),
            *(() if mask is None else (mask.numpy(),)),
            *(tensor.numpy() for tensor in (*memory, *past)),
        )

    def _read(self, ids: Array, mask: Tensor | None, memory: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The caches after those tokens."""
        import torch

        past = self._empty_caches()
        if isinstance(self._module, GivesRows) and len(ids):
            _fill(past, 0, self._module.rows(torch.from_numpy(ids[np.newaxis]), mask, memory))
        else:
            for position, token in enumerate(ids):
                self._step(int(token), position, mask, memory, past)
        return past

    def _step(
        self,
        token: int,
        position: int,
        mask: Tensor | None,
        memory: tuple[Tensor, ...],
        past: tuple[Tensor, ...],
    ) -> Tensor:
        """Read one token: its cache rows are filled in, in place; returns the logits of the next, (vocabulary,)."""
        import torch

        at = torch.tensor([position])
        logits, present = decodes(self._module).decode(torch.tensor([[token]]), at, mask, memory, past)
        _fill(past, position, present)
        return logits[0]

    def _written(self, mask: Tensor | None, memory: tuple[Tensor, ...], whole: Sample) -> Array:
        """What the network itself writes, greedily, behind the start tokens."""
        generation = self._generation
        ids = list(generation.start_ids)
        if not ids:
            raise DataError(
                "has no target, and the network no token to start from",
                where=whole.name,
                fix="give pairs of source and target",
            )
        past = self._empty_caches()
        for position in range(generation.max_target - 1):
            logits = self._step(ids[position], position, mask, memory, past)
            if position + 1 < len(ids):
                continue
            is_first = len(ids) == len(generation.start_ids)
            never = [*generation.suppressed_ids, *(generation.begin_suppressed_ids if is_first else ())]
            logits[never] = -np.inf
            token = int(logits.argmax())
            if token in generation.end_ids:
                break
            ids.append(token)
        return np.array(ids)

    def _empty_caches(self) -> tuple[Tensor, ...]:
        import torch

        return tuple(torch.zeros(1, *(_size(dim) for dim in spec.shape[1:])) for spec in self._caches)

    def _mask_in(self, source: Sequence[Array]) -> Tensor | None:
        import torch

        if not self._is_masked:
            return None
        [mask] = [array for spec, array in zip(self._source, source, strict=True) if is_mask(spec.name)]
        return torch.from_numpy(mask)

    def _text_of(self, whole: Sample) -> Array:
        ids = self._unpadded(whole.inputs["input_ids"])
        if not ids.size:
            raise DataError("is an empty text", where=whole.name)
        return ids

    def _target_of(self, whole: Sample) -> Array:
        """The tokens that the decoder reads, `start_ids` first; empty where the sample has none."""
        given = whole.inputs.get("decoder_input_ids")
        ids = np.empty(0, np.int64) if given is None else self._unpadded(given, len(self._generation.start_ids))
        return ids[: self._generation.max_target]

    def _unpadded(self, ids: Array, least: int = 0) -> Array:
        """One row of token ids without the padding behind them. The first `least` stay: T5 starts with padding."""
        row = ids.reshape(-1)
        real = np.flatnonzero(row != self._generation.pad_id)
        return row[: max(least, int(real[-1]) + 1 if real.size else 0)]

    def _padded(self, whole: Sample, array: Array, spec: TensorSpec) -> Array:
        """Filled up behind to the part's static shape."""
        missing = [_size(dim) - given for dim, given in zip(spec.shape, array.shape, strict=True)]
        if min(missing) < 0:
            raise DataError(
                f"has the shape {array.shape}, the part takes {spec.shape}",
                where=f"{whole.name}, input {spec.name!r}",
                fix="allow longer sources (max-source-length), or shorten the samples",
            )
        fill = self._padding.get(spec.name, self._generation.pad_id if array.dtype.kind in "iu" else 0)
        return np.pad(array, [(0, count) for count in missing], constant_values=fill)


def _fill(past: Sequence[Tensor], position: int, rows: Sequence[Tensor]) -> None:
    """Put rows into the caches, the first one at `position`, in place."""
    for cache, new in zip(past, rows, strict=True):
        cache[:, :, position : position + new.shape[2]] = new


def _size(dim: int | Dim) -> int:
    return dim.max if isinstance(dim, Dim) else dim


def _tiled(array: Array, spec: TensorSpec) -> Array:
    """Once for each beam, where the part has several."""
    beams = _size(spec.shape[0]) // len(array)
    return np.ascontiguousarray(array if beams == 1 else np.repeat(array, beams, axis=0))
