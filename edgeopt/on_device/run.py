"""`edgeopt device run`: the check that every bundle carries, run from edgeopt's own copy of it.

What lies in a bundle's `device/` is never executed here: anybody may have written it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgeopt.bundle import open_bundle
from edgeopt.bundle.templates.device.devicecheck.check import Settings, check
from edgeopt.bundle.templates.device.devicecheck.device import Facts
from edgeopt.bundle.templates.device.devicecheck.errors import CheckError
from edgeopt.bundle.templates.device.devicecheck.report import document, exit_code, lines
from edgeopt.emulator import Emulator, installed, unavailable
from edgeopt.errors import ConversionError, EdgeoptError, GateError, MissingError, UsageError
from edgeopt.json_data import dumps, to_plain
from edgeopt.native import IMPLEMENTATIONS
from edgeopt.on_device.merging import merged
from edgeopt.on_device.updating import reserved, update_reports
from edgeopt.progress import Progress, Silent
from edgeopt.types import Format, Report

_ERRORS: dict[int, type[EdgeoptError]] = {1: GateError, 2: UsageError, 3: MissingError, 4: ConversionError}


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """What came of it.

    Attributes:
        report: the bundle's, with the device's figures in it.
        device_report: device_report.json as text.
        lines: a summary for a person.
        exit_code: 0 passed, 1 an output or a gate failed, 3 the outputs could not be checked.
        was_signed: whether sums or a signature had to go from the bundle.
    """

    report: Report
    device_report: str
    lines: tuple[str, ...]
    exit_code: int
    was_signed: bool


def run(bundle: Path, settings: Settings, *, progress: Progress | None = None) -> DeviceRun:
    """Check a bundle on the device that `settings` names, and write both reports into the bundle.

    On a 64-bit Arm board with glibc, the runner and the runtime of the emulated phone are used where the user gives
    none.

    Raises:
        TamperedError: a file of the bundle is not what the manifest says. UsageError: no bundle, wrong settings, or
        another run works on it. MissingError: no device, lost, no space, nothing that runs the model.
        ConversionError: the model can't be run there, or did not end in time. The bundle is then as it was.
    """
    progress = progress or Silent()
    with reserved(bundle), tempfile.TemporaryDirectory(prefix="edgeopt-") as folder:
        loaded = open_bundle(bundle)
        try:
            result = check(
                bundle, settings, progress.step, lambda facts: _own_runner(loaded.format, facts, Path(folder))
            )
        except CheckError as error:
            _fail(error)
        found = document(result)
        text = dumps(to_plain(found))
        report = merged(loaded.report(), to_plain(found))
        was_signed = update_reports(bundle, report, text)
    return DeviceRun(report, text, tuple(lines(found, result)), exit_code(found), was_signed)


def _fail(error: CheckError) -> NoReturn:
    raise _ERRORS[error.code](str(error)) from error


def _own_runner(format_: Format, facts: Facts, folder: Path) -> Path | None:
    """The emulated phone's runner with its libraries beside it; None where it can't run on that device."""
    if facts.os != "linux" or facts.machine != "aarch64" or unavailable() is not None:
        return None
    emulator = installed()
    runner = folder / "edgeopt-runner"
    shutil.copyfile(emulator.runner(format_), runner)
    for library, name in _libraries(emulator, format_):
        shutil.copyfile(library, folder / name)
    return runner


def _libraries(emulator: Emulator, format_: Format) -> Iterator[tuple[Path, str]]:
    """The runtime's libraries, and the name by which the program looks for each."""
    implementation = IMPLEMENTATIONS[format_]
    directory = emulator.directory / "runtimes" / format_ / implementation.package
    for pattern in implementation.libraries:
        for library in sorted(directory.glob(pattern)):
            if not library.is_symlink():
                yield library, implementation.soname or library.name
