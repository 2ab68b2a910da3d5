"""Parallel texts: two files of which line k of the one is to be written for line k of the other."""

from __future__ import annotations

import hashlib
import re
from array import array
from itertools import zip_longest
from pathlib import Path

from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.datasets.lines import BYTE_ORDER_MARK, open_blob
from edgeopt.datasets.pairs import TextPair
from edgeopt.datasets.transform import Preprocessor
from edgeopt.errors import DataError, UsageError
from edgeopt.types import Preprocessing, Sample, TextPreprocessing

#: "dir/train.{en,de}.gz": the source's file, then the target's.
_PATTERN = re.compile(r"(?P<before>[^{}]*)\{(?P<source>[^{},]+),(?P<target>[^{},]+)\}(?P<after>[^{}]*)")


def parallel_files(spec: str) -> tuple[Path, Path] | None:
    """The files that a brace pattern names; None where it is no such pattern."""
    match = _PATTERN.fullmatch(spec)
    if match is None:
        return None
    before, after = match["before"], match["after"]
    source, target = (Path(f"{before}{match[side].strip()}{after}").expanduser() for side in ("source", "target"))
    return source, target


def open_parallel(
    files: tuple[Path, Path], preprocessing: Preprocessing | None, preprocess: Preprocessor
) -> ParallelDataset:
    """Raises DataError where a file can't be read or the two don't go together, UsageError without a tokenizer."""
    where = f"{files[0].name} and {files[1].name}"
    if not isinstance(preprocessing, TextPreprocessing):
        raise UsageError("texts need a tokenizer", where=where, fix="declare preprocessing (kind = 'text', tokenizer)")
    if preprocessing.target_key is None:
        raise UsageError(
            "pairs of texts are for a network that writes", where=where, fix="declare target-key in its preprocessing"
        )
    return ParallelDataset(files, preprocess)


class ParallelDataset(IndexedDataset):
    """Remembers where each line starts: sixteen bytes a pair. Where both lines are blank the pair doesn't count.

    The files are read once when opened: other numbers of lines, or a blank line beside one that is not, mean that
    every later pair may be a wrong one.
    """

    def __init__(self, files: tuple[Path, Path], preprocess: Preprocessor) -> None:
        self._names = tuple(file.name for file in files)
        self._blobs = tuple(map(open_blob, files))
        self._preprocess = preprocess
        self._starts = (array("Q"), array("Q"))
        self._numbers = array("Q")
        self._index()

    @property
    def is_labelled(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self._numbers)

    def pair(self, index: int) -> TextPair:
        source, target = (self._text(side, index) for side in (0, 1))
        return TextPair(source, (target,))

    def _load(self, index: int) -> Sample:
        pair = self.pair(index)
        inputs, label = self._preprocess.labelled(pair, self._where(0, index))
        return Sample(inputs, label, f"line {self._numbers[index]}", pair.targets)

    def digest_of(self, index: int) -> bytes:
        return hashlib.sha256(self._line(0, index) + b"\0" + self._line(1, index)).digest()

    def _index(self) -> None:
        offsets = [0, 0]
        for number, lines in enumerate(zip_longest(*(blob.lines() for blob in self._blobs)), start=1):
            if None in lines:
                counts = [sum(1 for _ in blob.lines()) for blob in self._blobs]
                raise DataError(
                    f"{self._names[0]} has {counts[0]} lines and {self._names[1]} {counts[1]}",
                    where="parallel texts",
                    fix="give files of which line k of the one belongs to line k of the other",
                )
            starts = tuple(offsets)
            offsets = [offset + len(line) for offset, line in zip(offsets, lines, strict=True)]
            blank = [not line.removeprefix(BYTE_ORDER_MARK).strip() for line in lines]
            if any(blank):
                if all(blank):
                    continue
                raise DataError(
                    f"is blank, and not so in {self._names[blank.index(False)]}",
                    where=f"{self._names[blank.index(True)]}, line {number}",
                    fix="remove that line from both files",
                )
            for side in (0, 1):
                self._starts[side].append(starts[side])
            self._numbers.append(number)

    def _text(self, side: int, index: int) -> str:
        try:
            return self._line(side, index).decode("utf-8-sig").rstrip("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8: {error}", where=self._where(side, index)) from error

    def _where(self, side: int, index: int) -> str:
        return f"{self._names[side]}, line {self._numbers[index]}"

    def _line(self, side: int, index: int) -> bytes:
        starts, blob = self._starts[side], self._blobs[side]
        end = starts[index + 1] if index + 1 < len(starts) else blob.size
        # Blank lines that follow are within the span.
        return blob.read(starts[index], end - starts[index]).split(b"\n", 1)[0]
