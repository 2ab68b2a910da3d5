"""Reading the members of a .zip that anybody may have made."""

from __future__ import annotations

import shutil
import stat
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeopt.bundle.archive_layout import check_end, check_layout
from edgeopt.errors import MissingError, TamperedError, UsageError

_CHUNK = 1 << 20
_ENCRYPTED = 0x1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: No archive of ours has more.
MOST_MEMBERS = 100_000
#: Of a description such as manifest.json: parsing it takes dozens of times its size in memory.
MOST_JSON_BYTES = 16 << 20
#: Above this, an archive may unpack to so many times its own size. Weights and pictures reach 2; zeroed ones 10.
HARMLESS_BYTES, MOST_EXPANSION = 256 << 20, 100


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive whose name has been checked. `size` is what the archive claims."""

    info: zipfile.ZipInfo
    size: int


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Raises UsageError when the file is no .zip or can't be read."""
    if path.exists() and not path.is_file():  # a device may be endless, a pipe can't be read twice
        raise UsageError("is no regular file", where=str(path))
    try:
        with path.open("rb") as file:
            check_end(file)
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise UsageError(f"is no .zip file that can be read ({error})", where=str(path)) from error
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror or error}", where=str(path)) from error
    with archive:
        yield archive


def members_of(archive: zipfile.ZipFile, where: str) -> dict[str, Member]:
    """Name -> member, for plain files in folders; entries for folders themselves are passed over.

    Raises TamperedError on the first name or kind of member that none of ours has.
    """
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise TamperedError(f"has {len(infos)} members", where=where)
    members: dict[str, Member] = {}
    taken: dict[str, str] = {}
    for info in infos:
        # What the file says, before zipfile cuts it at a NUL or turns separators round.
        name = info.orig_filename
        _check_kind(info, name, where)
        check_name(name.removesuffix("/"), where)
        if name.endswith("/"):
            if info.file_size:
                raise TamperedError(f"the member {name!r} is a folder with content", where=where)
            continue
        key = _folded(name)
        if key in taken:
            how = "twice" if taken[key] == name else f"beside {taken[key]!r}, which some systems take for the same"
            raise TamperedError(f"has the member {name!r} {how}", where=where)
        taken[key] = name
        members[name] = Member(info, info.file_size)
    _check_folders(members, taken, where)
    if not members:
        raise TamperedError("is empty", where=where)
    check_layout(archive, where)
    return members


def check_name(name: str, where: str) -> None:
    """Raises TamperedError for a name that leads out of a directory, on any system, or that can't be shown."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in name:
        raise TamperedError(f"the member {name!r} leads out of its folder", where=where)
    if not name.isprintable():
        raise TamperedError(f"the member {name!r} has a name that can't be printed", where=where)


def check_total(total: int, packed: int, directory: Path, where: str) -> None:
    """Raises TamperedError when `packed` bytes claim to unpack to far more than they can hold, MissingError when the
    disk of `directory` can't take it."""
    if total > max(HARMLESS_BYTES, MOST_EXPANSION * packed):
        raise TamperedError(f"would unpack to {total} bytes, more than {MOST_EXPANSION} times its size", where=where)
    if total > shutil.disk_usage(directory).free:
        raise MissingError(f"takes {total} bytes to unpack", where=str(directory.parent), fix="free some")


def extract(archive: zipfile.ZipFile, member: Member, size: int, target: Path, where: str) -> None:
    """Write one member of exactly `size` bytes to a new file. Raises TamperedError when it holds more or fewer."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with archive.open(member.info) as source, target.open("xb") as file:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                break
            file.write(chunk)
    if left:
        raise TamperedError(f"the member {member.info.filename!r} doesn't hold {size} bytes", where=where)


def read_small(archive: zipfile.ZipFile, member: Member, most: int, where: str) -> bytes:
    """The content of a member of up to `most` bytes."""
    with archive.open(member.info) as source:
        content = source.read(most + 1)
    if len(content) > most:
        raise TamperedError(f"{member.info.filename!r} is larger than {most} bytes", where=where)
    return content


def _check_kind(info: zipfile.ZipInfo, name: str, where: str) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.flag_bits & _ENCRYPTED:
        raise TamperedError(f"the member {name!r} is encrypted", where=where)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "no regular file"
        raise TamperedError(f"the member {name!r} is {what}", where=where)
    if info.compress_type not in _METHODS:
        raise TamperedError(f"the member {name!r} is compressed in a way that edgeopt never uses", where=where)


def _check_folders(members: Mapping[str, Member], taken: Mapping[str, str], where: str) -> None:
    """No file may be another one's folder, and no folder may differ from another by case only."""
    folders: dict[str, str] = {}
    for name in members:
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            key = _folded(folder)
            if key in taken or folders.setdefault(key, folder) != folder:
                other = taken.get(key) or folders[key]
                raise TamperedError(f"has {folder!r} as a folder, and also {other!r}", where=where)


def _folded(name: str) -> str:
    """How file systems without case, and those that normalize, see a name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
