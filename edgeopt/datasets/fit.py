"""Does an array fit the model's input? Names, rank, sizes and types, checked on every sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeopt.errors import DataError, UsageError
from edgeopt.types import Array, Dim, TensorSpec


def fit_inputs(arrays: Mapping[str, Array], inputs: tuple[TensorSpec, ...], where: str) -> dict[str, Array]:
    """The arrays as the model takes them: batch dimension added where missing, cast where nothing is lost.

    Arrays that the model has no input for are left out.

    Args:
        arrays: input name -> array, with or without the batch dimension of 1.
        inputs: the model's inputs.
        where: names the sample in messages.

    Raises DataError naming the sample and the tensor.
    """
    fitted: dict[str, Array] = {}
    sizes: dict[str, int] = {}
    for spec in inputs:
        if spec.name not in arrays:
            raise DataError(
                f"has no array for the model's input {spec.name!r} (it has {', '.join(map(repr, arrays)) or 'none'})",
                where=where,
            )
        place = f"{where}, input {spec.name!r}"
        array = with_batch(arrays[spec.name], spec)
        _check_shape(array, spec, sizes, place)
        fitted[spec.name] = np.ascontiguousarray(_cast(array, np.dtype(spec.dtype), place))
    return fitted


def with_batch(array: Array, spec: TensorSpec) -> Array:
    """The array with a leading dimension of 1 if that is all that it lacks."""
    return array[np.newaxis] if array.ndim == len(spec.shape) - 1 else array


def only_input(inputs: tuple[TensorSpec, ...], what: str) -> TensorSpec:
    """The model's single input. Raises UsageError when it has several, as `what` can feed only one."""
    if len(inputs) == 1:
        return inputs[0]
    names = ", ".join(spec.name for spec in inputs)
    raise UsageError(
        f"{what} feed one input, but the model has {len(inputs)} ({names})",
        fix="use a .npz or a file.py:factory data set",
    )


def shape_text(spec: TensorSpec) -> str:
    """The shape as a person writes it, with the names of dynamic dimensions: `(batch, 3, 224, 224)`."""
    return _tuple_text(tuple(d.name if isinstance(d, Dim) else str(d) for d in spec.shape))


def _tuple_text(entries: tuple[str, ...]) -> str:
    return f"({', '.join(entries)}{',' if len(entries) == 1 else ''})"


def _check_shape(array: Array, spec: TensorSpec, sizes: dict[str, int], place: str) -> None:
    """`sizes` collects what each named dimension of this sample is, as two inputs must agree on it."""
    if array.ndim != len(spec.shape):
        raise DataError(_misfit(array, spec), where=place)
    for axis, (size, dim) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if not isinstance(dim, Dim):
            if size != dim:
                raise DataError(_misfit(array, spec), where=place)
            continue
        if axis == 0 and array.ndim > 1 and size != 1:
            raise DataError(
                f"is a batch of {size}", where=place, fix="a data set gives single samples: set batch_size=1"
            )
        if not dim.min <= size <= dim.max:
            raise DataError(f"{_misfit(array, spec)} with {dim.name} from {dim.min} to {dim.max}", where=place)
        if sizes.setdefault(dim.name, size) != size:
            other = f"but {dim.name} is {sizes[dim.name]} in another input"
            raise DataError(f"{_misfit(array, spec)}, {other}", where=place)


def _misfit(array: Array, spec: TensorSpec) -> str:
    """Made for the error alone: every sample is checked."""
    return f"has shape {_tuple_text(tuple(map(str, array.shape)))}, the model takes {shape_text(spec)}"


def _cast(array: Array, dtype: np.dtype[np.generic], place: str) -> Array:
    """Floats of any width into floats, whole numbers into whole numbers that hold them; nothing across."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "f" and dtype.kind == "f":
        return array.astype(dtype)
    if array.dtype.kind in "iub" and dtype.kind in "iub":
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype.name).min, np.iinfo(dtype.name).max)
        if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
            raise DataError(f"holds {array.dtype} values that {dtype} can't", where=place)
        return array.astype(dtype)
    fix = None
    if array.dtype.kind in "iu" and dtype.kind == "f":
        fix = "declare how numbers become the model's floats (preprocessing, kind = 'array' or 'image')"
    raise DataError(f"is {array.dtype}, the model takes {dtype}", where=place, fix=fix)
