"""Installs the emulator: downloads, unpacks, builds, tries it, and only then puts it in its place."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from edgeopt.emulator import download, fetching, home, selftest
from edgeopt.emulator.build import build
from edgeopt.emulator.cores import cpus
from edgeopt.emulator.installation import Emulator, Manifest, installed, opened, output_of, unavailable
from edgeopt.emulator.lock import Lock, for_this_host
from edgeopt.emulator.toolchain import Loader, c_compiler
from edgeopt.emulator.unpacking import unpack_debian, unpack_wheel
from edgeopt.errors import MissingError
from edgeopt.json_data import dumps
from edgeopt.progress import Progress, Silent


def setup(progress: Progress | None = None) -> Emulator:
    """Install the emulator, unless it is there. Several processes may call this at the same time: one works, the
    others wait for it.

    Raises MissingError where this machine can't have it, a download fails or the disk is full, TamperedError where a
    download is not the pinned file. Nothing is left behind then but downloads, which the next try goes on with.
    """
    progress = progress or Silent()
    if unavailable() is None:
        return installed()
    problem = home.unsupported()
    if problem is not None:
        raise MissingError(problem)
    c_compiler()
    progress.step("Waiting for another setup")
    with home.locked():
        if (home.directory() / home.MANIFEST).is_file():
            return opened(home.directory())
        for killed in (*home.root().glob(".making-*"), *home.downloads().glob(".making-*")):
            shutil.rmtree(killed, ignore_errors=True)
        try:
            return _install(for_this_host(), progress)
        except OSError as error:
            download.raise_if_disk_is_full(error, home.root())
            raise home.not_writable(Path(str(error.filename or home.root())), error) from error


def _install(lock: Lock, progress: Progress) -> Emulator:
    home.downloads().mkdir(exist_ok=True)
    files = fetching.fetch(lock, home.downloads(), progress)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=home.root()))
    tree, tools = scratch / "tree", scratch / "tools"
    try:
        unpack_debian(lock, files, tree, tools, progress)
        for wheel in lock.wheels:
            unpack_wheel(wheel, files[wheel.name], tree / "runtimes" / wheel.format)
        build(tree, tools, progress)
        progress.step("Trying every CPU")
        (tree / home.MANIFEST).write_text(dumps(_manifest(lock, files, tree)), encoding="utf-8")
        selftest.check(opened(tree), progress)
        tree.chmod(0o755)
        shutil.rmtree(home.directory(), ignore_errors=True)  # what an interrupted `remove` left
        tree.rename(home.directory())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return opened(home.directory())


def _manifest(lock: Lock, files: dict[str, Path], tree: Path) -> Manifest:
    versions = {wheel.name: wheel.version for wheel in lock.wheels}
    for name, group in (("qemu", "numerics"), ("qemu for counting", "counting")):
        package = next(p for p in lock.debian if p.group == group and p.file_name.startswith("qemu-user_"))
        versions[name] = package.version.partition("+")[0]
    counting = tree / "counting"
    numerics_cpus, counting_cpus = cpus()
    qemu = [str(tree / "numerics/usr/bin/qemu-aarch64")]
    return Manifest(
        versions=versions,
        unpinned={w.name: download.sha256_of(files[w.name]) for w in lock.wheels if w.sha256 is None},
        hwcaps={cpu: _hwcaps(qemu, cpu, tree) for cpu in numerics_cpus},
        hwcaps_counting={
            cpu: _hwcaps(Loader.of(counting).command(counting / "usr/bin/qemu-aarch64"), cpu, tree)
            for cpu in counting_cpus
        },
    )


def _hwcaps(qemu: list[str], cpu: str, tree: Path) -> tuple[int, int]:
    """AT_HWCAP and AT_HWCAP2 of a CPU."""
    command = [*qemu, "-cpu", cpu, "-L", str(tree / "sysroot"), str(tree / "bin/hwcap")]
    first, second = output_of(command, f"CPU {cpu}").split()
    return int(first, 16), int(second, 16)
