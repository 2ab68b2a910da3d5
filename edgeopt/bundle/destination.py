"""Putting a directory or a file in place all at once, whatever happens on the way."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeopt.bundle.generation_manifest import GENERATION, TOP_UNLISTED, is_generation_bundle
from edgeopt.bundle.llm_manifest import LLM
from edgeopt.bundle.manifest import MANIFEST, UNLISTED, is_bundle
from edgeopt.errors import EdgeoptError, MissingError, UsageError
from edgeopt.json_data import loads

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def prepare_output(final: Path) -> None:
    """Refuse, before any long work, a place where a bundle can't be put.

    Raises UsageError when `final` is there and isn't a bundle as edgeopt left it, or when it can't be created.
    """
    _check_length(final)
    if final.is_symlink() or (final.exists() and not _replaceable(final)):
        raise UsageError(
            "is in the way: it is not a bundle as edgeopt wrote it, and would be lost",
            where=str(final),
            fix="move it, or choose another place",
        )
    ancestor = next(parent for parent in final.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise UsageError("is not a directory", where=str(ancestor), fix="choose another place")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UsageError("is not writable", where=str(ancestor), fix="choose another place")


@contextmanager
def replace_directory(final: Path) -> Iterator[Path]:
    """Yields an empty directory beside `final` that takes its place when the block ends well, and else vanishes.

    A reader sees the old directory or the complete new one. What a killed process leaves behind, the next run removes.
    Raises MissingError on a full disk, UsageError for what else the file system refuses, naming the place.
    """
    created: list[Path] = []
    try:
        created = _make_parents(final.parent)
        _sweep(final)
        temporary, lock = _locked_directory(final)
        try:
            yield temporary
            _sync(temporary)
            _swap(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except BaseException as error:
        for directory in reversed(created):
            with suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError):
            raise _explain(error, final) from error
        raise


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
                fix="move it, or choose another place",
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync_one(temporary)
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()
            raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise MissingError("no space left", where=str(final.parent), fix="free some") from error
        raise UsageError(f"can't be written: {error.strerror or error}", where=str(final)) from error


def _check_length(final: Path) -> None:
    try:
        final.exists()
    except OSError as error:  # too long, too many links
        raise UsageError(
            (error.strerror or str(error)).lower(), where=str(final), fix="choose another place or --name"
        ) from error


def _replaceable(final: Path) -> bool:
    """An empty directory, or a bundle that nobody has put files of his own into."""
    if not final.is_dir():
        return False
    present = {path.relative_to(final).as_posix() for path in final.rglob("*") if not path.is_dir()}
    if not present:
        return True
    if is_generation_bundle(final):
        return present <= _known_files(final)
    if LLM in present:
        return present <= {*_listed(final / LLM), LLM}
    return is_bundle(final) and present <= {*_listed(final / MANIFEST), *UNLISTED}


def _known_files(final: Path) -> set[str]:
    """What a bundle of a network that writes holds: its own files, and those of the bundles in it."""
    known = {*_listed(final / GENERATION), *TOP_UNLISTED}
    for part in (folder for folder in final.iterdir() if is_bundle(folder)):
        known |= {f"{part.name}/{name}" for name in (*_listed(part / MANIFEST), *UNLISTED)}
    return known


def _listed(manifest: Path) -> frozenset[str]:
    plain = loads(manifest.read_bytes(), manifest.name)
    files = plain.get("files") if isinstance(plain, dict) else None
    return frozenset(files) if isinstance(files, dict) else frozenset()


def _make_parents(directory: Path) -> list[Path]:
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _locked_directory(final: Path) -> tuple[Path, int]:
    """A fresh directory with a lock on it that the kernel drops when this process dies, however it dies."""
    while True:
        temporary = final.parent / f".{final.name}.tmp-{secrets.token_hex(4)}"
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.exists():  # else a sweep took it between mkdir and flock
            return temporary, lock
        os.close(lock)


def _sweep(final: Path) -> None:
    """Remove what killed runs left; a directory whose lock is held belongs to a living one."""
    leftovers = list(final.parent.glob(f".{_literal(final.name)}.tmp-*"))
    if final.exists():
        leftovers += final.parent.glob(f".{_literal(final.name)}.old-*")
    for leftover in leftovers:
        try:
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(lock)


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync(directory: Path) -> None:
    """Bring the content to disk, so that a power cut after the rename can't leave empty files behind good names."""
    for path in (*directory.rglob("*"), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(temporary: Path, final: Path) -> None:
    if final.is_dir():
        prepare_output(final)  # somebody may have put files there since
    try:
        temporary.rename(final)  # succeeds where nothing, or an empty directory, is
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _exchange(temporary, final)


def _exchange(temporary: Path, final: Path) -> None:
    """Swap two directories in one step; in two where the C library or file system has no renameat2 exchange."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        arguments = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(final), _RENAME_EXCHANGE)
        if renameat2(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(final))
    old = final.parent / f".{final.name}.old-{secrets.token_hex(4)}"
    final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _explain(error: OSError, final: Path) -> EdgeoptError:
    if error.errno in _NO_SPACE:
        return MissingError(
            "no space left for the bundle", where=str(final.parent), fix="free some, or choose another place"
        )
    if error.errno in _NOT_WRITABLE:
        return UsageError("is not writable", where=str(final.parent), fix="choose another place")
    place = error.filename if isinstance(error.filename, str) else str(final)
    return UsageError(f"the bundle can't be written: {error.strerror or error}", where=place)
