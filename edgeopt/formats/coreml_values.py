"""Values of a MIL program as torch tensors, and the parameters of one of its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeopt.formats.coreml_program import Operation
from edgeopt.types import Array

#: What a variable of a program holds: a tensor, a text (of a constant), or the entries of a MIL list.
Value = torch.Tensor | str | list[torch.Tensor]
Results = tuple[Value, ...]

#: Floating point is computed in float32 whatever the program says; fp16 results are rounded to fp16 afterwards.
TORCH_TYPES: dict[str, torch.dtype] = {
    "fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool, "int8": torch.int8, "uint8": torch.uint8,
    "int16": torch.int16, "uint16": torch.int32, "int32": torch.int32, "uint32": torch.int64, "int64": torch.int64,
    "int4": torch.int8, "uint4": torch.uint8, "uint1": torch.uint8, "uint2": torch.uint8, "uint3": torch.uint8,
    "uint6": torch.uint8,
}  # fmt: skip

#: (lowest, highest) of what `quantize` and `cast` write.
INTEGER_BOUNDS = {
    "int8": (-128, 127), "uint8": (0, 255), "int16": (-(1 << 15), (1 << 15) - 1), "uint16": (0, (1 << 16) - 1),
    "int4": (-8, 7), "uint4": (0, 15), "int32": (-(1 << 31), (1 << 31) - 1),
}  # fmt: skip


def as_tensor(values: Array, dtype: str) -> torch.Tensor:
    """An array as the tensor that stands for it; the array is not written to."""
    numpy_type = torch.empty(0, dtype=TORCH_TYPES[dtype]).numpy().dtype
    return torch.from_numpy(np.array(values, dtype=numpy_type))


def round_half(values: torch.Tensor) -> torch.Tensor:
    """Nearest fp16 values, kept as float32; beyond 65504 infinite."""
    return values.to(torch.float16).to(torch.float32)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Values of one operator's parameters. Missing and mistyped ones raise KeyError and TypeError."""

    op: Operation
    values: Mapping[str, Sequence[Value]]

    def __contains__(self, name: str) -> bool:
        return bool(self.values.get(name))

    def tensor(self, name: str = "x") -> torch.Tensor:
        value = self.values[name][0]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is not a tensor")
        return value

    def optional(self, name: str) -> torch.Tensor | None:
        return self.tensor(name) if name in self else None

    def tensors(self, name: str = "values") -> list[torch.Tensor]:
        found = [value for value in self.values[name] if isinstance(value, torch.Tensor)]
        if len(found) != len(self.values[name]):
            raise TypeError(f"{name} has parts that are no tensors")
        return found

    def entries(self, name: str) -> list[torch.Tensor]:
        value = self.values[name][0]
        if not isinstance(value, list):
            raise TypeError(f"{name} is not a list")
        return value

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        if name not in self and default is not None:
            return list(default)
        return [int(v) for v in self.tensor(name).reshape(-1).tolist()]

    def integer(self, name: str, default: int | None = None) -> int:
        return self.ints(name, None if default is None else (default,))[0]

    def number(self, name: str, default: float | None = None) -> float:
        if name not in self and default is not None:
            return default
        return float(self.tensor(name).reshape(-1)[0])

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.tensor(name).reshape(-1)[0]) if name in self else default

    def flags(self, name: str, count: int) -> list[bool]:
        return [bool(v) for v in self.tensor(name).reshape(-1).tolist()] if name in self else [False] * count

    def text(self, name: str, default: str | None = None) -> str:
        if name not in self and default is not None:
            return default
        value = self.values[name][0]
        if not isinstance(value, str):
            raise TypeError(f"{name} is not a text")
        return value

    def output_type(self, index: int = 0) -> torch.dtype:
        return TORCH_TYPES[self.op.outputs[index].type.dtype]


Operator = Callable[[Arguments], torch.Tensor | Results]
