"""All downloads of a setup, several at a time, under one progress bar."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edgeopt.emulator import download, wheels
from edgeopt.emulator.lock import DebianPackage, Lock, Wheel
from edgeopt.progress import Progress

_MEGABYTE = 1_000_000
_CONNECTIONS = 6
#: What a wheel of unknown size counts in the progress bar.
_TYPICAL_WHEEL = 20 * _MEGABYTE


class _Stopped(Exception):  # noqa: N818 - nobody's error
    """Another download failed, or the user has had enough: no further mirror is to be tried."""


def num_bytes(lock: Lock) -> int:
    """How much there is to download."""
    return sum(package.size for package in lock.debian) + sum(wheel.size or _TYPICAL_WHEEL for wheel in lock.wheels)


def fetch(lock: Lock, cache: Path, progress: Progress) -> dict[str, Path]:
    """All files of the lock in the cache, by path of the Debian package or name of the wheel.

    Raises MissingError and TamperedError as `download.fetch` and `wheels.fetch` do; the first error ends all.
    """
    mirrors = download.mirrors(lock.debian_mirrors)
    arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    stop = threading.Event()

    def tell(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        arrived.put(size)

    def debian(package: DebianPackage) -> Path:
        urls = tuple(f"{mirror}/{package.path}" for mirror in mirrors)
        return download.fetch(download.Download(package.file_name, urls, package.sha256, package.size), cache, tell)

    def wheel(wanted: Wheel) -> Path:
        file = wheels.fetch(wanted, cache)
        tell(wanted.size or _TYPICAL_WHEEL)
        return file

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        # The wheels first: pip needs seconds to find out where they are.
        running = {wanted.name: pool.submit(wheel, wanted) for wanted in lock.wheels}
        for package in sorted(lock.debian, key=lambda package: -package.size):
            running[package.path] = pool.submit(debian, package)
        for future in running.values():
            future.add_done_callback(lambda _: arrived.put(None))
        try:
            megabytes = _megabytes(running.values(), arrived)
            for _ in progress.track(megabytes, "Downloading, MB", num_bytes(lock) // _MEGABYTE):
                pass
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {key: future.result() for key, future in running.items()}


def _megabytes(running: Collection[Future[Path]], arrived: queue.SimpleQueue[int | None]) -> Iterator[None]:
    """One item for every megabyte that has come, until all is there. Raises what a download raised."""
    left = len(running)
    unreported = 0
    while left:
        news = arrived.get()
        if news is None:
            left -= 1
            for future in running:
                if future.done():
                    future.result()
            continue
        unreported += news
        while unreported >= _MEGABYTE:
            unreported -= _MEGABYTE
            yield
