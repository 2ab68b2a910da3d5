"""A delta: what turns one bundle into the next version of it, as a .zip file. Documented in docs/shipping.md.

Unchanged files are named by their hash only, changed ones come as a patch where that is smaller than the file. Files
that the manifest doesn't list (report.json and the signature among them) always come whole, so a delta fits every
bundle with the same manifest, whatever was measured on it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeopt.bundle.archive import files_of, is_archive
from edgeopt.bundle.archive_members import open_zip
from edgeopt.bundle.archive_output import add_bytes, add_file, deflated_size
from edgeopt.bundle.delta_patch import make_patch
from edgeopt.bundle.destination import replace_file
from edgeopt.bundle.manifest import MANIFEST
from edgeopt.bundle.reader import LoadedBundle
from edgeopt.errors import UsageError
from edgeopt.formats.files import sha256_of
from edgeopt.json_data import dumps, from_plain, loads
from edgeopt.progress import Progress

SCHEMA_VERSION = 1
KIND: Literal["edgeopt-delta"] = "edgeopt-delta"
DELTA = "delta.json"
How = Literal["same", "patch", "whole"]


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """How one file of the new bundle comes about.

    Attributes:
        how: "same": it is the old bundle's `base`; "patch": `member` (BSDIFF40) applied to `base`; "whole": `member`.
        base: a file of the old bundle; `base_sha256` its hash.
        member: the name in the .zip of what is sent.
    """

    sha256: str
    size_bytes: int
    how: How
    base: str | None = None
    base_sha256: str | None = None
    member: str | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """One of the two bundles. The hash is that of its manifest.json, which holds those of all other files."""

    name: str
    target: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Delta:
    """The parsed delta.json. `files` are all of the new bundle, `removed` those of the old one that it lacks."""

    schema_version: int
    kind: Literal["edgeopt-delta"]
    old: Version
    new: Version
    files: Mapping[str, DeltaFile]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeltaCost:
    """What a delta sends. `sent`: bytes in the .zip for every file of the new bundle that isn't the same."""

    path: Path
    size_bytes: int
    delta: Delta
    sent: Mapping[str, int]


def write_delta(old: LoadedBundle, new: LoadedBundle, output: Path, progress: Progress) -> DeltaCost:
    """Write what turns `old` into `new`. The same two bundles always give the same bytes.

    Takes about ten times the size of the largest changed file in memory.

    Raises UsageError when something else is in the way or the place isn't writable, MissingError on a full disk.
    """
    for bundle in (old, new):
        if output.absolute().is_relative_to(bundle.path.absolute()):
            raise UsageError("lies inside the bundle", where=str(output), fix="choose another place")
    names = files_of(new)
    files: dict[str, DeltaFile] = {}
    with replace_file(output, is_delta) as temporary:
        with zipfile.ZipFile(temporary, "x") as archive:
            for name in progress.track(names, "Comparing", len(names)):
                files[name] = _add(archive, name, len(files), old, new)
            delta = Delta(
                schema_version=SCHEMA_VERSION,
                kind=KIND,
                old=version_of(old),
                new=version_of(new),
                files=files,
                removed=tuple(sorted(old.manifest.files.keys() - files.keys())),
            )
            add_bytes(archive, DELTA, dumps(delta).encode(), deflated=True)
        with zipfile.ZipFile(temporary) as archive:
            sent = {name: archive.getinfo(file.member).compress_size for name, file in files.items() if file.member}
    return DeltaCost(output, output.stat().st_size, delta, sent)


def version_of(bundle: LoadedBundle) -> Version:
    return Version(bundle.name, bundle.manifest.target, sha256_of(bundle.path / MANIFEST))


def is_delta(path: Path) -> bool:
    """Whether a file looks like a delta of ours."""
    try:
        with open_zip(path) as archive:
            return DELTA in archive.namelist()
    except UsageError:
        return False


def parse_delta(text: bytes, where: str) -> Delta:
    """Raises UsageError on anything but a delta of a version that we know."""
    plain = loads(text, where)
    if not isinstance(plain, dict) or plain.get("kind") != KIND:
        raise UsageError("is not the description of a delta", where=where)
    if plain.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"has schema version {plain.get('schema_version')!r}, this edgeopt reads {SCHEMA_VERSION}",
            where=where,
            fix="use the edgeopt that wrote the delta",
        )
    return from_plain(Delta, plain, where)


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The .zip file of a delta. Raises UsageError when it is none."""
    if not path.is_file():
        raise UsageError("is not there", where=str(path))
    with open_zip(path) as archive:
        if DELTA not in archive.namelist():
            what = "is a bundle, not a delta" if is_archive(path) else f"is no delta: it has no {DELTA}"
            raise UsageError(what, where=str(path))
        yield archive


def _add(archive: zipfile.ZipFile, name: str, number: int, old: LoadedBundle, new: LoadedBundle) -> DeltaFile:
    """Put into the archive what one file needs. Members are numbered: names stand in delta.json, where they are
    checked."""
    path = new.path / name
    listed = new.manifest.files.get(name)
    digest, size = (listed.sha256, listed.size_bytes) if listed else (sha256_of(path), path.stat().st_size)
    if listed is None:
        add_file(archive, f"files/{number}", path, digest)
        return DeltaFile(digest, size, "whole", member=f"files/{number}")
    base = _same_content(old, name, digest)
    if base is not None:
        return DeltaFile(digest, size, "same", base=base, base_sha256=digest)
    before = old.manifest.files.get(name)
    if before is not None:
        patch = make_patch((old.path / name).read_bytes(), path.read_bytes())
        if len(patch) < deflated_size(path):
            add_bytes(archive, f"patches/{number}", patch, deflated=False)  # it is compressed in itself
            return DeltaFile(digest, size, "patch", base=name, base_sha256=before.sha256, member=f"patches/{number}")
    add_file(archive, f"files/{number}", path, digest)
    return DeltaFile(digest, size, "whole", member=f"files/{number}")


def _same_content(old: LoadedBundle, name: str, digest: str) -> str | None:
    """The old file with this hash, of that name if possible."""
    files = old.manifest.files
    if name in files and files[name].sha256 == digest:
        return name
    return next((other for other, entry in sorted(files.items()) if entry.sha256 == digest), None)
