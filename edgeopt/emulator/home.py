"""Where the emulator lives on disk, and which installation is the current one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt.emulator import cores, lock
from edgeopt.errors import MissingError
from edgeopt.native import SOURCES

#: Raised when setup lays an installation out differently than before.
LAYOUT = 1
#: The last file that setup writes: a directory with it is complete.
MANIFEST = "manifest.json"
_OURS = re.compile(r"downloads|\.making-\w+|[0-9a-f]{16}")


def root() -> Path:
    """$EDGEOPT_HOME/emulator, by default below ~/.cache/edgeopt."""
    home = os.environ.get("EDGEOPT_HOME")
    return (Path(home).expanduser().absolute() if home else Path.home() / ".cache" / "edgeopt") / "emulator"


def downloads() -> Path:
    return root() / "downloads"


def directory() -> Path:
    """Where this version of edgeopt, with the runtimes of this machine, has its emulator."""
    return root() / digest()


def others() -> list[Path]:
    """Installations of other versions."""
    current = digest()
    return [path for path in _ours() if path.name != current and (path / MANIFEST).is_file()]


def _ours() -> list[Path]:
    """What setup makes. $EDGEOPT_HOME is the user's choice: there may be anything else."""
    return sorted(path for path in root().glob("*") if _OURS.fullmatch(path.name) and path.is_dir())


def digest() -> str:
    """16 hexadecimal digits that change with everything an installation is made from."""
    whole = hashlib.sha256(f"layout {LAYOUT}\n".encode())
    for wheel in lock.for_this_host().wheels:
        whole.update(f"{wheel.name}=={wheel.version}\n".encode())
    for path in (lock.TABLE, cores.TABLE, *_sources()):
        content = path.read_bytes()
        whole.update(f"{path.name} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.rglob("*") if path.is_file() and path.suffix != ".pyc")


def unsupported() -> str | None:
    """Why no emulator can be had on this machine; None where one can."""
    machine = platform.machine().lower()
    if sys.platform != "linux" or machine not in {"x86_64", "amd64"}:
        return f"the emulated phone needs Linux on x86-64, this is {platform.system()} on {machine}"
    return None


def not_writable(path: Path, error: OSError) -> MissingError:
    return MissingError(
        f"can't be written: {error.strerror}", where=str(path), fix="set EDGEOPT_HOME to a writable directory"
    )


@contextmanager
def locked() -> Iterator[None]:
    """Only one process at a time sets up or removes; the others wait. Raises MissingError where nothing can be
    written."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        handle = (root() / ".lock").open("w")
    except OSError as error:
        raise not_writable(root(), error) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def size(path: Path) -> int:
    """Bytes on disk of a file or of all files below a directory, links not followed."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() or p.is_symlink()]
    return sum(file.lstat().st_blocks * 512 for file in files)


def remove(*, outdated_only: bool = False) -> int:
    """Delete all installations and downloads, or only the installations of other versions of edgeopt and its runtimes.

    Returns how many bytes that freed. Raises MissingError where something can't be deleted.
    """
    if not root().is_dir():
        return 0
    with locked():
        doomed = others() if outdated_only else _ours()
        freed = sum(map(size, doomed))
        for path in doomed:
            (path / MANIFEST).unlink(missing_ok=True)  # from now on nobody takes it for complete
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise MissingError(f"can't be deleted: {error.strerror}", where=str(path)) from error
    return freed
