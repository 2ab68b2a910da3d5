"""Pictures or recordings in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeopt.datasets.indexed import IndexedDataset
from edgeopt.datasets.listing import Listing, list_csv, list_folder
from edgeopt.datasets.transform import Preprocessor
from edgeopt.errors import DataError, UsageError
from edgeopt.types import AudioPreprocessing, ImagePreprocessing, Preprocessing, Sample

SUFFIXES = {"image": (".jpg", ".jpeg", ".png", ".webp", ".bmp"), "audio": (".wav",)}


class MediaDataset(IndexedDataset):
    """One sample per file; a file is opened when its sample is asked for."""

    def __init__(self, listing: Listing, preprocess: Preprocessor) -> None:
        self._listing = listing
        self._preprocess = preprocess

    @property
    def is_labelled(self) -> bool:
        return self._listing.labels is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._listing.labels is None else self._listing.labels.names

    def __len__(self) -> int:
        return len(self._listing.names)

    def _load(self, index: int) -> Sample:
        name = self._listing.names[index]
        return Sample(self._preprocess(self._path(index), name), self.label_of(index), name)

    def label_of(self, index: int) -> int | None:
        return None if self._listing.labels is None else self._listing.labels.codes[index]

    def digest_of(self, index: int) -> bytes:
        name = self._listing.names[index]
        try:
            with self._path(index).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"can't be read: {error.strerror}", where=name) from error
        return hashlib.sha256(f"{name}\0{self.label_of(index)}\0{content}".encode()).digest()

    def _path(self, index: int) -> Path:
        return self._listing.root / self._listing.names[index]


def open_media(path: Path, preprocessing: Preprocessing | None, preprocess: Preprocessor) -> MediaDataset:
    """A folder or a CSV of pictures or recordings; which of them, the preprocessing says.

    Raises UsageError when it says neither, DataError when there are none.
    """
    if not isinstance(preprocessing, ImagePreprocessing | AudioPreprocessing):
        kind = "none" if preprocessing is None else repr(preprocessing.kind)
        raise UsageError(
            f"holds pictures or recordings, but the declared preprocessing is {kind}",
            where=str(path),
            fix="declare preprocessing of kind 'image' or 'audio'",
        )
    suffixes = SUFFIXES[preprocessing.kind]
    listing = list_folder(path, suffixes) if path.is_dir() else list_csv(path)
    if not listing.names:
        wanted = f": no {', '.join(suffixes)} files" if path.is_dir() else ""
        raise DataError(f"is empty{wanted}", where=str(path))
    return MediaDataset(listing, preprocess)
