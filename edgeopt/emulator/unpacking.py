"""From downloaded packages to the directories of an installation."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgeopt.emulator import deb, wheels
from edgeopt.emulator.lock import DebianPackage, Group, Lock, Wheel
from edgeopt.emulator.toolchain import LIBRARIES, LOADER
from edgeopt.errors import TamperedError
from edgeopt.native import IMPLEMENTATIONS
from edgeopt.progress import Progress
from edgeopt.types import Format

#: Which files of a package are kept, by what the package is for. A * matches no "/".
_KEPT: Mapping[Group, tuple[str, ...]] = {
    "numerics": ("usr/bin/qemu-aarch64",),
    "counting": ("usr/bin/qemu-aarch64", LOADER, *(f"{directory}/lib*.so*" for directory in LIBRARIES)),
    "sysroot": ("lib/ld-linux-aarch64.so.1", "lib/aarch64-linux-gnu/*.so*", "usr/lib/aarch64-linux-gnu/lib*.so*"),
}
#: Groups that are unpacked whole, and not kept once the runners are built.
TOOLS: tuple[Group, ...] = ("compiler", "headers")


def unpack_debian(lock: Lock, files: Mapping[str, Path], tree: Path, tools: Path, progress: Progress) -> None:
    """Unpack what is kept into `tree/<group>`, and what only the build needs into `tools/<group>`."""

    def unpack(package: DebianPackage) -> None:
        directory = (tools if package.group in TOOLS else tree) / package.group
        directory.mkdir(parents=True, exist_ok=True)
        patterns = _KEPT.get(package.group)
        if patterns is None:
            deb.unpack(files[package.path], directory, package.file_name, bool)
            return
        wanted = {"numerics": 1}.get(package.group)  # what follows in that package is 60 other emulators
        deb.unpack(
            files[package.path],
            directory,
            package.file_name,
            lambda path: any(_matches(path, pattern) for pattern in patterns),
            wanted,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        unpacked = pool.map(unpack, sorted(lock.debian, key=lambda package: -package.size))
        for _ in progress.track(unpacked, "Unpacking", len(lock.debian)):
            pass


def unpack_wheel(wheel: Wheel, file: Path, directory: Path) -> None:
    """Unpack a runtime's libraries and headers into the directory. Raises TamperedError where a library is missing."""
    implementation = IMPLEMENTATIONS[wheel.format]
    headers = tuple(f"{implementation.package}/{folder}/*" for folder in implementation.include)
    libraries = tuple(f"{implementation.package}/{library}" for library in implementation.libraries)
    wheels.unpack(file, directory, (*headers, *libraries))
    for library in linked(directory, wheel.format):
        if implementation.soname is not None:
            library.with_name(implementation.soname).symlink_to(library.name)


def linked(directory: Path, format_: Format) -> list[Path]:
    """The libraries of an unpacked runtime, in the order in which they are linked. Raises TamperedError where one is
    missing."""
    found = []
    for pattern in IMPLEMENTATIONS[format_].libraries:
        paths = [
            path for path in directory.glob(f"{IMPLEMENTATIONS[format_].package}/{pattern}") if not path.is_symlink()
        ]
        if len(paths) != 1:
            raise TamperedError(f"has {len(paths)} files {pattern} instead of 1", where=f"{format_} runtime's wheel")
        found += paths
    return found


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
