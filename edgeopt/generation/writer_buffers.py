"""Inputs of an opened part that the loop around it fills in place, in the form that the file takes.

A decoder reads its whole cache at every step and gives one new row. Cache and memory therefore stay in the file's own
type and layout all the time; only what is new is written, and only that is converted where the file gives it otherwise
than it takes it.
"""

from __future__ import annotations

from types import EllipsisType

import numpy as np

from edgeopt.errors import DataError
from edgeopt.runtimes.base import dequantize, quantize
from edgeopt.types import Array, SignatureTensor

Index = tuple[slice | EllipsisType | Array, ...] | slice | EllipsisType


class Buffer:
    """The array that one input is fed from.

    Attributes:
        array: contiguous, in the file's type and layout: what `Session.run_native` takes.
        view: the same memory with the dimensions in the model's order.
    """

    def __init__(self, tensor: SignatureTensor) -> None:
        """Raises DataError where the file does not fix the input's shape."""
        sizes = [size for size in tensor.shape if isinstance(size, int)]
        if len(sizes) != len(tensor.shape):
            raise DataError(
                f"has the shape {tensor.shape}", where=f"input {tensor.name!r}", fix="the parts' shapes must be fixed"
            )
        self._tensor = tensor
        self._zero = tensor.quantization.zero_point[0] if tensor.quantization is not None else 0
        self.array: Array = np.full(sizes, self._zero, tensor.dtype)
        self.view: Array = self.array
        if tensor.permutation is not None:
            self.view = self.array.transpose(np.argsort(tensor.permutation))

    def clear(self) -> None:
        self.array.fill(self._zero)

    def set(self, values: Array | int, where: Index = ...) -> None:
        """Write values in the model's terms."""
        quantization = self._tensor.quantization
        if quantization is not None:
            values = quantize(np.asarray(values), quantization, self._tensor.dtype)
        self.view[where] = values

    def take(self, values: Array, given: SignatureTensor, part: Index = ..., where: Index = ...) -> None:
        """Write what a file gave as its output `given`, or that `part` of it; both in the model's order."""
        if given.permutation is not None:
            values = values.transpose(np.argsort(given.permutation))
        values = values[part]
        if given.quantization == self._tensor.quantization:
            self.view[where] = values
            return
        if given.quantization is not None:
            values = dequantize(values, given.quantization)
        self.set(values, where)

    def reorder(self, parents: tuple[int, ...], rows: int) -> None:
        """Let each row of the batch continue that of its parent; only the first `rows` of axis 2 are in use."""
        changed = np.asarray([row for row, parent in enumerate(parents) if row != parent], np.intp)
        if changed.size:
            used = slice(0, rows)
            self.view[changed, :, used] = self.view[np.asarray(parents, np.intp)[changed], :, used]
