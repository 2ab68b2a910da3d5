"""One raw item -> the model's inputs: the declared preprocessing, then the check that the result fits."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import numpy as np

from edgeopt.datasets.declared import check_preprocessing
from edgeopt.datasets.fit import fit_inputs
from edgeopt.errors import DataError
from edgeopt.types import Array, Preprocessing, TensorSpec


class Transform(Protocol):
    """Applies one kind of preprocessing. Made once per data set: it may hold a tokenizer."""

    def __call__(self, raw: object, where: str) -> dict[str, Array] | None:
        """The model's inputs; None when `raw` is not of this kind, so is taken to be ready for the model."""
        ...


@runtime_checkable
class LabellingTransform(Transform, Protocol):
    """A transform that finds the label in the raw item too."""

    def prepare(self, raw: object, where: str) -> tuple[dict[str, Array], Array | None] | None:
        """The model's inputs and the label; None as above."""
        ...


class TransformFactory(Protocol):
    def __call__(self, preprocessing: Preprocessing, inputs: tuple[TensorSpec, ...]) -> Transform: ...


TRANSFORMS: dict[str, str] = {
    "image": "edgeopt.datasets.image:ImageTransform",
    "text": "edgeopt.datasets.sequences:text_transform",
    "audio": "edgeopt.datasets.audio:AudioTransform",
    "array": "edgeopt.datasets.array:ArrayTransform",
}


class Preprocessor:
    """The only way from a raw item to model inputs, in calibration and in evaluation.

    Args:
        preprocessing: what is declared; None takes arrays as they are.
        inputs: the model's inputs.

    Raises ConfigError when the declaration makes no sense or doesn't suit the inputs, MissingError when it needs a
    package that is not installed.
    """

    def __init__(self, preprocessing: Preprocessing | None, inputs: tuple[TensorSpec, ...]) -> None:
        self._inputs = inputs
        self._transform: Transform | None = None
        if preprocessing is not None:
            check_preprocessing(preprocessing)
            module, _, name = TRANSFORMS[preprocessing.kind].partition(":")
            factory = cast(TransformFactory, getattr(import_module(module), name))
            self._transform = factory(preprocessing, inputs)

    def __call__(self, raw: object, where: str) -> dict[str, Array]:
        """Preprocess and check one item.

        Args:
            raw: for "image" a path, a PIL picture or a uint8 array (H, W) or (H, W, C); for "text" a text or a tuple
                of texts; for "audio" the path of a WAV file; arrays otherwise: one, or input name -> array.
            where: names the item in messages.

        Raises DataError when the item can't be read or doesn't fit the model.
        """
        return self.labelled(raw, where)[0]

    def labelled(self, raw: object, where: str) -> tuple[dict[str, Array], Array | None]:
        """The same, and the label that the item itself holds, as a `TextPair` does; None where it holds none."""
        transform, label = self._transform, None
        arrays: dict[str, Array] | None = None
        if isinstance(transform, LabellingTransform):
            arrays, label = transform.prepare(raw, where) or (None, None)
        elif transform is not None:
            arrays = transform(raw, where)
        if arrays is None:
            arrays = name_arrays(raw, self._inputs, where)
        return fit_inputs(arrays, self._inputs, where), label


def name_arrays(raw: object, inputs: tuple[TensorSpec, ...], where: str) -> dict[str, Array]:
    """Arrays by input name; a bare array is the model's only input."""
    if isinstance(raw, Mapping):
        return {str(name): as_array(value, f"{where}, {name!r}") for name, value in raw.items()}
    if len(inputs) > 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(f"is one array, the model has {len(inputs)} inputs ({names})", where=where)
    return {inputs[0].name: as_array(raw, where)}


def as_array(value: object, where: str) -> Array:
    """A tensor, an array, a number or nested lists of numbers as a NumPy array. Raises DataError for all else."""
    detach = getattr(value, "detach", None)
    if callable(detach):
        # A torch tensor, maybe on an accelerator and part of a graph; torch itself need not be imported to know.
        value = detach().cpu()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise DataError(f"is not an array: {error}", where=where) from error
    if array.dtype.kind not in "fiub":
        kind = "text" if array.dtype.kind in "US" else type(value).__name__
        raise DataError(f"is {kind}, not an array of numbers", where=where, fix="declare preprocessing for it")
    return array
