"""Unpacking a zipped bundle of either kind: only what its own lists announce, and not a byte more."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path

from edgeopt.bundle.archive_members import (
    MOST_JSON_BYTES,
    Member,
    check_total,
    extract,
    members_of,
    read_small,
)
from edgeopt.bundle.archive_output import is_script
from edgeopt.bundle.generation_manifest import (
    GENERATION,
    TOP_UNLISTED,
    parse_generation_manifest,
    unlisted_of_parts,
)
from edgeopt.bundle.manifest import MANIFEST, REPORT, UNLISTED, FileEntry, parse_manifest
from edgeopt.errors import TamperedError, UsageError

#: Name -> entry of every listed file, and the names of those that need not be listed.
Announced = tuple[Mapping[str, FileEntry], Collection[str]]


def unpack(archive: zipfile.ZipFile, path: Path, directory: Path) -> None:
    """Write the members into `directory`, without their common folder.

    Raises UsageError, TamperedError and MissingError as `open_archive` says.
    """
    members = members_of(archive, str(path))
    roots = {name.partition("/")[0] for name in members}
    root = min(roots)
    inner: dict[str, Member] = {name.partition("/")[2]: member for name, member in members.items()}
    if len(roots) != 1 or not ({GENERATION, MANIFEST} & inner.keys()):
        raise UsageError(f"is no zipped bundle: it has no folder with a {MANIFEST}", where=str(path))
    announce = _announced_by_parts if GENERATION in inner else _announced
    sizes = _expected_sizes(*announce(archive, inner, path, root), inner, path)
    check_total(sum(sizes.values()), path.stat().st_size, directory, str(path))
    for name, member in inner.items():
        extract(archive, member, sizes[name], directory / name, str(path))
        if is_script(directory / name):
            (directory / name).chmod(0o755)


def _announced(archive: zipfile.ZipFile, inner: Mapping[str, Member], path: Path, root: str) -> Announced:
    text = read_small(archive, inner[MANIFEST], MOST_JSON_BYTES, str(path))
    return parse_manifest(text, f"{path}: {root}/{MANIFEST}").files, UNLISTED


def _announced_by_parts(archive: zipfile.ZipFile, inner: Mapping[str, Member], path: Path, root: str) -> Announced:
    """Of a network that writes: the list at the top, and those of the parts' manifests that it names."""
    text = read_small(archive, inner[GENERATION], MOST_JSON_BYTES, str(path))
    manifest = parse_generation_manifest(text, f"{path}: {root}/{GENERATION}")
    files = dict(manifest.files)
    for entry in manifest.parts.values():
        name = f"{entry.folder}/{MANIFEST}"
        if name not in inner:
            raise TamperedError(f"lacks {name!r}", where=str(path))
        text = read_small(archive, inner[name], MOST_JSON_BYTES, str(path))
        if sha256(text).hexdigest() != entry.manifest_sha256:
            raise TamperedError(f"holds a {name!r} that is not the one in its {GENERATION}", where=str(path))
        files[name] = FileEntry(entry.manifest_sha256, len(text))
        listed = parse_manifest(text, f"{path}: {root}/{name}").files
        files |= {f"{entry.folder}/{inner_name}": inner_entry for inner_name, inner_entry in listed.items()}
    return files, TOP_UNLISTED | unlisted_of_parts(manifest)


def _expected_sizes(
    files: Mapping[str, FileEntry], unlisted: Collection[str], inner: Mapping[str, Member], path: Path
) -> dict[str, int]:
    """Name -> the size that a manifest announces, or a file's own below a limit where none does."""
    for name in sorted(files.keys() - inner.keys()):
        raise TamperedError(f"lacks {name!r}, which its manifest lists", where=str(path))
    if REPORT not in inner:
        raise TamperedError(f"lacks {REPORT!r}", where=str(path))
    sizes: dict[str, int] = {}
    for name, member in inner.items():
        entry = files.get(name)
        if entry is None and name not in unlisted:
            raise TamperedError(f"holds {name!r}, which its manifest doesn't list", where=str(path))
        sizes[name] = entry.size_bytes if entry is not None else member.size
        if member.size != sizes[name] or (entry is None and member.size > MOST_JSON_BYTES):
            raise TamperedError(f"{name!r} unpacks to {member.size} bytes, which it shouldn't", where=str(path))
    return sizes
