"""Where the parts of a .zip lie.

zipfile goes by the directory at the end; other tools read from the start on, go by the header before each member, and
would find what no directory speaks of. So only archives that tell both the same are taken, and none whose directory is
too large to be read at all. The format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, section 4.3.
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import IO

from edgeopt.errors import TamperedError

#: For 100 000 members with names of a hundred characters. zipfile takes a hundred times the memory, and reads it whole.
MOST_DIRECTORY_BYTES = 16 << 20
#: Signature, six fields that don't matter here except for the directory's size, and the length of a comment.
_END = struct.Struct("<4s8xL4xH")
#: Of large archives: the directory's size is here instead. Between it and `_END` is a locator of 20 bytes.
_LARGE_END = struct.Struct("<4s36xQ8x")
_LOCATOR_BYTES, _LOCATOR = 20, b"PK\6\7"
#: Signature, flags, method, CRC, packed and unpacked size, and the lengths of what follows: the name, extra fields.
_HEADER = struct.Struct("<4s2xHH4x3L2H")
#: Sizes and CRC come after the content, in so many bytes, where a writer didn't know them before.
_DESCRIBED_AFTER, _DESCRIPTOR_BYTES = 0x8, (12, 16, 20, 24)
#: The flag of a name in UTF-8; others are in the first PC's code page.
_UTF8 = 0x800
#: A size that stands in the extra fields.
_ELSEWHERE = 0xFFFFFFFF


def check_end(file: IO[bytes]) -> None:
    """Raises zipfile.BadZipFile unless the file ends as a .zip without a comment does, with a directory that can be
    read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END.size - _LOCATOR_BYTES - _LARGE_END.size))
    tail = file.read()
    if len(tail) < _END.size:
        raise zipfile.BadZipFile("it is too short")
    signature, directory, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\5\6" or comment:
        raise zipfile.BadZipFile("its directory isn't at its very end")
    if tail[-_END.size - _LOCATOR_BYTES :].startswith(_LOCATOR) and len(tail) >= _LARGE_END.size:
        _, directory = _LARGE_END.unpack(tail[: _LARGE_END.size])
    if directory > min(MOST_DIRECTORY_BYTES, size):
        raise zipfile.BadZipFile(f"its directory takes {directory} bytes")


def check_layout(archive: zipfile.ZipFile, where: str) -> None:
    """Raises TamperedError when anything but the members is in an archive that `check_end` passed, or when one is
    described in two ways."""
    if archive.fp is None:
        raise ValueError("the archive is closed")
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    starts = [*(info.header_offset for info in infos), archive.start_dir]
    if starts[0]:
        raise TamperedError(f"begins with {starts[0]} bytes of something else", where=where)
    for info, start, following in zip(infos, starts, starts[1:], strict=False):
        archive.fp.seek(start)
        raw = archive.fp.read(_HEADER.size)
        if len(raw) < _HEADER.size:
            raise TamperedError("is cut short", where=where)
        _, flags, method, *figures, name_bytes, extra_bytes = _HEADER.unpack(raw)
        name = archive.fp.read(name_bytes).decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")
        after = bool(flags & _DESCRIBED_AFTER)
        same = all(
            found in (known, _ELSEWHERE) or (after and found == 0)
            for found, known in zip(figures, (info.CRC, info.compress_size, info.file_size), strict=True)
        )
        if (name, flags, method) != (info.orig_filename, info.flag_bits, info.compress_type) or not same:
            raise TamperedError(f"describes the member {info.orig_filename!r} in two ways", where=where)
        gap = following - start - _HEADER.size - name_bytes - extra_bytes - info.compress_size
        if gap not in (_DESCRIPTOR_BYTES if after else (0,)):
            raise TamperedError("holds something else than its members, or one member in another", where=where)
