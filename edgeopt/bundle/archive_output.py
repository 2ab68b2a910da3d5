"""Writing .zip files: the same content gives the same bytes."""

from __future__ import annotations

import hashlib
import stat
import zipfile
import zlib
from pathlib import Path

from edgeopt.errors import TamperedError

#: The earliest time that a .zip can tell.
_TIME = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
#: A file is stored as it is when compressing it saves less: then it can be read from the archive without unpacking.
_LEAST_SAVING = 0.05
_LEVEL = 6
_CHUNK = 1 << 20


def add_file(archive: zipfile.ZipFile, name: str, path: Path, sha256: str | None) -> None:
    """Compressed where that pays; scripts are executable.

    Raises TamperedError unless what is written has this SHA-256: the file may have changed since it was verified.
    """
    size = path.stat().st_size
    info = _info(name, executable=is_script(path), deflated=deflated_size(path) < (1 - _LEAST_SAVING) * size)
    info.file_size = size
    digest = hashlib.sha256()
    with path.open("rb") as source, archive.open(info, "w") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise TamperedError("is being changed by somebody", where=str(path))


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
