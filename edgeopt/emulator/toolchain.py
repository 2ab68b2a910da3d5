"""Compiles for the emulated phone with Debian's cross compiler, and the counting plugin with the host's own.

The cross compiler's parts are called one by one, each through the C library that came with it: so it does not matter
what this machine's C library is, and the compiler drivers, which would look for parts in /usr, need not be there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeopt.errors import MissingError

_SECONDS = 300
_WARNINGS = ("-Wall", "-Wextra")
#: x86-64 libraries of a Debian package, and its loader.
LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
LOADER = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"


@dataclass(frozen=True, slots=True)
class Loader:
    """Starts x86-64 programs with libraries of their own instead of this machine's."""

    loader: Path
    libraries: tuple[Path, ...]

    @classmethod
    def of(cls, directory: Path, *more: Path) -> Loader:
        """The C library unpacked in `directory`, with libraries there and in further unpacked packages."""
        return cls(directory / LOADER, tuple(root / name for root in (directory, *more) for name in LIBRARIES))

    def command(self, program: Path) -> list[str]:
        return [str(self.loader), "--library-path", ":".join(map(str, self.libraries)), str(program)]


@dataclass(frozen=True, slots=True)
class CrossCompiler:
    """GCC 12 for aarch64, unpacked in `root`; programs are linked against the libraries in `sysroot`."""

    root: Path
    sysroot: Path
    loader: Loader

    def compile(self, source: Path, target: Path, include: Sequence[Path], definitions: Sequence[str]) -> None:
        """One C++17 source file -> one object file. Raises MissingError with the compiler's words where it fails."""
        gcc = self.root / "usr/lib/gcc-cross/aarch64-linux-gnu/12"
        system = self.root / "usr/aarch64-linux-gnu/include"
        places = (
            *(system / "c++/12", system / "c++/12/aarch64-linux-gnu", system / "c++/12/backward"),
            *(gcc / "include", system, *include),
        )
        assembly = target.with_suffix(".s")
        _run(
            [
                *self.loader.command(gcc / "cc1plus"),
                *("-quiet", "-nostdinc", "-nostdinc++", "-D_GNU_SOURCE", "-std=c++17", "-O2", "-fPIE", *_WARNINGS),
                *("-mlittle-endian", "-mabi=lp64", f"-I{source.parent}"),
                *(f"-D{definition}" for definition in definitions),
                *(part for place in places for part in ("-isystem", str(place))),
                *(str(source), "-o", str(assembly)),
            ],
            source.name,
        )
        assembler = self.loader.command(self.root / "usr/bin/aarch64-linux-gnu-as")
        _run([*assembler, "-EL", "-mabi=lp64", "-o", str(target), str(assembly)], source.name)

    def link(self, objects: Sequence[Path], target: Path, libraries: Sequence[Path], rpath: str = "") -> None:
        """Object files and shared libraries -> a program that finds the libraries by `rpath` ("$ORIGIN/../lib")."""
        gcc = self.root / "usr/lib/gcc-cross/aarch64-linux-gnu/12"
        start = self.root / "usr/aarch64-linux-gnu/lib"
        lib = self.sysroot / "lib/aarch64-linux-gnu"
        standard = self.sysroot / "usr/lib/aarch64-linux-gnu/libstdc++.so.6"
        _run(
            [
                *self.loader.command(self.root / "usr/bin/aarch64-linux-gnu-ld.bfd"),
                *("-EL", "-pie", "--build-id=sha1", "--eh-frame-hdr", "--hash-style=gnu", "-z", "relro"),
                *("-dynamic-linker", "/lib/ld-linux-aarch64.so.1", "-rpath-link", f"{lib}:{standard.parent}"),
                *(("-rpath", rpath) if rpath else ()),
                *map(str, (start / "Scrt1.o", start / "crti.o", gcc / "crtbeginS.o", *objects)),
                # Kernels and backends register themselves when their library is loaded, though nobody calls them.
                *("--no-as-needed", *map(str, libraries), "--as-needed"),
                *map(str, (standard, lib / "libm.so.6", lib / "libgcc_s.so.1", gcc / "libgcc.a", lib / "libc.so.6")),
                *map(str, (start / "libc_nonshared.a", lib / "ld-linux-aarch64.so.1")),
                *map(str, (gcc / "crtendS.o", start / "crtn.o", "-o", target)),
            ],
            target.name,
        )


def build_plugin(source: Path, target: Path) -> None:
    """Compile QEMU's plugin with this machine's C compiler.

    It is not linked against this machine's C library, which may be newer than the one that QEMU runs with. Raises
    MissingError where there is no compiler, or it fails.
    """
    flags = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-nostdlib", *_WARNINGS)
    _run([*c_compiler(), *flags, str(source), "-o", str(target)], source.name)


def c_compiler() -> list[str]:
    """$CC or the first of cc, gcc and clang. Raises MissingError where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in ([named] if named else []) + [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise MissingError(
        "the counting plugin needs a C compiler, and there is none", fix="apt install gcc, or set CC to your compiler"
    )


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"took more than {_SECONDS} s to build", where=what) from error
    except OSError as error:
        raise MissingError(f"can't be built: {command[0]}: {error.strerror}", where=what) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise MissingError(f"can't be built: {said[0] if said else f'exit code {done.returncode}'}", where=what)
