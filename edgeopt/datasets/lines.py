"""One sample per line of a text file: JSON objects or plain texts."""

from __future__ import annotations

import gzip
import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgeopt.datasets.blob import Blob
from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.datasets.labels import INPUT_KEYS, LABEL_KEYS, ClassLabels, LabelColumn
from edgeopt.datasets.pairs import TextPair, pair_of_row, pair_of_text
from edgeopt.datasets.sequences import writes
from edgeopt.datasets.transform import Preprocessor, as_array
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Array, Preprocessing, Sample, TensorSpec, TextPreprocessing

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = Mapping[str, object]


class LineDataset(IndexedDataset):
    """Remembers where each line starts and what its class is: sixteen bytes a sample. Blank lines don't count.

    The file is read once when opened, so that a line that can't be parsed is known before any work is done.

    Args:
        path: a .jsonl or .txt file, or one of these with .gz.
        parse: (line, what to call it in messages) -> its fields; raises DataError.
        raw: fields -> what the preprocessor takes.
        label_keys: fields that may hold the label: a class index, a class name, or numbers.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes, str], Row],
        raw: Callable[[Row, str], object],
        label_keys: tuple[str, ...],
        preprocess: Preprocessor,
    ) -> None:
        self._name = path.name
        self._parse = parse
        self._raw = raw
        self._preprocess = preprocess
        self._blob = open_blob(path)
        self._starts = array("Q")
        self._blanks = array("Q")  # For each blank line, how many samples come before it.
        self._label_key: str | None = None
        self._classes: ClassLabels | None = None
        self._index(label_keys)

    @property
    def is_labelled(self) -> bool:
        return self._label_key is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._classes is None else self._classes.names

    def __len__(self) -> int:
        return len(self._starts)

    def _load(self, index: int) -> Sample:
        where = f"{self._name}, line {self._line_number(index)}"
        row = self._parse(self._line(index), where)
        raw = self._raw(row, where)
        if isinstance(raw, TextPair):
            inputs, target = self._preprocess.labelled(raw, where)
            return Sample(inputs, target, f"row {index}", raw.targets)
        label: int | Array | None = self.label_of(index)
        if label is None and self._label_key is not None:
            label = as_array(row.get(self._label_key), f"{where}, {self._label_key!r}")
        return Sample(self._preprocess(raw, where), label, f"row {index}")

    def label_of(self, index: int) -> int | None:
        return None if self._classes is None else self._classes.codes[index]

    def digest_of(self, index: int) -> bytes:
        return hashlib.sha256(str(self.label_of(index)).encode() + b"\0" + self._line(index)).digest()

    def _index(self, label_keys: tuple[str, ...]) -> None:
        offset, column = 0, LabelColumn()
        for number, line in enumerate(self._blob.lines(), start=1):
            start, offset = offset, offset + len(line)
            if not line.strip().removeprefix(BYTE_ORDER_MARK):
                self._blanks.append(len(self._starts))
                continue
            where = f"{self._name}, line {number}"
            row = self._parse(line, where)
            if not self._starts:
                self._label_key = next((key for key in label_keys if key in row), None)
            self._starts.append(start)
            if self._label_key is not None:
                self._add_label(row.get(self._label_key), column, where)
        if len(column):
            self._classes = column.freeze()

    def _add_label(self, value: object, column: LabelColumn, where: str) -> None:
        """The first row decides: a whole number or a text is a class, all else is read with its row."""
        if value is None:
            raise DataError(f"has no {self._label_key!r}, though the first line has", where=where)
        if len(column) < len(self._starts) - 1:
            return
        if isinstance(value, int | str):
            column.add(value if isinstance(value, str) else int(value), where)
        elif len(column):
            raise DataError(f"the label {value!r} is no class index or name, as on the first line", where=where)

    def _line(self, index: int) -> bytes:
        end = self._starts[index + 1] if index + 1 < len(self._starts) else self._blob.size
        # Blank lines that follow are within the span.
        return self._blob.read(self._starts[index], end - self._starts[index]).split(b"\n", 1)[0]

    def _line_number(self, index: int) -> int:
        return index + 1 + bisect_right(self._blanks, index)


class PairLines(LineDataset):
    """One `TextPair` a line; labelled with the targets where the first line has one.

    Args:
        path: a .jsonl or .txt file, or one of these with .gz.
        pair: (line, what to call it in messages) -> its texts; raises DataError.
    """

    def __init__(self, path: Path, pair: Callable[[bytes, str], TextPair], preprocess: Preprocessor) -> None:
        self._pair = pair
        self._has_targets: bool | None = None
        super().__init__(path, self._row, _pair_of, (), preprocess)

    @property
    def is_labelled(self) -> bool:
        return bool(self._has_targets)

    def _row(self, line: bytes, where: str) -> Row:
        pair = self._pair(line, where)
        if self._has_targets is None:
            self._has_targets = bool(pair.targets)
        if self._has_targets and not pair.targets:
            raise DataError("has no target, though the first line has", where=where)
        return {"pair": pair}


def _pair_of(row: Row, where: str) -> object:
    del where
    return row["pair"]


def open_lines(
    path: Path, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None, preprocess: Preprocessor
) -> LineDataset:
    """A .txt file (one text a line, unlabelled) or a .jsonl file of texts or of arrays named like the inputs.

    Raises DataError naming the first line that can't be read, UsageError when texts come without a tokenizer.
    """
    is_plain = path.name.removesuffix(".gz").endswith(".txt")
    if isinstance(preprocessing, TextPreprocessing) and writes(preprocessing, inputs):
        return PairLines(path, _pair_parser(preprocessing, is_plain=is_plain), preprocess)
    if isinstance(preprocessing, TextPreprocessing):
        keys = ("text",) if is_plain else preprocessing.text_keys
        label_keys = tuple(key for key in LABEL_KEYS if key not in keys)
        parse = _parse_text if is_plain else _parse_json
        return LineDataset(path, parse, lambda row, where: _texts(row, keys, where), label_keys, preprocess)
    if is_plain:
        raise UsageError(
            "texts need a tokenizer", where=path.name, fix="declare preprocessing (kind = 'text', tokenizer)"
        )
    names = {spec.name for spec in inputs}
    label_keys = tuple(key for key in LABEL_KEYS if key not in names)
    return LineDataset(path, _parse_json, lambda row, where: _arrays(row, inputs, where), label_keys, preprocess)


def open_blob(path: Path) -> Blob:
    """Its bytes, unpacked where it ends in .gz. Raises DataError where it can't be read."""
    if path.suffix != ".gz":
        return Blob.of_file(path)
    try:
        with gzip.open(path) as stream:
            return Blob.unpacked(stream, path.name)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", where=path.name) from error


