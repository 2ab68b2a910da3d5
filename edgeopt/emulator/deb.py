"""Unpacks Debian packages without dpkg: an `ar` archive with a tar archive in it.

A package's hash is checked before it comes here, but what is in it is still treated as if anybody had made it.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, cast

from edgeopt.errors import TamperedError

_MAGIC = b"!<arch>\n"
_HEADER = 60
#: Far more than any package in the lock has.
_MAX_BYTES = 2 << 30
_MAX_FILES = 20_000


def unpack(deb: Path, directory: Path, name: str, wanted: Callable[[str], bool], at_most: int | None = None) -> int:
    """Unpack the files of a package that `wanted` takes (paths such as "usr/bin/qemu-aarch64").

    Reading stops after `at_most` of them: what follows in a large package need not be decompressed. Links come as
    links, devices never. Returns how many files came.

    Raises TamperedError, naming `name`, where the archive is damaged, and where it would write outside of `directory`.
    """
    try:
        with deb.open("rb") as file:
            data = _data_member(file, name)
            with tarfile.open(fileobj=cast(IO[bytes], data), mode="r|*") as archive:
                return _extract(archive, directory, name, wanted, at_most)
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no space, no permission: not the package's fault
        raise TamperedError(f"is no Debian package: {error}", where=name) from error


def _data_member(file: IO[bytes], name: str) -> _Section:
    """The archive's member data.tar.* as a file."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise TamperedError("is no Debian package", where=name)
    while header := file.read(_HEADER):
        if len(header) != _HEADER or header[58:] != b"`\n":
            raise TamperedError("is no Debian package: bad archive header", where=name)
        member = header[:16].decode("ascii", "replace").strip().rstrip("/")
        length = int(header[48:58])
        if length < 0:
            raise TamperedError("is no Debian package: a member of negative size", where=name)
        if member.startswith("data.tar"):
            return _Section(file, length)
        file.seek(length + length % 2, os.SEEK_CUR)
    raise TamperedError("is no Debian package: it has no data.tar", where=name)


class _Section:
    """The next `length` bytes of a file, to be read once."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file = file
        self._left = length

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _extract(
    archive: tarfile.TarFile, directory: Path, name: str, wanted: Callable[[str], bool], at_most: int | None
) -> int:
    bytes_left = _MAX_BYTES
    count = 0
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise TamperedError(f"would write outside of its directory: {member.name}", where=name)
        relative = str(path)
        if member.isdir() or not wanted(relative):
            continue
        count += 1
        bytes_left -= member.size
        if bytes_left < 0 or count > _MAX_FILES:
            raise TamperedError("unpacks to more than a package can have", where=name)
        target = directory / relative
        _make_parents(directory, target, name)
        target.unlink(missing_ok=True)
        if member.issym():
            _link(directory, target, member.linkname, name)
        elif member.isfile():
            content = archive.extractfile(member)
            assert content is not None, "a regular file has content"
            with target.open("wb") as out:
                shutil.copyfileobj(content, out)
            target.chmod(0o755 if member.mode & 0o111 else 0o644)
        else:
            raise TamperedError(f"has something that is no file: {member.name}", where=name)
        if count == at_most:
            break
    return count


def _make_parents(directory: Path, target: Path, name: str) -> None:
    """Directories down to a file, none of which may be a link that an earlier member left."""
    parent = directory
    for part in target.relative_to(directory).parts[:-1]:
        parent = parent / part
        if parent.is_symlink():
            raise TamperedError(f"would write through a link: {target.relative_to(directory)}", where=name)
        parent.mkdir(exist_ok=True)


def _link(directory: Path, target: Path, goal: str, name: str) -> None:
    """A link, made relative; "/lib/x" means the root of what is unpacked."""
    inside = goal.lstrip("/") if goal.startswith("/") else str(target.parent.relative_to(directory) / goal)
    end = os.path.normpath(inside)
    if end == ".." or end.startswith("../"):
        raise TamperedError(f"has a link that leads outside: {target.relative_to(directory)}", where=name)
    target.symlink_to(os.path.relpath(end, target.parent.relative_to(directory)))
