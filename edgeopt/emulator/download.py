"""Fetches pinned files: several at once, resumed where a former try stopped, and checked before anybody uses them."""

from __future__ import annotations

import errno
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from edgeopt.errors import MissingError, TamperedError

MIRROR_VARIABLE = "EDGEOPT_DEBIAN_MIRROR"
_SECONDS_OF_SILENCE = 30.0
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Download:
    """One file: where it may be had, in order of preference, and what it must be."""

    name: str
    urls: tuple[str, ...]
    sha256: str
    size: int


def fetch(wanted: Download, cache: Path, tell: Callable[[int], None]) -> Path:
    """The file in the cache, downloaded if need be. `tell` hears of every byte that needn't be waited for any more.

    Raises MissingError where no address answers or the disk is full, TamperedError where they answer with another
    file than the pinned one. What has come is kept for the next try.
    """
    path = cache / wanted.sha256
    if path.is_file() and path.stat().st_size == wanted.size and sha256_of(path) == wanted.sha256:
        tell(wanted.size)
        return path
    part = cache / f"{wanted.sha256}.part"
    told = 0

    def tell_once(position: int) -> None:
        """Tell how far the file is; a second mirror does not count what the first one brought again. It is told all
        the same, with 0 bytes: `tell` may end the download."""
        nonlocal told
        tell(max(position - told, 0))
        told = max(position, told)

    problems = []
    other_content = False
    for url in wanted.urls:
        try:
            good = _came(url, part, wanted, tell_once)
        except (urllib.error.URLError, HTTPException, TimeoutError, OSError) as error:
            raise_if_disk_is_full(error, cache)
            problems.append(f"{_host(url)}: {_reason(error)}")
            continue
        if good:
            part.replace(path)
            return path
        other_content = True
        problems.append(f"{_host(url)}: its SHA-256 is not the pinned one")
    tried = "; ".join(problems)
    if other_content:
        raise TamperedError(f"can't be trusted ({tried})", where=wanted.name, fix="nothing of it was used; try later")
    raise MissingError(
        f"can't be downloaded ({tried})",
        where=wanted.name,
        fix=f"check the network and run it again, it resumes; ${MIRROR_VARIABLE} may name a mirror of your own",
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _came(url: str, part: Path, wanted: Download, tell: Callable[[int], None]) -> bool:
    """Whether the pinned file came from there; otherwise there is no `part` any more. Raises OSError as `_resume`."""
    continued = part.exists()
    while True:
        _resume(url, part, wanted.size, tell)
        if sha256_of(part) == wanted.sha256:
            return True
        part.unlink()
        if not continued:
            return False
        continued = False  # what was there before need not be this address's fault


def _resume(url: str, part: Path, size: int, tell: Callable[[int], None]) -> None:
    """Append what `part` lacks. Raises OSError where the answer ends early or is no file of that size."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        part.unlink()  # complete and yet not accepted, or too long: start anew
        have = 0
    request = urllib.request.Request(url, headers={"User-Agent": "edgeopt", "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=_SECONDS_OF_SILENCE) as answer:
        resumed = answer.status == 206
        position = have if resumed else 0
        announced = answer.headers.get("Content-Length", "")
        if announced.isdecimal() and int(announced) != size - position:
            # The page of a hotel's network, for one: nothing of it may get into the file.
            raise OSError(f"offers {int(announced) + position} bytes instead of {size}")
        tell(position)
        with part.open("ab" if resumed else "wb") as out:
            while chunk := answer.read(_CHUNK):
                position += len(chunk)
                if position > size:
                    break
                out.write(chunk)
                tell(position)
    if position != size:
        if position > size:
            part.unlink()
        raise OSError(f"sent {position} bytes of {size}")


def raise_if_disk_is_full(error: Exception, directory: Path) -> None:
    """Raises MissingError where that was the reason."""
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        fix = "free 700 MB, or set EDGEOPT_HOME to a directory on another disk"
        raise MissingError("the disk is full", where=str(directory), fix=fix) from error


def _host(url: str) -> str:
    """Host of an address, without a user's name and password."""
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2]


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return f"HTTP {error.code}"
    reason = getattr(error, "reason", None) or error
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return text or type(error).__name__


def mirrors(pinned: tuple[str, ...]) -> tuple[str, ...]:
    """The user's own mirror, where the environment names one, before those of the lock."""
    own = os.environ.get(MIRROR_VARIABLE, "").strip().rstrip("/")
    return (own, *pinned) if own else pinned
