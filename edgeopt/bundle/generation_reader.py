"""Opening the bundle of a network that writes: every hash of every part is verified, and nothing in it is executed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np

from edgeopt.bundle.generation_consistency import contradictions
from edgeopt.bundle.generation_contents import GoldenSequence, WrittenExample
from edgeopt.bundle.generation_manifest import (
    EXAMPLES,
    GENERATION,
    GOLDEN,
    TOP_UNLISTED,
    GenerationManifest,
    parse_generation_manifest,
)
from edgeopt.bundle.generation_stored import StoredSequence
from edgeopt.bundle.manifest import MANIFEST, REPORT, FileEntry
from edgeopt.bundle.reader import LoadedBundle, open_bundle
from edgeopt.errors import TamperedError, UsageError
from edgeopt.formats.files import sha256_of
from edgeopt.json_data import from_plain, loads
from edgeopt.report_file import from_json, seal
from edgeopt.targets.schema import Target
from edgeopt.types import (
    Array,
    Format,
    Gates,
    Generation,
    PartName,
    Precision,
    Preprocessing,
    Report,
    TextPreprocessing,
)


@dataclass(frozen=True, slots=True)
class GenerationBundle:
    """A verified bundle of a network that writes.

    Attributes:
        parts: the ordinary bundles, opened and verified.
    """

    path: Path
    manifest: GenerationManifest
    parts: Mapping[PartName, LoadedBundle]

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
    def generation(self) -> Generation:
        return self.manifest.generation

    @property
    def beams(self) -> int:
        """Rows of the decoder, and what the report's texts were searched with."""
        return self.manifest.beams

    @property
    def length_penalty(self) -> float:
        return self.manifest.length_penalty

    @property
    def metric(self) -> str | None:
        return self.manifest.metric

    @property
    def metric_signature(self) -> str | None:
        return self.manifest.metric_signature

    @property
    def size_bytes(self) -> int:
        """Of the model files together."""
        return self.manifest.size_bytes

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json; None where the bundle has none."""
        return self.path / self.manifest.tokenizer if self.manifest.tokenizer is not None else None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Of the whole network, with a tokenizer's path pointing into the bundle."""
        preprocessing = self.manifest.preprocessing
        if isinstance(preprocessing, TextPreprocessing):
            return replace(preprocessing, tokenizer=str(self.path / preprocessing.tokenizer))
        return preprocessing

    def report(self) -> Report:
        """What the run that wrote the bundle found. Raises UsageError when report.json is malformed."""
        return from_json((self.path / REPORT).read_bytes(), str(self.path / REPORT))

    def golden(self) -> tuple[GoldenSequence, ...]:
        """Prompts with what the shipped files write. Raises UsageError or TamperedError, naming the line, at one that
        is malformed."""
        return tuple(self._sequence(line, where) for line, where in self._lines(GOLDEN))

    def examples(self) -> tuple[WrittenExample, ...]:
        """Raises UsageError naming the line at one that is malformed."""
        return tuple(from_plain(WrittenExample, loads(line, where), where) for line, where in self._lines(EXAMPLES))

    def _lines(self, name: str) -> Iterator[tuple[bytes, str]]:
        lines = (self.path / name).read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line:
                yield line, f"{self.path / name}: line {number}"

    def _sequence(self, line: bytes, where: str) -> GoldenSequence:
        stored = from_plain(StoredSequence, loads(line, where), where)
        if (stored.prompt is None) != bool(stored.inputs):
            raise TamperedError("has a text as well as arrays, or neither", where=where)
        if not 1 <= stored.beams <= self.beams or stored.max_new_tokens < 1:
            raise TamperedError(f"has {stored.beams} beams and {stored.max_new_tokens} tokens", where=where)
        if any(not 0 <= token < self.generation.vocabulary for token in stored.ids):
            raise TamperedError("has a token that the vocabulary hasn't", where=where)
        return GoldenSequence(
            prompt=stored.prompt,
            inputs={name: self._array(file, where) for name, file in stored.inputs.items()},
            ids=stored.ids,
            text=stored.text,
            beams=stored.beams,
            max_new_tokens=stored.max_new_tokens,
        )

    def _array(self, file: str, where: str) -> Array:
        if file not in self.manifest.files:
            raise TamperedError(f"speaks of {file!r}, which {GENERATION} does not list", where=where)
        try:
            array: Array = np.load(BytesIO((self.path / file).read_bytes()), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise TamperedError(f"is no array: {error}", where=str(self.path / file)) from error
        return array


def open_generation_bundle(path: Path) -> GenerationBundle:
    """Parse and verify a bundle of a network that writes, with all of its parts.

    Raises UsageError when `path` isn't one, or one of a version that we don't know; TamperedError naming the file when
    one is missing, changed, added or a link, when a part is not the one that generation.json speaks of, and when parts,
    report and generation.json contradict each other.
    """
    description = path / GENERATION
    if not path.is_dir():
        fix = "unpack it first, if it is a .zip" if path.is_file() else None
        raise UsageError("is not a bundle directory", where=str(path), fix=fix)
    if not description.is_file() or description.is_symlink():
        fix = "it is an ordinary bundle, or a part of one" if (path / MANIFEST).is_file() else None
        raise UsageError(
            f"is not the bundle of a network that writes: it has no {GENERATION}", where=str(path), fix=fix
        )
    text = description.read_bytes()
    manifest = parse_generation_manifest(text, str(description))
    _verify_top(path, manifest)
    parts = {part: _open_part(path, part, manifest) for part in manifest.parts}
    _verify_report(path / REPORT, sha256(text).hexdigest(), manifest)
    for problem in contradictions(manifest, {part: bundle.manifest for part, bundle in parts.items()}):
        raise TamperedError(problem, where=str(description))
    size = sum(_model_bytes(bundle) for bundle in parts.values())
    if size != manifest.size_bytes:
        raise TamperedError(
            f"says that the models take {manifest.size_bytes} bytes, not {size}", where=str(description)
        )
    return GenerationBundle(path, manifest, parts)


def _open_part(path: Path, part: PartName, manifest: GenerationManifest) -> LoadedBundle:
    entry = manifest.parts[part]
    bundle = open_bundle(path / entry.folder)
    if sha256_of(bundle.path / MANIFEST) != entry.manifest_sha256:
        raise TamperedError(f"is not the one that {GENERATION} speaks of", where=str(bundle.path / MANIFEST))
    if bundle.name != f"{manifest.name}-{part}":
        raise TamperedError(f"is of {bundle.name!r}, not of {manifest.name!r}", where=str(bundle.path / MANIFEST))
    return bundle


def _model_bytes(bundle: LoadedBundle) -> int:
    """Of the shipped model, be it a file or a directory."""
    name = bundle.manifest.model.file
    return sum(
        entry.size_bytes for file, entry in bundle.manifest.files.items() if file == name or file.startswith(f"{name}/")
    )


def _verify_top(path: Path, manifest: GenerationManifest) -> None:
    present = set(_files_outside_parts(path, frozenset(manifest.parts)))
    for name in sorted({*manifest.files, GENERATION, REPORT} - present):
        raise TamperedError("is missing from the bundle", where=str(path / name))
    for name in sorted(present - {*manifest.files, *TOP_UNLISTED}):
        raise TamperedError(f"is not in {GENERATION}", where=str(path / name), fix="remove it from the bundle")
    for name, entry in sorted(manifest.files.items()):
        _verify(path / name, entry)


def _files_outside_parts(root: Path, parts: frozenset[str]) -> Iterator[str]:
    """Relative names of all files but the parts'. Raises TamperedError at anything that is neither file nor directory,
    so that no part is a link to somewhere else."""
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                yield path.relative_to(root).as_posix()
            elif not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise TamperedError(f"is {kind}; a bundle holds plain files only", where=str(path))
        if Path(folder) == root:
            directories[:] = [name for name in directories if name not in parts]


def _verify(path: Path, entry: FileEntry) -> None:
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror}", where=str(path)) from error
    if digest != entry.sha256 or path.stat().st_size != entry.size_bytes:
        raise TamperedError(f"is not the file that {GENERATION} describes (SHA-256 differs)", where=str(path))


def _verify_report(path: Path, manifest_sha256: str, manifest: GenerationManifest) -> None:
    """report.json can't be in generation.json's own list (it holds times), so it names that file and its own hash."""
    report = loads(path.read_bytes(), str(path))
    if not isinstance(report, dict) or report.get("manifest_sha256") != manifest_sha256:
        raise TamperedError(f"belongs to another {GENERATION}, or that one was changed", where=str(path))
    if report.get("sha256") != seal(report):
        raise TamperedError("was changed (its SHA-256 differs)", where=str(path))
    if report.get("status") != manifest.status:
        raise TamperedError(f"says {report.get('status')!r}, and {GENERATION} {manifest.status!r}", where=str(path))
