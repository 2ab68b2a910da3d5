"""What a user's data set gives as one item, told apart into input and label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgeopt.datasets.fit import fit_inputs
from edgeopt.datasets.labels import LABEL_KEYS
from edgeopt.datasets.pairs import TextPair, pair_of_row, pair_of_text
from edgeopt.datasets.sequences import writes
from edgeopt.datasets.transform import Preprocessor, as_array
from edgeopt.errors import DataError
from edgeopt.types import Array, Preprocessing, Sample, TensorSpec, TextPreprocessing


class ItemReader:
    """Item -> `Sample`.

    An item is a `Sample` (taken as it is); an array; a dictionary input name -> array, maybe with `label`; or a tuple
    of the inputs, maybe followed by the label. In place of arrays there may be what the preprocessing takes: a
    picture, a text, a path.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        preprocessing: Preprocessing | None,
        preprocess: Preprocessor,
        class_names: tuple[str, ...],
    ) -> None:
        self._names = tuple(spec.name for spec in inputs)
        self._inputs = inputs
        self._text_keys = preprocessing.text_keys if isinstance(preprocessing, TextPreprocessing) else ()
        self._written: TextPreprocessing | None = None
        if isinstance(preprocessing, TextPreprocessing) and writes(preprocessing, inputs):
            self._written = preprocessing
        self._preprocess = preprocess
        self._class_index = {name: index for index, name in enumerate(class_names)}

    def read(self, item: object, index: int) -> Sample:
        """Raises DataError when the item is of no known form, or doesn't fit the model."""
        where = f"item {index}"
        if isinstance(item, Sample):
            return replace(item, inputs=fit_inputs(item.inputs, self._inputs, item.name or where))
        pair = self._pair(item, where)
        if pair is not None:
            arrays, target = self._preprocess.labelled(pair, where)
            return Sample(arrays, target, where, pair.targets)
        raw, label = self._split(item, where)
        return Sample(self._preprocess(self._raw(raw, where), where), self.label(label, where), where)

    def label(self, label: object, where: str) -> int | Array | None:
        """A class index where it is one number or a class name, else an array."""
        if label is None:
            return None
        if isinstance(label, str):
            if label not in self._class_index:
                raise DataError(
                    f"has the label {label!r}, which is not among the data set's class names",
                    where=where,
                    fix="give class indices, or an attribute class_names",
                )
            return self._class_index[label]
        array = as_array(label, f"{where}, label")
        return int(array.reshape(())) if array.dtype.kind in "iub" and array.size == 1 else array

    def _pair(self, item: object, where: str) -> TextPair | None:
        """A text and its target; None where the item is something else, or the model writes nothing."""
        if self._written is None:
            return None
        if isinstance(item, TextPair):
            return item
        if isinstance(item, str):
            return pair_of_text(item, self._written)
        if isinstance(item, Mapping) and not any(name in item for name in self._names):
            return pair_of_row(item, self._written, where)
        if isinstance(item, tuple | list) and len(item) == 2 and _is_texts(item):
            return TextPair(str(item[0]), (str(item[1]),))
        return None

    def _split(self, item: object, where: str) -> tuple[object, object]:
        if isinstance(item, Mapping):
            key = next((key for key in LABEL_KEYS if key in item and key not in (*self._names, *self._text_keys)), None)
            return {k: v for k, v in item.items() if k != key}, None if key is None else item[key]
        if not isinstance(item, tuple | list) or not item or _is_numbers(item):
            return item, None
        count = len(self._names)
        if len(item) == 2 and (count == 1 or isinstance(item[0], str | Mapping | tuple | list)):
            return item[0], item[1]
        if len(item) == count:
            return _named(self._names, item), None
        if len(item) == count + 1:
            return _named(self._names, item[:-1]), item[-1]
        raise DataError(
            f"is a tuple of {len(item)}, the model has {count} inputs ({', '.join(self._names)})",
            where=where,
            fix="give the inputs in order, then the label",
        )

    def _raw(self, raw: object, where: str) -> object:
        """What the preprocessor takes; a lone input is not wrapped."""
        if isinstance(raw, Mapping):
            if self._text_keys and all(isinstance(raw.get(key), str) for key in self._text_keys):
                return raw[self._text_keys[0]] if len(self._text_keys) == 1 else tuple(raw[k] for k in self._text_keys)
            if len(self._names) == 1 and self._names[0] in raw:
                return self._raw(raw[self._names[0]], where)
            return raw
        if isinstance(raw, tuple | list) and len(self._names) > 1 and not _is_texts(raw):
            return _named(self._names, raw)
        if isinstance(raw, list) and _is_texts(raw):
            return tuple(raw)
        return as_array(raw, where) if hasattr(raw, "detach") else raw


def _named(names: tuple[str, ...], values: tuple[object, ...] | list[object]) -> object:
    """Values by input name; the only one by itself."""
    return values[0] if len(names) == 1 else dict(zip(names, values, strict=False))


def _is_numbers(values: tuple[object, ...] | list[object]) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float | np.generic) for value in values)


def _is_texts(values: tuple[object, ...] | list[object]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)
