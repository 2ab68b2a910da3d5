"""A bundle as one .zip file: the same bundle always gives the same bytes, and no archive is believed when opened."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeopt.bundle.archive_members import open_zip
from edgeopt.bundle.archive_output import add_file
from edgeopt.bundle.archive_unpack import unpack
from edgeopt.bundle.archive_whole import AnyBundle, files_of, listed_in, open_directory
from edgeopt.bundle.destination import replace_file
from edgeopt.bundle.generation_manifest import GENERATION, refuse_generation_bundle
from edgeopt.bundle.generation_reader import GenerationBundle
from edgeopt.bundle.manifest import MANIFEST
from edgeopt.bundle.reader import LoadedBundle
from edgeopt.errors import TamperedError, UsageError

__all__ = ["files_of", "is_archive", "naming", "open_anywhere", "open_archive", "open_whole", "write_archive"]

SUFFIX = ".zip"


def write_archive(bundle: AnyBundle, output: Path | None = None) -> Path:
    """Write the bundle as a .zip; by default beside it. Returns where it is.

    Everything is in one folder, named for model and target. Times and owners are fixed, names sorted, scripts
    executable. The bytes depend on nothing else but the version of zlib.

    Raises UsageError when something else is in the way or the place isn't writable, MissingError on a full disk, and
    TamperedError when a file changes meanwhile.
    """
    final = output if output is not None else _beside(bundle.path)
    if final.absolute().is_relative_to(bundle.path.absolute()):
        raise UsageError("lies inside the bundle", where=str(final), fix="choose another place")
    root = folder_name(bundle)
    listed = listed_in(bundle)
    with replace_file(final, is_archive) as temporary, zipfile.ZipFile(temporary, "x") as archive:
        for name in files_of(bundle):
            entry = listed.get(name)
            add_file(archive, f"{root}/{name}", bundle.path / name, entry.sha256 if entry is not None else None)
    return final


def folder_name(bundle: AnyBundle) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{bundle.name}-{bundle.manifest.target}")
    return name.lstrip(".") or "bundle"


def is_archive(path: Path) -> bool:
    """Whether a file looks like a bundle that was zipped."""
    try:
        with open_zip(path) as archive:
            return any(re.fullmatch(rf"[^/]+/({MANIFEST}|{GENERATION})", name) for name in archive.namelist())
    except UsageError:
        return False


@contextmanager
def open_archive(path: Path) -> Iterator[AnyBundle]:
    """Unpack and verify a zipped bundle in a temporary directory that goes when the block ends.

    Nothing is unpacked before the names and sizes of all members have been checked: they must be those of the
    archive's own manifests, so no name can lead elsewhere and no file can grow beyond what was announced.

    Raises UsageError when the file is no zipped bundle, MissingError when the disk is too small for it, and
    TamperedError for members that are links, encrypted, there twice, not in the manifest, named alike but for case,
    or larger than announced, for anything between the members, and for everything that `open_directory` refuses.
    """
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        directory = Path(folder)
        with open_zip(path) as archive:
            try:
                unpack(archive, path, directory)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise TamperedError(f"is damaged ({error})", where=str(path)) from error
        with naming(path, directory):
            bundle = open_directory(directory)
        yield bundle


@contextmanager
def open_whole(path: Path) -> Iterator[AnyBundle]:
    """A verified bundle of either kind, be it a directory or a zipped one."""
    if path.is_dir():
        yield open_directory(path)
    elif path.exists():
        with open_archive(path) as bundle:
            yield bundle
    else:
        raise UsageError("is not there", where=str(path))


@contextmanager
def open_anywhere(path: Path) -> Iterator[LoadedBundle]:
    """A verified ordinary bundle, be it a directory or a zipped one. Raises UsageError for a network that writes."""
    refuse_generation_bundle(path)
    with open_whole(path) as bundle:
        if isinstance(bundle, GenerationBundle):
            raise UsageError(
                "is the zipped bundle of a network that writes",
                where=str(path),
                fix="unpack it, and give one of its bundles, such as its decoder",
            )
        yield bundle


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
