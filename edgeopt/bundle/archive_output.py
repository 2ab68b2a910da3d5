"""Writing .zip files: the same content gives the same bytes, and the file appears all at once or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeopt.errors import MissingError, UsageError

#: The earliest time that a .zip can tell.
_TIME = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
#: A file is stored as it is when compressing it saves less: then it can be read from the archive without unpacking.
_LEAST_SAVING = 0.05
_LEVEL = 6
_CHUNK = 1 << 20


@contextmanager
def replace_file(final: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a path beside `final` to write to; it takes `final`'s place when the block ends well, and else vanishes.

    Args:
        is_ours: whether an existing file is of the kind that is being written, and may be lost.

    Raises UsageError when something else is in the way or the file system refuses; MissingError on a full disk.
    """
    temporary = final.parent / f".{final.name}.tmp-{secrets.token_hex(4)}"
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        if final.is_symlink() or (final.exists() and not (final.is_file() and is_ours(final))):
            raise UsageError(
                "is in the way: edgeopt didn't write it, and it would be lost",
                where=str(final),
                fix="move it, or choose another --output",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MissingError("no space left", where=str(final.parent), fix="free some") from error
        raise UsageError(f"can't be written: {error.strerror or error}", where=str(final)) from error


def add_file(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    """Compressed where that pays; scripts are executable."""
    size = path.stat().st_size
    info = _info(name, executable=is_script(path), deflated=deflated_size(path) < (1 - _LEAST_SAVING) * size)
    info.file_size = size
    with path.open("rb") as source, archive.open(info, "w") as target:
        shutil.copyfileobj(source, target, _CHUNK)


def add_bytes(archive: zipfile.ZipFile, name: str, content: bytes, *, deflated: bool) -> None:
    archive.writestr(_info(name, executable=False, deflated=deflated), content, compresslevel=_LEVEL)


def is_script(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def deflated_size(path: Path) -> int:
    """Bytes that the file takes in a .zip when compressed."""
    compressor = zlib.compressobj(_LEVEL, wbits=-15)
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(compressor.compress(chunk))
    return size + len(compressor.flush())


def _info(name: str, *, executable: bool, deflated: bool) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _TIME)
    info.create_system = _UNIX  # else the permissions would not count, and differ by where this runs
    info.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
    info.compress_type = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    return info


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
