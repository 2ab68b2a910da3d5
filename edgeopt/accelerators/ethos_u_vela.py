"""Vela, Arm's compiler for the Ethos-U: one .tflite file in; the compiled file and Vela's own reports out."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from edgeopt.accelerators.ethos_u_config import (
    accelerator_config,
    shipped_configuration,
    weights_in_sram,
    write_configuration,
)
from edgeopt.accelerators.ethos_u_report import Summary, Tables, cpu_reasons, read_database, read_summary
from edgeopt.errors import ConversionError
from edgeopt.formats.files import size_of
from edgeopt.types import EthosU

PACKAGE = "ethos-u-vela"
#: An EfficientNet-Lite0 takes a second; a search that has not ended by then has gone astray.
_TIME_LIMIT_S = 1800
#: Asked for where the weights alone exceed the SRAM; what is made then fails its check on memory.
_SMALLEST_ARENA = 16 << 10
_EXCEPTION = re.compile(r"^\w*(?:Error|Exception): (?:Compilation failed: )?(?:Error: )?")


@dataclass(frozen=True, slots=True)
class VelaRun:
    """What one run of Vela left.

    Attributes:
        path: the compiled file.
        summary: the whole network's figures.
        tables: Vela's debug database, which knows every operator of the file that went in.
        reasons: first output tensor of an operator that stays on the CPU -> why.
    """

    path: Path
    summary: Summary
    tables: Tables
    reasons: dict[str, str]


def tool() -> str:
    """ "vela 5.1.0"."""
    return f"vela {version(PACKAGE)}"


def run_vela(path: Path, npu: EthosU, directory: Path) -> VelaRun:
    """Compile one file and write `directory/<name>_vela.tflite`.

    Vela runs in a process of its own: on a damaged file its C++ core ends the process.

    Raises:
        ConversionError: Vela refuses the file, crashes or writes nothing.
        ConfigError: the device names a configuration that Vela doesn't have.
        MissingError: Vela isn't installed.
    """
    with tempfile.TemporaryDirectory(prefix="vela-", dir=directory) as scratch:
        work = Path(scratch)
        configuration = work / "board.ini"
        write_configuration(npu, shipped_configuration(), configuration)
        log = _run(path, npu, configuration, work)
        written = work / f"{path.stem}_vela.tflite"
        if not written.is_file() or written.stat().st_size == 0:
            raise ConversionError("Vela wrote no file, or an empty one", where=str(path))
        compiled = directory / written.name
        written.replace(compiled)
        return VelaRun(
            path=compiled,
            summary=read_summary(next(work.glob("*_summary_*.csv"))),
            tables=read_database((work / f"{path.stem}_debug.xml").read_text(encoding="utf-8")),
            reasons=cpu_reasons(log),
        )


def arena_bytes(path: Path, npu: EthosU) -> int:
    """SRAM for activations: all of it, or what the weights leave where they live there too."""
    return max(npu.sram_bytes - size_of(path), _SMALLEST_ARENA) if weights_in_sram(npu) else npu.sram_bytes


def _run(path: Path, npu: EthosU, configuration: Path, directory: Path) -> str:
    """What Vela said. Raises ConversionError when it failed."""
    command = [
        *(sys.executable, "-m", "ethosu.vela", str(path.resolve())),
        *("--output-dir", str(directory), "--config", str(configuration.resolve())),
        *("--accelerator-config", accelerator_config(npu)),
        *("--system-config", npu.system_config, "--memory-mode", npu.memory_mode),
        # Vela then trades time for memory until the activations fit, or nothing more can be gained.
        *("--optimise", "Performance", "--arena-cache-size", str(arena_bytes(path, npu))),
        "--enable-debug-db",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        minutes = _TIME_LIMIT_S // 60
        raise ConversionError(f"Vela did not finish in {minutes} minutes", where=str(path)) from error
    if done.returncode != 0:
        raise ConversionError(f"Vela can't compile the file: {_complaint(done)}", where=str(path))
    return done.stdout


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed run said at the end: the exception with all its lines, or the last line, or how it was killed.

    Vela's own exceptions name the operator and the tensor.
    """
    said = [line.strip() for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.strip()]
    raised = max((i for i, line in enumerate(said) if _EXCEPTION.match(line)), default=None)
    if raised is not None:
        return _EXCEPTION.sub("", " ".join(said[raised:])).strip()
    if said:
        return said[-1]
    return signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
