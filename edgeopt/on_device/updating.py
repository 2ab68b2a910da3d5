"""Changing a bundle's reports in place: all at once, and by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeopt.bundle.destination import replace_directory
from edgeopt.bundle.manifest import DEVICE_REPORT, MANIFEST, REPORT, SIGNATURE, SUMS
from edgeopt.errors import UsageError
from edgeopt.report_file import to_json
from edgeopt.types import Report


@contextmanager
def reserved(bundle: Path) -> Iterator[None]:
    """Keep others from checking the same bundle meanwhile. The kernel gives it free however this process ends.

    Raises UsageError where `bundle` is not a directory, or another process has reserved it.
    """
    try:
        lock = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError("is not a bundle directory", where=str(bundle)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            "another 'edgeopt device run' is working on this bundle", where=str(bundle), fix="wait until it has ended"
        ) from None
    else:
        yield
    finally:
        os.close(lock)


def update_reports(bundle: Path, report: Report, device_report: str) -> bool:
    """Put both reports into the bundle in one step; a reader sees the old bundle or the new one.

    Sums and signature of the bundle would not hold any more and go; returns whether there were any.
    """
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    signed = any((bundle / name).exists() for name in (SUMS, SIGNATURE))
    with replace_directory(bundle) as directory:
        shutil.copytree(bundle, directory, dirs_exist_ok=True, ignore=_left_out)
        (directory / REPORT).write_text(to_json(report, digest), encoding="utf-8")
        (directory / DEVICE_REPORT).write_text(device_report, encoding="utf-8")
    return signed


def _left_out(folder: str, names: list[str]) -> list[str]:
    del folder
    return [name for name in names if name in (SUMS, SIGNATURE)]
