"""Arrays in .npy and .npz files, one sample per row."""

from __future__ import annotations

from pathlib import Path

from edgeopt.datasets.blob import Blob
from edgeopt.datasets.fit import only_input
from edgeopt.datasets.indexed import IndexedDataset, digest_arrays
from edgeopt.datasets.labels import INPUT_KEYS, LABEL_KEYS, ClassLabels, LabelColumn
from edgeopt.datasets.rows import Archive, Rows
from edgeopt.datasets.transform import Preprocessor
from edgeopt.errors import DataError
from edgeopt.types import Array, Sample, TensorSpec


class ArrayDataset(IndexedDataset):
    """Rows of one array per model input, and labels.

    Args:
        name: of the file.
        columns: input name -> its array.
        labels: class indices (integers, N or N x 1), class names, or any other array, whose rows are the labels.
    """

    def __init__(self, name: str, columns: dict[str, Rows], labels: Rows | None, preprocess: Preprocessor) -> None:
        self._name = name
        self._columns = columns
        self._preprocess = preprocess
        lengths = {key: len(rows) for key, rows in columns.items()}
        if labels is not None:
            lengths["label"] = len(labels)
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise DataError(f"arrays differ in length: {text}", where=name)
        self._length = next(iter(lengths.values()))
        self._classes = None if labels is None else _class_labels(labels, name)
        self._targets = labels if self._classes is None else None

    @classmethod
    def from_npy(cls, path: Path, inputs: tuple[TensorSpec, ...], preprocess: Preprocessor) -> ArrayDataset:
        """A single array for a model with a single input, unlabelled."""
        spec = only_input(inputs, ".npy files")
        return cls(path.name, {spec.name: Rows(Blob.of_file(path))}, None, preprocess)

    @classmethod
    def from_npz(cls, path: Path, inputs: tuple[TensorSpec, ...], preprocess: Preprocessor) -> ArrayDataset:
        """Arrays named like the inputs (for a single input also x or inputs), and label, labels or y."""
        archive = Archive(path)
        names = {spec.name: spec.name for spec in inputs if spec.name in archive.names}
        stand_in = next((key for key in INPUT_KEYS if key in archive.names), None)
        if not names and len(inputs) == 1 and stand_in is not None:
            names = {inputs[0].name: stand_in}
        missing = [spec.name for spec in inputs if spec.name not in names]
        if missing:
            raise DataError(
                f"has no array {missing[0]!r} (it has {', '.join(archive.names) or 'none'})",
                where=path.name,
                fix="name the arrays like the model's inputs",
            )
        columns = {name: archive.rows(member) for name, member in names.items()}
        label = next((key for key in LABEL_KEYS if key in archive.names and key not in names.values()), None)
        return cls(path.name, columns, None if label is None else archive.rows(label), preprocess)

    @property
    def is_labelled(self) -> bool:
        return self._classes is not None or self._targets is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._classes is None else self._classes.names

    def __len__(self) -> int:
        return self._length

    def _load(self, index: int) -> Sample:
        rows = {name: rows[index] for name, rows in self._columns.items()}
        # A lone array may be a picture, which only a bare array can be.
        raw = next(iter(rows.values())) if len(rows) == 1 else rows
        inputs = self._preprocess(raw, f"{self._name}, row {index}")
        return Sample(inputs, self._label(index), f"row {index}")

    def label_of(self, index: int) -> int | None:
        return None if self._classes is None else self._classes.codes[index]

    def digest_of(self, index: int) -> bytes:
        return digest_arrays({name: rows[index] for name, rows in self._columns.items()}, self._label(index))

    def _label(self, index: int) -> int | Array | None:
        return self.label_of(index) if self._targets is None else self._targets[index]


def _class_labels(rows: Rows, where: str) -> ClassLabels | None:
    """The labels if they are class indices or class names, else None."""
    if rows.shape[1:] not in ((), (1,)) or rows.dtype.kind not in "iuUS":
        return None
    column = LabelColumn()
    for index in range(len(rows)):
        label = rows[index].reshape(()).item()
        column.add(label.decode() if isinstance(label, bytes) else label, f"{where}, row {index}")
    return column.freeze()
