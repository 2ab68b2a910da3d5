"""What of the emulator is on this machine, and whether it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.emulator import cycles, home, selftest
from edgeopt.emulator.cores import Core, all_cores
from edgeopt.emulator.installation import installed, unavailable
from edgeopt.emulator.lock import for_this_host
from edgeopt.progress import Progress


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """
    Attributes:
        problem: why the emulated phone can't be used; None when it can.
        directory: where it is, or would be.
        versions: name -> version of what is installed; empty where nothing is.
        unpinned: runtimes of other versions than edgeopt was tested with, because this machine has those.
        size_bytes: of the installation on disk.
        downloads_bytes: of the downloads that are kept for the next setup.
        outdated: directories of installations of other versions.
        trials: what was tried.
        llvm_mca: path of the tool that estimates cycles; None where it is not installed.
        cores: what the phone can be.
    """

    problem: str | None
    directory: str
    versions: Mapping[str, str]
    unpinned: tuple[str, ...]
    size_bytes: int
    downloads_bytes: int
    outdated: tuple[str, ...]
    trials: tuple[selftest.Trial, ...]
    llvm_mca: str | None
    cores: tuple[Core, ...]

    @property
    def works(self) -> bool:
        return self.problem is None and all(trial.problem is None for trial in self.trials)


def diagnose(progress: Progress) -> Diagnosis:
    """Look at the installation, and run small models on it."""
    problem = unavailable()
    emulator = installed() if problem is None else None
    directory = home.directory()
    return Diagnosis(
        problem=problem,
        directory=str(directory),
        versions=emulator.manifest.versions if emulator is not None else {},
        unpinned=tuple(wheel.name for wheel in for_this_host().wheels if wheel.sha256 is None),
        size_bytes=home.size(directory),
        downloads_bytes=home.size(home.downloads()),
        outdated=tuple(map(str, home.others())),
        trials=selftest.trials(emulator, progress) if emulator is not None else (),
        llvm_mca=cycles.analyzer(),
        cores=all_cores(),
    )
