"""The emulator as setup left it on disk, and how programs are run in it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeopt.emulator import home, prefix
from edgeopt.emulator.cores import Core
from edgeopt.emulator.toolchain import Loader
from edgeopt.errors import MissingError, UsageError
from edgeopt.json_data import from_plain, loads
from edgeopt.types import Format

#: A phone has more than one core; kernels split their work by the number of threads, not by this.
CORES = 4
_SECONDS = 60
SET_UP = "edgeopt emulator setup"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an installation consists of.

    Attributes:
        versions: QEMU's and the runtimes' versions by name.
        unpinned: runtimes whose version is the host's and not the lock's: name -> SHA-256 of the wheel that came.
        hwcaps: -cpu value of QEMU 10 -> AT_HWCAP and AT_HWCAP2 of that CPU.
        hwcaps_counting: the same for QEMU 7.2.
    """

    versions: Mapping[str, str]
    unpinned: Mapping[str, str]
    hwcaps: Mapping[str, tuple[int, int]]
    hwcaps_counting: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Emulator:
    """An installation. Everything is below `directory`; nothing outside of it is needed but the kernel."""

    directory: Path
    manifest: Manifest

    @property
    def counter(self) -> Path:
        """The plugin that counts instructions, for `command`'s `plugin`."""
        return self.directory / "counter.so"

    def runner(self, format_: Format) -> Path:
        """The aarch64 edgeopt-runner for files of this format. Raises MissingError where no runtime takes it."""
        path = self.directory / "bin" / f"edgeopt-runner-{format_}"
        if not path.is_file():
            raise MissingError(f"the emulated phone does not run {format_} files")
        return path

    def command(self, core: Core, program: Sequence[str], *, plugin: str | None = None) -> list[str]:
        """The command line that runs an aarch64 program on that core.

        Without a plugin: QEMU 10, `CORES` cores. With one ("PATH,key=value"): QEMU 7.2 and one core, so that counts
        are the same each time. The program's environment is the caller's without LD_PRELOAD and LD_LIBRARY_PATH, which
        are about another architecture.
        """
        counting = plugin is not None
        cpu = core.qemu_counting if counting else core.qemu
        return [
            *(self._counting_qemu() if counting else [str(self.directory / "numerics/usr/bin/qemu-aarch64")]),
            *(("-plugin", plugin) if plugin is not None else ()),
            *(
                "-cpu",
                f"{cpu},midr={core.midr:#x}",
                "-L",
                str(self._prefix(core, counting)),
                "-U",
                "LD_PRELOAD,LD_LIBRARY_PATH",
            ),
            *program,
        ]

    def _counting_qemu(self) -> list[str]:
        counting = self.directory / "counting"
        return Loader.of(counting).command(counting / "usr/bin/qemu-aarch64")

    def _prefix(self, core: Core, counting: bool) -> Path:
        """The directory with the core's /proc and /sys, made when it is first asked for."""
        hwcaps = self.manifest.hwcaps_counting if counting else self.manifest.hwcaps
        cpu = core.qemu_counting if counting else core.qemu
        num_cores = 1 if counting else CORES
        name = f"{core.name}-{core.level}-{'counting' if counting else 'numerics'}"
        directory = self.directory / "prefixes" / name
        features = prefix.features_line(*hwcaps[cpu])
        try:
            prefix.make(directory, self.directory / "sysroot", core, features, num_cores)
        except OSError as error:
            raise home.not_writable(directory, error) from error
        return directory


def unavailable() -> str | None:
    """Why the emulated phone can't be used, and how to get it; None when it is set up. Quick."""
    problem = home.unsupported()
    if problem is not None:
        return problem
    if not (home.directory() / home.MANIFEST).is_file():
        older = " for this version of edgeopt and its runtimes" if home.others() else ""
        return f"the emulated phone is not set up{older}: run `{SET_UP}`"
    return None


def installed() -> Emulator:
    """The installation of this version of edgeopt. Raises MissingError where there is none."""
    problem = unavailable()
    if problem is not None:
        raise MissingError(problem)
    return opened(home.directory())


def opened(directory: Path) -> Emulator:
    """The installation in a directory. Raises MissingError where it is damaged."""
    path = directory / home.MANIFEST
    try:
        manifest = from_plain(Manifest, loads(path.read_bytes(), str(path)), str(path))
    except (OSError, UsageError) as error:
        raise MissingError(
            "can't be read", where=str(path), fix=f"`edgeopt emulator remove`, then `{SET_UP}`"
        ) from error
    return Emulator(directory, manifest)


def output_of(command: Sequence[str], what: str) -> str:
    """Standard output of a short program. Raises MissingError, naming `what`, where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"does not run: {error}", where=what) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise MissingError(f"does not run: {reason}", where=what)
    return done.stdout
