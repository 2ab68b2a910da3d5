"""Running `edgetpu_compiler` and reading what it prints.

The compiler is closed source and distributed as a Debian package for x86-64 (coral.ai/docs/edgetpu/compiler). With
`--show_operations` it prints its operator table; the compiled file is "<name>_edgetpu.tflite".
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgeopt.accelerators.edge_tpu.rules import MAPPED
from edgeopt.errors import ConversionError

PROGRAM = "edgetpu_compiler"
#: The compiler's own timer is set to the same.
_TIMEOUT_S = 600
_GRACE_S = 60
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ROW = re.compile(r"^(?P<type>[A-Za-z][\w-]*)\s+(?P<count>\d+)\s+(?P<status>\S.*\S)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler says about one file.

    Attributes:
        version: "16.0.384591198".
        statuses: (operator type, status) -> number of operators.
        onchip_bytes, offchip_bytes: parameters cached and streamed; None where not told.
    """

    version: str
    statuses: Counter[tuple[str, str]]
    onchip_bytes: int | None
    offchip_bytes: int | None

    def statuses_on_cpu(self, kind: str) -> list[str]:
        return [status for (name, status), _ in self.statuses.items() if name == kind and status != MAPPED]


def installed() -> str | None:
    """Path of the compiler on this machine."""
    return shutil.which(PROGRAM)


def run(program: str, model: Path, directory: Path) -> tuple[Path, Report]:
    """Compile one file into `directory`.

    Returns:
        The compiled file and the report.

    Raises:
        ConversionError: the compiler refuses the file, crashes, does not end, or leaves nothing behind.
    """
    command = [program, "--show_operations", "--timeout_sec", str(_TIMEOUT_S), "--out_dir", str(directory), str(model)]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S + _GRACE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"{PROGRAM} did not end within {_TIMEOUT_S} s", where=str(model)) from error
    except OSError as error:
        raise ConversionError(f"{PROGRAM} can't be started: {error.strerror}", where=program) from error
    compiled = directory / f"{model.stem}_edgetpu.tflite"
    printed = f"{done.stdout}\n{done.stderr}"
    if done.returncode or not compiled.is_file() or not compiled.stat().st_size:
        raise ConversionError(
            f"{PROGRAM} made no file: {_complaint(printed)}",
            where=str(model),
            fix="see `edgeopt coverage` for operators that it does not know",
        )
    log = directory / f"{model.stem}_edgetpu.log"
    return compiled, parse(printed + (log.read_text(errors="replace") if log.is_file() else ""))


def parse(text: str) -> Report:
    """Read the compiler's output, its log file, or both one after the other."""
    version = re.search(r"Compiler version (\S+)", text)
    statuses: Counter[tuple[str, str]] = Counter()
    for table in re.split(r"^Operator\s+Count\s+Status\s*$", text, flags=re.MULTILINE)[1:]:
        rows = Counter({(row["type"], row["status"]): int(row["count"]) for row in _ROW.finditer(table)})
        statuses |= rows  # the table is in the output and in the log
    return Report(
        version=version[1] if version else "unknown",
        statuses=statuses,
        onchip_bytes=_size(text, "On-chip memory used for caching model parameters"),
        offchip_bytes=_size(text, "Off-chip memory used for streaming uncached model parameters"),
    )


def _size(text: str, label: str) -> int | None:
    match = re.search(rf"{label}: ([\d.]+)\s*([KMG]i)?B", text)
    return round(float(match[1]) * _UNITS[f"{match[2] or ''}B"]) if match else None


def _complaint(printed: str) -> str:
    """The line that says what went wrong: errors first, or the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|failed|invalid|abort", line, re.IGNORECASE)]
    return (errors or lines or ["no message"])[0 if errors else -1]
