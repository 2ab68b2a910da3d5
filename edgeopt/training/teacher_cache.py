"""A teacher's outputs on disk: computed once, then read in every epoch instead of running the teacher."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgeopt.errors import DataError, UsageError
from edgeopt.sources.digest import sha256_of
from edgeopt.training.calls import batched, explained, outputs_of
from edgeopt.training.data import Batch, parts, validation_batches
from edgeopt.training.padding import free_dims
from edgeopt.types import Array, TensorSpec

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

_LISTING = "outputs.json"
#: Outputs of the same teacher may differ by this much, relatively: batches of other sizes are added up otherwise.
_TOLERANCE = 1e-3
#: Samples that are read twice to see whether they change: a picture that is flipped half of the time may not at first.
_COMPARED = 8


class KeptOutputs:
    """Memory-mapped arrays (samples, rows, ...), one per output; memory holds the batches that are read only.

    Args:
        arrays: one per output.
        seen: (samples,), `_digests` of what the teacher was given.
    """

    def __init__(self, arrays: Sequence[Array], seen: Array) -> None:
        self._arrays = arrays
        self._seen = seen

    def __len__(self) -> int:
        return len(self._arrays)

    def of(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The outputs for a batch of these samples, (batch * rows, ...) each."""
        return tuple(
            torch.from_numpy(np.array(array[list(indices)])).reshape(-1, *array.shape[2:]) for array in self._arrays
        )

    def check(self, indices: Sequence[int], arguments: Sequence[Tensor]) -> None:
        """Raises DataError where a sample of this batch is not what the teacher saw."""
        for index, digest in zip(indices, _digests(arguments, len(indices)), strict=True):
            if digest != self._seen[index]:
                raise DataError(
                    "is another one than the teacher saw: the samples change from one reading to the next",
                    where=f"sample {index}",
                    fix="leave --teacher-cache out, or the random augmentation",
                )


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """Outputs of one teacher under `folder`.

    Attributes:
        folder: may hold those of other teachers and data, too.
        teacher: in eval mode; called with one batch.
        inputs: of the model.
        batch_size: of the teacher's calls.
        device: of the teacher.
        progress: told about the work.
    """

    folder: Path
    teacher: nn.Module
    inputs: tuple[TensorSpec, ...]
    batch_size: int
    device: torch.device
    progress: Progress

    def of(self, data: Dataset) -> KeptOutputs | None:
        """The outputs for all samples of a data set; what is damaged, or is another teacher's, is computed anew.

        None, with the reason told to `progress`, where they can't be kept: samples that change from one reading to
        the next (random augmentation), outputs whose shape depends on the sample, or a disk that is too small.

        Raises:
            UsageError: the folder can't be written.
            ConversionError: the teacher can't run the samples.
        """
        if free_dims(self.inputs):
            self._not_kept("the samples differ in length")
            return None
        content = _content(data)
        if content != _content(data):
            self._not_kept("the samples change from one reading to the next")
            return None
        key = self._key(data, content)
        place = self.folder / key[:32]
        if (kept := self._open(place, key, data)) is not None:
            return kept
        try:
            return self._compute(place, key, data)
        except OSError as error:
            raise UsageError(
                f"the teacher's outputs can't be kept here: {error.strerror or error}",
                where=str(self.folder),
                fix="give another folder, or none",
            ) from error

    def _key(self, data: Dataset, content: str) -> str:
        layers = self.teacher.named_modules()
        kinds = [(name, type(module).__qualname__, module.extra_repr()) for name, module in layers]
        settings = (
            sha256_of((), self.teacher), kinds, data.fingerprint(), content, len(data), self.inputs,
        )  # fmt: skip
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def _open(self, place: Path, key: str, data: Dataset) -> KeptOutputs | None:
        """What an earlier run has kept, if it is whole and still what the teacher says."""
        if not place.is_dir():
            return None
        self.progress.step("Checking the teacher's outputs that were kept")
        if (kept := _load(place, key)) is None:
            return None
        # The teacher's code is not part of the key: a change of it shows in what it says.
        first = next(iter(validation_batches(data, self.inputs, self.batch_size)))
        found = [_storable(output) for output in self._run(first)]
        wanted = kept.of(range(min(self.batch_size, len(data))))
        return kept if len(found) == len(wanted) and all(map(_agree, found, wanted)) else None

    def _compute(self, place: Path, key: str, data: Dataset) -> KeptOutputs | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f".{place.name}.", dir=self.folder))
        try:
            if (reason := self._write(partial, key, data)) is not None:
                self._not_kept(reason)
                return None
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return _load(place, key)

    def _write(self, folder: Path, key: str, data: Dataset) -> str | None:
        """Write the outputs; why they can't be kept, where so."""
        batches = validation_batches(data, self.inputs, self.batch_size)
        start = 0
        with ExitStack() as stack:
            files: list[_File] = []
            seen = _File(folder / "samples.bin", (), np.dtype(np.uint32))
            stack.enter_context(seen.stream)
            for batch in self.progress.track(batches, "Running the teacher on all samples", len(batches)):
                outputs = [_storable(output) for output in self._run(batch)]
                count = min(self.batch_size, len(data) - start)
                if start == 0:
                    if not outputs or not all(output.numel() for output in outputs):
                        return "there are none for a sample"
                    size = sum(output.numel() * output.element_size() for output in outputs) / count * len(data)
                    if size > shutil.disk_usage(folder).free:
                        return f"they would take {size / 1e9:.1f} GB, which the disk does not have"
                    for place, output in enumerate(outputs):
                        files.append(_File(folder / f"{place}.bin", _sample_shape(output, count), output.numpy().dtype))
                        stack.enter_context(files[-1].stream)
                if len(outputs) != len(files):
                    return "their number depends on the sample"
                for file, output in zip(files, outputs, strict=True):
                    if not _fits(file.shape, output, count):
                        return "their shapes depend on the sample"
                    file.write(output.numpy())
                seen.write(_digests(parts(batch, self.inputs).arguments, count))
                start += count
        entries = [file.entry(len(data)) for file in files]
        listing = {"key": key, "samples": seen.entry(len(data)), "outputs": entries}
        (folder / _LISTING).write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
        return None

    def _run(self, batch: Batch) -> list[Tensor]:
        arguments = tuple(tensor.to(self.device) for tensor in parts(batch, self.inputs).arguments)
        with torch.no_grad(), explained("the teacher can't run the training samples"):
            return outputs_of(self.teacher, arguments)

    def _not_kept(self, reason: str) -> None:
        self.progress.step(f"Not keeping the teacher's outputs: {reason}")


