"""What every runtime offers: open a file, run it in the model's own terms or in the file's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeopt.errors import DataError
from edgeopt.types import Array, Format, OpTiming, QuantParams, Signature, SignatureTensor


def quantize(values: Array, params: QuantParams, dtype: str) -> Array:
    """real -> integer: round half to even of real / scale + zero_point, saturated to the type (ONNX QuantizeLinear)."""
    info = np.iinfo(dtype)
    scaled = np.rint(values.astype(np.float32) / np.float32(params.scale[0])) + params.zero_point[0]
    quantized: Array = np.clip(scaled, info.min, info.max).astype(dtype)
    return quantized


def dequantize(values: Array, params: QuantParams) -> Array:
    """integer -> real, per tensor: scale * (integer - zero_point), in float32."""
    centred = values.astype(np.int32) - np.int32(params.zero_point[0])
    return (centred * np.float32(params.scale[0])).astype(np.float32)


def encode(values: Array, tensor: SignatureTensor) -> Array:
    """One model-side array as the file wants it: transposed, quantized or cast. Raises DataError on a rank mismatch."""
    if values.ndim != len(tensor.shape):
        raise DataError(
            f"has {values.ndim} dimensions, the model takes {len(tensor.shape)}", where=f"input {tensor.name!r}"
        )
    if tensor.permutation is not None:
        values = values.transpose(tensor.permutation)
    if tensor.quantization is not None:
        return np.ascontiguousarray(quantize(values, tensor.quantization, tensor.dtype))
    return np.ascontiguousarray(values, dtype=tensor.dtype)


def decode(values: Array, tensor: SignatureTensor) -> Array:
    """One array from the file in the model's terms: dequantized or cast, transposed back."""
    if tensor.quantization is not None:
        values = dequantize(values, tensor.quantization)
    if tensor.permutation is not None:
        values = values.transpose(np.argsort(tensor.permutation))
    return np.ascontiguousarray(values, dtype=tensor.model_dtype)


def check_shape(values: Array, tensor: SignatureTensor) -> None:
    """Raises DataError where an array in the file's layout is not what the signature says; free dimensions take any
    size."""
    fits = values.ndim == len(tensor.shape) and all(
        isinstance(wanted, str) or wanted == given for wanted, given in zip(tensor.shape, values.shape, strict=True)
    )
    if not fits:
        expected, given = ", ".join(map(str, tensor.shape)), ", ".join(map(str, values.shape))
        raise DataError(f"has the shape ({given}), the model takes ({expected})", where=f"input {tensor.name!r}")


class Session(ABC):
    """An opened file. Not thread-safe. `close` frees what the runtime holds; a `with` block does it."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    @abstractmethod
    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once in the file's terms. Keys are `SignatureTensor.name`, arrays have the file's type and layout."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once in the model's terms: the inputs of a `Sample` in, the model's outputs by name out."""
        return self.decode(self.run_native(self.encode(inputs)))

    def encode(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        missing = [t.name for t in self.signature.inputs if t.name not in inputs]
        if missing:
            raise DataError(f"the sample lacks the input {missing[0]!r}", where="data set")
        return {t.name: encode(inputs[t.name], t) for t in self.signature.inputs}

    def decode(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {t.name: decode(outputs[t.name], t) for t in self.signature.outputs}

    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        """Median time of each operator, slowest first; empty where the runtime can't tell."""
        del inputs, repetitions
        return ()

    @abstractmethod
    def close(self) -> None:
        """Free the runtime's resources. Calling it twice is allowed."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Runtime(Protocol):
    """One per way to execute a file."""

    name: str
    #: Formats that it runs.
    formats: tuple[Format, ...]
    #: What it stands in for and how exactly ("integer arithmetic of the Ethos-U, to the bit"), for the report; None
    #: for a runtime that runs as it would on the device. Times and memory of an emulator are never measured.
    emulates: str | None

    def unavailable(self) -> str | None:
        """Why this runtime can't be used on this machine and how to get it; None when it works. Must be quick."""
        ...

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        """Open a file. Raises MissingError when unavailable, ConversionError when the runtime refuses the file."""
        ...
