"""Opening a bundle: nothing in it is believed before its hash is verified, and nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgeopt.bundle.consistency import check_consistency
from edgeopt.bundle.contents import GoldenVector
from edgeopt.bundle.generation_manifest import refuse_generation_bundle
from edgeopt.bundle.manifest import ADDED, MANIFEST, REPORT, UNLISTED, FileEntry, Manifest, StoredArray, parse_manifest
from edgeopt.errors import TamperedError, UsageError
from edgeopt.json_data import loads
from edgeopt.report_file import from_json, seal
from edgeopt.targets.schema import Target
from edgeopt.types import (
    Array,
    Format,
    Gates,
    Precision,
    Preprocessing,
    Report,
    Signature,
    StepRecord,
    TextPreprocessing,
)


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A verified bundle. `path` and everything derived from it is absolute or relative as the caller gave it."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def target(self) -> Target:
        """The target as used, with the gates of that run."""
        return self.manifest.target_definition

    @property
    def gates(self) -> Gates:
        return self.target.gates

    @property
    def device(self) -> str:
        return self.manifest.device

    @property
    def status(self) -> Literal["passed", "failed"]:
        return self.manifest.status

    @property
    def format(self) -> Format:
        return self.manifest.format

    @property
    def precision(self) -> Precision:
        return self.manifest.precision

    @property
    def model_path(self) -> Path:
        return self.path / self.manifest.model.file

    @property
    def runnable_path(self) -> Path:
        """What runs on a computer: the model, or the file that stands in for it."""
        return self.path / self.manifest.model.runnable

    @property
    def signature(self) -> Signature:
        return self.manifest.model.signature

    @property
    def float_path(self) -> Path | None:
        """The float twin; None when the bundle leaves it out."""
        return self.path / self.manifest.float_twin.file if self.manifest.float_twin else None

    @property
    def float_signature(self) -> Signature | None:
        return self.manifest.float_twin.signature if self.manifest.float_twin else None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """With a tokenizer's path pointing into the bundle."""
        preprocessing = self.manifest.preprocessing
        if isinstance(preprocessing, TextPreprocessing):
            return replace(preprocessing, tokenizer=str(self.path / preprocessing.tokenizer))
        return preprocessing

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    @property
    def history(self) -> tuple[StepRecord, ...]:
        return self.manifest.history

    @property
    def tools(self) -> Mapping[str, str]:
        return self.manifest.tools

    @property
    def source_sha256(self) -> str:
        return self.manifest.source_sha256

    def file(self, relative: str) -> FileEntry:
        """Hash and size of one file of the bundle, e.g. of `manifest.model.file`."""
        return self.manifest.files[relative]

    def golden(self) -> Iterator[GoldenVector]:
        """The golden vectors, loaded one at a time. Raises TamperedError when a file doesn't fit its shape."""
        for vector in self.manifest.golden:
            label = vector.label
            yield GoldenVector(
                inputs={name: self._load(stored) for name, stored in vector.inputs.items()},
                outputs={name: self._load(stored) for name, stored in vector.outputs.items()},
                reference={name: self._load(stored) for name, stored in vector.reference.items()},
                label=self._load(label) if isinstance(label, StoredArray) else label,
            )

    def report(self) -> Report:
        """What the run that wrote the bundle found. Raises UsageError when report.json is malformed."""
        return from_json((self.path / REPORT).read_bytes(), str(self.path / REPORT))

    def _load(self, stored: StoredArray) -> Array:
        raw = (self.path / stored.file).read_bytes()
        dtype = np.dtype(stored.dtype).newbyteorder("<")
        count = 1
        for size in stored.shape:
            count *= size
        if min(stored.shape, default=0) < 0 or count * dtype.itemsize != len(raw):
            raise TamperedError(f"does not hold {stored.shape} of {stored.dtype}", where=str(self.path / stored.file))
        return np.frombuffer(raw, dtype).reshape(stored.shape).astype(stored.dtype)


def open_bundle(path: Path) -> LoadedBundle:
    """Parse and verify a bundle.

    Raises UsageError when `path` isn't a bundle, or one of a version that we don't know; TamperedError naming the
    file when one is missing, changed, added, a link or something else than a file, or leads out of the directory, and
    when manifest and report contradict themselves or each other.
    """
    if not path.is_dir():
        fix = "unpack it first, if it is a .zip" if path.is_file() else None
        raise UsageError("is not a bundle directory", where=str(path), fix=fix)
    refuse_generation_bundle(path)
    if not (path / MANIFEST).is_file():
        raise UsageError(f"is not a bundle: it has no {MANIFEST}", where=str(path))
    present = set(_regular_files(path))
    text = _read(path / MANIFEST)
    manifest = parse_manifest(text, str(path / MANIFEST))
    check_consistency(manifest, str(path / MANIFEST))
    expected = {*manifest.files, *UNLISTED}
    for name in sorted(expected - present - ADDED):
        raise TamperedError("is missing from the bundle", where=str(path / name))
    for name in sorted(present - expected):
        raise TamperedError("is not in the manifest", where=str(path / name), fix="remove it from the bundle")
    for name, entry in sorted(manifest.files.items()):
        _verify(path / name, entry)
    _verify_report(path / REPORT, hashlib.sha256(text).hexdigest(), manifest)
    return LoadedBundle(path, manifest)


def _regular_files(root: Path) -> Iterator[str]:
    """Relative names of all files. Raises TamperedError at anything that is neither a file nor a directory."""
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield path.relative_to(root).as_posix()
            elif not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise TamperedError(f"is {kind}; a bundle holds plain files only", where=str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror}", where=str(path)) from error


def _verify(path: Path, entry: FileEntry) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror}", where=str(path)) from error
    if digest != entry.sha256 or path.stat().st_size != entry.size_bytes:
        raise TamperedError("is not the file that the manifest describes (SHA-256 differs)", where=str(path))


def _verify_report(path: Path, manifest_sha256: str, manifest: Manifest) -> None:
    """report.json can't be in the manifest's own list (it holds times), so it names the manifest and its own hash."""
    report = loads(_read(path), str(path))
    if not isinstance(report, dict) or report.get("manifest_sha256") != manifest_sha256:
        raise TamperedError(f"belongs to another {MANIFEST}, or that one was changed", where=str(path))
    if report.get("sha256") != seal(report):
        raise TamperedError("was changed (its SHA-256 differs)", where=str(path))
    if report.get("status") != manifest.status:
        raise TamperedError(f"says {report.get('status')!r}, and {MANIFEST} {manifest.status!r}", where=str(path))
