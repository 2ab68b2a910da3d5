"""Labels of a whole data set in eight bytes a sample: class indices, or class names turned into them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from edgeopt.errors import DataError

#: Names under which array files, JSON lines and dictionaries hold the label.
LABEL_KEYS = ("label", "labels", "y")

#: Names under which they hold a model's only input, where it isn't called like the input.
INPUT_KEYS = ("x", "inputs", "input")


@dataclass(frozen=True, slots=True)
class ClassLabels:
    """A class index per sample, and the names by class index (empty when only numbers are known)."""

    codes: array[int]
    names: tuple[str, ...] = ()


class LabelColumn:
    """Collects one label after the other. Names get the indices of their alphabetical order.

    Digits are class indices even when written as text (a CSV file knows no numbers), so a column of both digits
    and names is a mistake: one typo would otherwise renumber every class.
    """

    def __init__(self) -> None:
        self._codes = array("q")
        self._provisional: dict[str, int] = {}
        self._first: str | None = None
        self._are_names = False

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, label: int | str, where: str) -> None:
        """Raises DataError when the label is no class index or name, or of another kind than the first."""
        text = str(label).strip()
        is_name = not text.lstrip("-").isdecimal()
        if self._first is None:
            self._first, self._are_names = text, is_name
        if not text:
            raise DataError("has no label", where=where)
        if is_name != self._are_names:
            raise DataError(f"labels mix class indices and class names ({self._first!r} and {text!r})", where=where)
        if is_name:
            self._codes.append(self._provisional.setdefault(text, len(self._provisional)))
            return
        index = int(text)
        if not 0 <= index < 2**31:
            raise DataError(f"{text} is not a class index", where=where, fix="count classes from 0")
        self._codes.append(index)

    def freeze(self) -> ClassLabels:
        if not self._are_names:
            return ClassLabels(self._codes)
        names = tuple(sorted(self._provisional))
        final = {self._provisional[name]: index for index, name in enumerate(names)}
        return ClassLabels(array("q", (final[code] for code in self._codes)), names)
