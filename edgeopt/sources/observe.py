"""What running a model shows: results as arrays, and the outputs' signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import EdgeoptError, UsageError
from edgeopt.sources.signature import describe, dtype_of, resize, spec_of
from edgeopt.types import Array, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

#: Runs a model on named inputs, the outputs by name.
Call = Callable[[Mapping[str, Array]], dict[str, Array]]


def run(
    function: Callable[..., object], inputs: tuple[TensorSpec, ...], arrays: Mapping[str, Array], where: str
) -> object:
    """What the function returns for one set of inputs, in `inputs` order. Raises UsageError when it fails."""
    import torch

    tensors = [torch.from_numpy(np.array(arrays[spec.name])) for spec in inputs]
    try:
        with torch.no_grad():
            return function(*tensors)
    except EdgeoptError:
        raise
    except Exception as error:
        # The user's code may raise anything.
        shapes = describe(spec_of(spec.name, arrays[spec.name]) for spec in inputs)
        raise UsageError(
            f"failed on the inputs {shapes}: {_first_line(error)}",
            where=where,
            fix="declare the inputs it takes with --input",
        ) from error


def array_of(tensor: torch.Tensor, name: str) -> Array:
    """A tensor as an array. Raises UsageError for element types that no runtime takes."""
    dtype_of(str(tensor.dtype).removeprefix("torch."), f"output {name!r}")
    array: Array = tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    return array


def observe_outputs(
    call: Call, inputs: tuple[TensorSpec, ...], examples: Mapping[str, Array]
) -> tuple[TensorSpec, ...]:
    """Output signature from runs: once more on the same inputs, and once for each dynamic dimension at another size.

    An output dimension that changes with an input dimension and equals it is that dimension; one that only depends on
    it gets a name of its own, with bounds extrapolated linearly from the two sizes seen.
    """
    first = call(examples)
    _check_repeatable(first, call(examples))
    specs = {
        name: TensorSpec(name, tuple(array.shape), dtype_of(array.dtype.name, f"output {name!r}"))
        for name, array in first.items()
    }
    for dim, size in _dynamic_sizes(inputs, examples).items():
        other_size = size + 1 if size < dim.max else size - 1
        if other_size < dim.min:
            continue
        second = call(resize(inputs, examples, dim.name, other_size))
        for name, spec in specs.items():
            if second[name].ndim != len(spec.shape):
                raise UsageError("changes its number of dimensions with the input's size", where=f"output {name!r}")
            shape = tuple(
                _output_dim(
                    entry, (first[name].shape[axis], second[name].shape[axis]), (size, other_size), dim, name, axis
                )
                for axis, entry in enumerate(spec.shape)
            )
            specs[name] = TensorSpec(name, shape, spec.dtype)
    return tuple(specs.values())


def _output_dim(
    entry: int | Dim, seen: tuple[int, int], at: tuple[int, int], dim: Dim, output: str, axis: int
) -> int | Dim:
    if seen[0] == seen[1]:
        return entry
    if seen == at and not isinstance(entry, Dim):
        return dim
    slope = (seen[1] - seen[0]) / (at[1] - at[0])
    low, high = sorted(round(seen[0] + slope * (end - at[0])) for end in (dim.min, dim.max))
    if isinstance(entry, Dim):
        low, high = min(low, entry.min), max(high, entry.max)
    return Dim(re.sub(r"\W", "_", f"{output}_{axis}"), max(1, low), max(1, high))


def _dynamic_sizes(inputs: tuple[TensorSpec, ...], examples: Mapping[str, Array]) -> dict[Dim, int]:
    return {
        dim: examples[spec.name].shape[axis]
        for spec in reversed(inputs)
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, Dim)
    }


def _check_repeatable(first: Mapping[str, Array], second: Mapping[str, Array]) -> None:
    for name, array in first.items():
        if not np.allclose(array, second[name], rtol=1e-3, atol=1e-4, equal_nan=array.dtype.kind == "f"):
            raise UsageError(
                "differs between two runs on the same input",
                where=f"output {name!r}",
                fix="remove what is random in forward, such as F.dropout without training=self.training",
            )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
