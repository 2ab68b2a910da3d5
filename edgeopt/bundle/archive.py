"""A bundle as one .zip file: the same bundle always gives the same bytes, and no archive is believed when opened."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeopt.bundle.archive_members import (
    MOST_JSON_BYTES,
    Member,
    check_total,
    extract,
    members_of,
    open_zip,
    read_small,
)
from edgeopt.bundle.archive_output import add_file, is_script
from edgeopt.bundle.destination import replace_file
from edgeopt.bundle.manifest import MANIFEST, REPORT, UNLISTED, Manifest, parse_manifest
from edgeopt.bundle.reader import LoadedBundle, open_bundle
from edgeopt.errors import TamperedError, UsageError

SUFFIX = ".zip"


def write_archive(bundle: LoadedBundle, output: Path | None = None) -> Path:
    """Write the bundle as a .zip; by default beside it. Returns where it is.

    Everything is in one folder, named for model and target. Times and owners are fixed, names sorted, scripts
    executable. The bytes depend on nothing else but the version of zlib.

    Raises UsageError when something else is in the way or the place isn't writable, MissingError on a full disk, and
    TamperedError when a file changes meanwhile.
    """
    final = output if output is not None else _beside(bundle.path)
    if final.absolute().is_relative_to(bundle.path.absolute()):
        raise UsageError("lies inside the bundle", where=str(final), fix="choose another place")
    root = folder_name(bundle.manifest)
    with replace_file(final, is_archive) as temporary, zipfile.ZipFile(temporary, "x") as archive:
        for name in sorted(files_of(bundle)):
            entry = bundle.manifest.files.get(name)
            add_file(archive, f"{root}/{name}", bundle.path / name, entry.sha256 if entry is not None else None)
    return final


def files_of(bundle: LoadedBundle) -> tuple[str, ...]:
    """Every file of a bundle, relative to it, the ones that the manifest doesn't list included."""
    unlisted = (name for name in UNLISTED if (bundle.path / name).is_file())
    return tuple(sorted({*bundle.manifest.files, *unlisted}))


def folder_name(manifest: Manifest) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{manifest.name}-{manifest.target}")
    return name.lstrip(".") or "bundle"


def is_archive(path: Path) -> bool:
    """Whether a file looks like a bundle that was zipped."""
    try:
        with open_zip(path) as archive:
            return any(re.fullmatch(rf"[^/]+/{MANIFEST}", name) for name in archive.namelist())
    except UsageError:
        return False


@contextmanager
def open_archive(path: Path) -> Iterator[LoadedBundle]:
    """Unpack and verify a zipped bundle in a temporary directory that goes when the block ends.

    Nothing is unpacked before the names and sizes of all members have been checked: they must be those of the
    archive's own manifest, so no name can lead elsewhere and no file can grow beyond what was announced.

    Raises UsageError when the file is no zipped bundle, MissingError when the disk is too small for it, and
    TamperedError for members that are links, encrypted, there twice, not in the manifest, named alike but for case,
    or larger than announced, for anything between the members, and for everything that `open_bundle` refuses.
    """
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        directory = Path(folder)
        with open_zip(path) as archive:
            try:
                _unpack(archive, path, directory)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise TamperedError(f"is damaged ({error})", where=str(path)) from error
        with naming(path, directory):
            bundle = open_bundle(directory)
        yield bundle


@contextmanager
def open_anywhere(path: Path) -> Iterator[LoadedBundle]:
    """A verified bundle, be it a directory or a zipped one."""
    if path.is_dir():
        yield open_bundle(path)
    elif path.exists():
        with open_archive(path) as bundle:
            yield bundle
    else:
        raise UsageError("is not there", where=str(path))


def _beside(directory: Path) -> Path:
    named = directory if directory.name not in ("", "..") else directory.resolve()
    return named.with_name(f"{named.name}{SUFFIX}")


@contextmanager
def naming(path: Path, directory: Path) -> Iterator[None]:
    """Errors about files in a directory that is about to go name where those came from."""
    try:
        yield
    except UsageError as error:
        where = (error.where or str(path)).replace(f"{directory}/", f"{path}: ").replace(str(directory), str(path))
        raise type(error)(error.problem, where=where, fix=error.fix) from error


def _unpack(archive: zipfile.ZipFile, path: Path, directory: Path) -> None:
    members = members_of(archive, str(path))
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1 or f"{(root := min(roots))}/{MANIFEST}" not in members:
        raise UsageError(f"is no zipped bundle: it has no folder with a {MANIFEST}", where=str(path))
    inner: dict[str, Member] = {name.partition("/")[2]: member for name, member in members.items()}
    text = read_small(archive, inner[MANIFEST], MOST_JSON_BYTES, str(path))
    manifest = parse_manifest(text, f"{path}: {root}/{MANIFEST}")
    sizes = _expected_sizes(manifest, inner, path)
    check_total(sum(sizes.values()), path.stat().st_size, directory, str(path))
    for name, member in inner.items():
        extract(archive, member, sizes[name], directory / name, str(path))
        if is_script(directory / name):
            (directory / name).chmod(0o755)


def _expected_sizes(manifest: Manifest, inner: dict[str, Member], path: Path) -> dict[str, int]:
    """Name -> the size that the manifest announces, or a file's own below a limit where it announces none."""
    for name in sorted(manifest.files.keys() - inner.keys()):
        raise TamperedError(f"lacks {name!r}, which its manifest lists", where=str(path))
    if REPORT not in inner:
        raise TamperedError(f"lacks {REPORT!r}", where=str(path))
    sizes: dict[str, int] = {}
    for name, member in inner.items():
        entry = manifest.files.get(name)
        if entry is None and name not in UNLISTED:
            raise TamperedError(f"holds {name!r}, which its manifest doesn't list", where=str(path))
        sizes[name] = entry.size_bytes if entry is not None else member.size
        if member.size != sizes[name] or (entry is None and member.size > MOST_JSON_BYTES):
            raise TamperedError(f"{name!r} unpacks to {member.size} bytes, which it shouldn't", where=str(path))
    return sizes