def _parse_json(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", where=where) from error
    if not isinstance(row, dict):
        raise DataError("is not a JSON object", where=where, fix="write one {...} per line")
    return row


def _parse_text(line: bytes, where: str) -> Row:
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error}", where=where) from error


def _pair_parser(preprocessing: TextPreprocessing, *, is_plain: bool) -> Callable[[bytes, str], TextPair]:
    def plain(line: bytes, where: str) -> TextPair:
        return pair_of_text(str(_parse_text(line, where)["text"]), preprocessing)

    def json_object(line: bytes, where: str) -> TextPair:
        return pair_of_row(_parse_json(line, where), preprocessing, where)

    return plain if is_plain else json_object


def _texts(row: Row, keys: tuple[str, ...], where: str) -> str | tuple[str, ...]:
    texts: list[str] = []
    for key in keys:
        text = row.get(key)
        if not isinstance(text, str):
            problem = f"{key!r} is not a text" if key in row else f"has no {key!r} (it has {', '.join(row)})"
            raise DataError(problem, where=where, fix="set text_keys to the keys that hold the texts")
        texts.append(text)
    return texts[0] if len(texts) == 1 else tuple(texts)


def _arrays(row: Row, inputs: tuple[TensorSpec, ...], where: str) -> dict[str, Array]:
    """The row's arrays by input name. JSON has one kind of number, so whole ones do for float inputs."""
    arrays: dict[str, Array] = {}
    for spec in inputs:
        keys = (spec.name, *INPUT_KEYS) if len(inputs) == 1 else (spec.name,)
        key = next((key for key in keys if key in row), None)
        if key is not None:
            array = as_array(row[key], f"{where}, {key!r}")
            is_whole = array.dtype.kind in "iu" and spec.dtype.startswith("float")
            arrays[spec.name] = array.astype(np.float64) if is_whole else array
    return arrays
