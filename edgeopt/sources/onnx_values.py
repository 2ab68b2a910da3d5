"""What flows between the nodes of a rebuilt ONNX graph, and how one kind becomes the other.

ONNX computes sizes with the same operators as data. Sizes are kept on the host, as NumPy arrays (of dtype object
where they hold torch's symbolic sizes), so that a tracer sees numbers where torch wants numbers.

This module and the other onnx_ops modules define torch code at their top level: only functions may import them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from edgeopt.errors import ConversionError
from edgeopt.types import Array

Value = torch.Tensor | Array
Args = Sequence[Value | None]
Number = int | float | bool | torch.SymInt | torch.SymFloat
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | Array

#: numbers of onnx.TensorProto.DataType -> torch type.
TORCH_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. `opset` is the version of the standard operators that the graph uses."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]
    opset: int

    def integer(self, key: str, default: int) -> int:
        value = self.attributes.get(key, default)
        return value if isinstance(value, int) else default

    def number(self, key: str, default: float) -> float:
        value = self.attributes.get(key, default)
        return float(value) if isinstance(value, int | float) else default

    def text(self, key: str, default: str) -> str:
        value = self.attributes.get(key, default)
        return value if isinstance(value, str) else default

    def integers(self, key: str) -> list[int] | None:
        value = self.attributes.get(key)
        return [int(v) for v in value] if isinstance(value, tuple) else None

    def error(self, problem: str) -> ConversionError:
        """An error that names operator and node."""
        return ConversionError(
            f"operator {self.op}: {problem}",
            where=f"node {self.name!r}",
            fix="choose an ONNX target, which takes the graph as it is, or give the model as PyTorch",
        )


Operator = Callable[[Node, Args], Value | tuple[Value, ...]]


def is_host(value: Value | None) -> bool:
    return value is None or isinstance(value, np.ndarray)


def tensor(value: Value | None, node: Node) -> torch.Tensor:
    """A value as a tensor."""
    if value is None:
        raise node.error("an input is missing")
    if isinstance(value, torch.Tensor):
        return value
    if value.dtype == object:
        flat = [torch.scalar_tensor(item, dtype=torch.int64) for item in value.reshape(-1)]
        return torch.stack(flat).reshape(value.shape)
    return torch.from_numpy(np.array(value))


def operand(value: Value | None, other: Value | None, node: Node) -> torch.Tensor | Number:
    """A value beside a tensor in elementwise arithmetic: a plain number where the result has the same shape."""
    if isinstance(value, np.ndarray) and isinstance(other, torch.Tensor) and value.size == 1:
        number: Number = value.reshape(-1)[0] if value.dtype == object else value.reshape(-1)[0].item()
        # An integer beside a float tensor can't occur in ONNX; a float beside integers neither.
        if value.ndim <= other.ndim:
            return number
    return tensor(value, node)


def sizes(value: Value | None, node: Node, what: str) -> list[int]:
    """Sizes, axes and the like as numbers, symbolic ones included. Raises ConversionError if they depend on data."""
    if value is None or isinstance(value, torch.Tensor):
        raise node.error(f"its {what} depend on the input's values")
    # torch.SymInt stands in for int wherever torch takes sizes; its type doesn't say so.
    return [cast("int", item) if isinstance(item, torch.SymInt) else int(item) for item in value.reshape(-1).tolist()]


def argument(node: Node, args: Args, position: int, key: str, what: str) -> list[int] | None:
    """A parameter that is an input in newer opsets and an attribute in older ones; None where it is absent."""
    if position < len(args) and args[position] is not None:
        return sizes(args[position], node, what)
    return node.integers(key)


def host(items: Sequence[int | torch.SymInt]) -> Array:
    """Sizes as a host value of rank 1."""
    if all(isinstance(item, int) for item in items):
        return np.array(items, dtype=np.int64)
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
