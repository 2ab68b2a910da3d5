"""What several files here need: the emulated phone, and edgeopt-runner built for this machine.

Under xdist every process asks for them; the first one makes them, the others wait at a lock and find them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeopt.emulator import Emulator, deb, download, home, lock, setup
from edgeopt.errors import MissingError
from edgeopt.native import IMPLEMENTATIONS, PROGRAM, RUNNER
from edgeopt.types import Format


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """The emulated phone, set up first where it is not. Skips where this machine can't have it or its downloads."""
    try:
        return setup()
    except MissingError as error:
        if (error.where or "").startswith("self-test") or "can't be built" in error.problem:
            raise  # that would be our fault
        pytest.skip(error.line())


@pytest.fixture(scope="session")
def onnxruntime_headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with onnxruntime_c_api.h: the system's, or of the package that the emulator is built with."""
    for folder in map(Path, ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")):
        if (folder / "onnxruntime_c_api.h").is_file():
            return folder
    (package,) = (package for package in lock.read().debian if package.group == "headers")
    urls = tuple(f"{mirror}/{package.path}" for mirror in download.mirrors(lock.read().debian_mirrors))
    wanted = download.Download(package.file_name, urls, package.sha256, package.size)
    try:
        with home.locked():
            home.downloads().mkdir(exist_ok=True)
            file = download.fetch(wanted, home.downloads(), lambda _: None)
    except MissingError as error:
        pytest.skip(error.line())
    scratch = tmp_path_factory.mktemp("onnxruntime")
    deb.unpack(file, scratch, package.file_name, lambda path: path.endswith(".h"))
    return scratch / "usr/include/onnxruntime"


@pytest.fixture(scope="session")
def host_runner(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[Format], Path]:
    """Gives a format's edgeopt-runner, built for this machine with the undefined-behaviour sanitizer."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runners"
    directory.mkdir(exist_ok=True)

    def get(format_: Format) -> Path:
        headers = request.getfixturevalue("onnxruntime_headers") if format_ == "onnx" else None
        runner = directory / format_
        with (directory / ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not runner.is_file():
                _build(format_, runner, headers)
        return runner

    return get


def _build(format_: Format, target: Path, headers: Path | None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    program = target.with_name("program.o")  # the same for all
    if not program.is_file():
        _compile("-r", "-nostdlib", *(RUNNER / name for name in PROGRAM), "-o", program)
    implementation = IMPLEMENTATIONS[format_]
    spec = find_spec(implementation.package)  # without importing what it registers
    assert spec is not None
    package = Path(next(iter(spec.submodule_search_locations or ())))
    libraries = [path for pattern in implementation.libraries for path in sorted(package.glob(pattern))]
    include = [package / folder for folder in implementation.include] + ([headers] if headers is not None else [])
    folders = {library.parent for library in libraries}
    if implementation.soname is not None:
        target.with_name(implementation.soname).symlink_to(libraries[0])
        folders = {target.parent}
    _compile(
        *(f"-D{name}" for name in implementation.definitions),
        *(part for folder in include for part in ("-isystem", folder)),
        *(RUNNER / implementation.source, program, "-o", target, "-Wl,--no-as-needed", *libraries),
        *(f"-Wl,-rpath,{folder}" for folder in folders),
    )


def _compile(*words: str | Path) -> None:
    flags = ("-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover")
    subprocess.run(["g++", *flags, *map(str, words)], check=True)
