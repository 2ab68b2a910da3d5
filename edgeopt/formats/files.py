"""Model files that may be directories, as Core ML's packages are."""

from __future__ import annotations

import hashlib
import mmap
import shutil
from pathlib import Path


def files_of(path: Path) -> tuple[Path, ...]:
    """The file itself, or every file below a directory, sorted by relative path."""
    if path.is_dir():
        return tuple(sorted((file for file in path.rglob("*") if file.is_file()), key=lambda f: f.as_posix()))
    return (path,) if path.is_file() else ()


def size_of(path: Path) -> int:
    """Bytes; 0 where nothing is there."""
    return sum(file.stat().st_size for file in files_of(path))


def sha256_of(path: Path) -> str:
    """Of a file: its SHA-256. Of a directory: that of a text with one line per file, "<sha256>  <relative path>"."""
    if not path.is_dir():
        return _sha256(path)
    lines = (f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files_of(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def mapped(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, of which only those that are looked at come to memory."""
    with path.open("rb") as file:
        # An empty file can't be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size_of(path) else b""


def copy(source: Path, destination: Path) -> None:
    """Copy a model file or directory; links inside a directory are not followed."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, destination, symlinks=True)
    else:
        shutil.copyfile(source, destination)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
