"""One pass over a data set of samples of different lengths: how long each is, and all of them ready to be read again.

What costs most of reading a text is its tokenization, and every epoch would do it anew.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from edgeopt.training.padding import array_of, free_dims, sizes_of
from edgeopt.types import Array, Dim, Sample, TensorSpec

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a data set whose samples differ in length.

    Attributes:
        data: to be read from now on: the data set, or what was kept of it.
        sizes: int32 (samples, free dimensions); None where samples are read in their own order, whatever their length.
    """

    data: Dataset
    sizes: Array | None = None


def survey(data: Dataset, inputs: tuple[TensorSpec, ...], progress: Progress) -> Survey:
    """Find out how long the samples are; does nothing for inputs that may not be filled up.

    Samples that are the same at each reading (`is_fixed`) are kept in a file without a name below TMPDIR, which goes
    away with the process.

    Raises DataError where a sample can't be read.
    """
    dims = free_dims(inputs)
    if not dims or getattr(data, "is_sequential", False):
        return Survey(data)
    sizes = np.zeros((len(data), len(dims)), np.int32)
    # The file has no name, and lives as long as what reads it.
    with tempfile.TemporaryFile(prefix="edgeopt-") as file:
        packer = _Packer(inputs, file) if getattr(data, "is_fixed", False) else None
        for index, sample in enumerate(progress.track(data, "Reading the samples", len(data))):
            sizes[index] = sizes_of(sample, inputs)
            if packer is not None and not packer.add(sample):
                packer = None
        return Survey(data if packer is None else packer.packed(data), sizes)


class PackedSamples:
    """A data set whose arrays lie one behind the other in a file.

    Args:
        data: where they are from.
        inputs: of the model; all shapes follow from the sizes of the named dimensions.
        file: the arrays of a sample in the order of the inputs, then its label.
        ends: byte behind each sample. sizes: (samples, named dimensions). label_rank: None without labels.
    """

    is_fixed = True

    def __init__(
        self,
        data: Dataset,
        inputs: tuple[TensorSpec, ...],
        file: IO[bytes],
        ends: array[int],
        sizes: array[int],
        label_rank: int | None,
    ) -> None:
        self._data = data
        self._inputs = inputs
        self._names = _named_dims(inputs)
        self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self._ends = ends
        self._sizes = sizes
        self._label_rank = label_rank

    @property
    def is_labelled(self) -> bool:
        return self._data.is_labelled

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._data.class_names

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        content = os.pread(self._fd, self._ends[index] - start, start)
        count = len(self._names)
        sizes = dict(zip(self._names, self._sizes[index * count : (index + 1) * count], strict=True))
        inputs: dict[str, Array] = {}
        place = 0
        for spec in self._inputs:
            shape = _shape(spec, sizes)
            values = int(np.prod(shape))
            inputs[spec.name] = np.frombuffer(content, spec.dtype, values, place).reshape(shape)
            place += inputs[spec.name].nbytes
        label: int | Array | None = None
        if self._label_rank is not None:
            found = np.frombuffer(content, np.int64, offset=place)
            label = (int(found[0]), found, found[np.newaxis])[self._label_rank]
        return Sample(inputs, label, f"sample {index}")

    def fingerprint(self) -> str:
        return self._data.fingerprint()


class _Packer:
    def __init__(self, inputs: tuple[TensorSpec, ...], file: IO[bytes]) -> None:
        self._inputs = inputs
        self._names = _named_dims(inputs)
        self._file = file
        self._ends = array("Q")
        self._sizes = array("L")
        self._label_rank: int | None = None

    def add(self, sample: Sample) -> bool:
        """False where the sample, or the disk, is not of a kind that can be kept."""
        arrays = [np.ascontiguousarray(array_of(sample, spec), spec.dtype) for spec in self._inputs]
        sizes: dict[str, int] = {}
        for spec, values in zip(self._inputs, arrays, strict=True):
            if values.ndim != len(spec.shape):
                return False
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, Dim):
                    sizes.setdefault(dim.name, values.shape[axis])
            if values.shape != _shape(spec, sizes):
                return False
        label = None if sample.label is None else np.asarray(sample.label)
        rank = None if label is None else label.ndim
        if not self._ends:
            self._label_rank = rank
        is_known = label is None or (label.dtype.kind in "iu" and label.ndim <= 2 and label.shape[:-1] in ((), (1,)))
        if rank != self._label_rank or not is_known:
            return False
        parts = arrays if label is None else [*arrays, label.astype(np.int64)]
        try:
            for part in parts:
                self._file.write(part.tobytes())
        except OSError:  # no room: the samples are read from where they are
            return False
        self._ends.append((self._ends[-1] if self._ends else 0) + sum(part.nbytes for part in parts))
        self._sizes.extend(sizes[name] for name in self._names)
        return True

    def packed(self, data: Dataset) -> PackedSamples:
        self._file.flush()
        return PackedSamples(data, self._inputs, self._file, self._ends, self._sizes, self._label_rank)


def _named_dims(inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(dim.name for spec in inputs for dim in spec.shape if isinstance(dim, Dim)))


def _shape(spec: TensorSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim.name] if isinstance(dim, Dim) else dim for dim in spec.shape)