class _File:
    """One output of all samples, as it is written."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> None:
        self.shape = shape
        self.stream = path.open("wb")
        self._name = path.name
        self._dtype = dtype
        self._digest = hashlib.sha256()

    def write(self, values: Array) -> None:
        content = values.astype(self._dtype, copy=False).tobytes()
        self._digest.update(content)
        self.stream.write(content)

    def entry(self, samples: int) -> dict[str, str | list[int]]:
        shape = [samples, *self.shape]
        return {"file": self._name, "dtype": self._dtype.str, "shape": shape, "sha256": self._digest.hexdigest()}


def _load(place: Path, key: str) -> KeptOutputs | None:
    """What was written under this key; None where it is damaged."""
    try:
        listing = json.loads((place / _LISTING).read_text(encoding="utf-8"))
        if listing["key"] != key:
            return None
        arrays = []
        for entry in (listing["samples"], *listing["outputs"]):
            file, dtype = place / Path(entry["file"]).name, np.dtype(entry["dtype"])
            # Bytes of a file must never be taken for objects.
            if dtype.kind not in "fiub" or _sha256(file) != entry["sha256"]:
                return None
            arrays.append(np.memmap(file, dtype, "r", shape=tuple(entry["shape"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return KeptOutputs(arrays[1:], arrays[0])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sample_shape(output: Tensor, count: int) -> tuple[int, ...]:
    """(rows of one sample, ...), of an output for `count` samples."""
    return (len(output) // count, *output.shape[1:])


def _content(data: Dataset) -> str:
    """Of the first samples as they reach the model: a data set's own fingerprint may leave preprocessing out."""
    digest = hashlib.sha256()
    for index in range(min(_COMPARED, len(data))):
        for name, array in sorted(data[index].inputs.items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def _digests(arguments: Sequence[Tensor], count: int) -> Array:
    """(count,), CRC-32 of each of the samples that are stacked in a batch: fast, and no one is to be deceived."""
    found = np.zeros(count, np.uint32)
    for argument in arguments:
        for index, sample in enumerate(argument.reshape(count, -1).numpy()):
            found[index] = zlib.crc32(np.ascontiguousarray(sample).data, int(found[index]))
    return found


def _storable(output: Tensor) -> Tensor:
    """On the CPU; float16 and bfloat16 as float32."""
    output = batched(output).detach().cpu()
    return output.float() if output.is_floating_point() and output.element_size() < 4 else output


def _fits(shape: tuple[int, ...], output: Tensor, count: int) -> bool:
    """Whether the output is one of `count` samples that have this shape each.

    A lone sample at the end may come without its batch axis (`x.squeeze()`).
    """
    if count > 1 and tuple(output.shape[1:]) != shape[1:]:
        return False
    return output.numel() == count * math.prod(shape)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    if found.numel() != wanted.numel() or found.dtype != wanted.dtype:
        return False
    if not found.is_floating_point():
        return True  # an index may go either way in a tie
    error, size = (torch.nan_to_num(x.reshape(-1).float()).norm() for x in (found - wanted.view_as(found), wanted))
    return bool(error <= _TOLERANCE * size)
