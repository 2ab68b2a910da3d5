"""What Vela says of the TOSA graphs inside a .pte file: the same graphs that its Ethos-U delegates were made from."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeopt.accelerators.ethos_u_config import (
    accelerator_config,
    arena_in_dram,
    shipped_configuration,
    weights_in_sram,
    write_configuration,
)
from edgeopt.accelerators.ethos_u_report import Summary, read_summary
from edgeopt.errors import ConversionError
from edgeopt.types import EthosU

_TIME_LIMIT_S = 1800


@dataclass(frozen=True, slots=True)
class Estimate:
    """One inference on the NPU; what the CPU does is not in it.

    Attributes:
        sram_bytes: the largest that a delegate needs: they run one after another, in the same memory.
        external_bytes: of DRAM or flash in use beside the file itself.
    """

    latency_ms: float
    cycles: int
    macs: int
    sram_bytes: int
    external_bytes: int
    sram_traffic_bytes: int
    storage_traffic_bytes: int


def estimate(graphs: Sequence[bytes], npu: EthosU, directory: Path) -> Estimate:
    """Compile each graph for this board and add up what Vela tells.

    Raises:
        ConversionError: Vela refuses a graph.
        ConfigError: the device names a configuration that Vela doesn't have.
        MissingError: Vela isn't installed.
    """
    found = [_summary(graph, npu, directory) for graph in graphs]
    return Estimate(
        latency_ms=sum(s.inference_ms for s in found),
        cycles=sum(s.cycles for s in found),
        macs=sum(s.macs for s in found),
        sram_bytes=max((s.sram for s in found), default=0)
        + (sum(s.on_chip_flash for s in found) if weights_in_sram(npu) else 0),
        external_bytes=sum(s.dram + s.off_chip_flash for s in found) if arena_in_dram(npu) else 0,
        sram_traffic_bytes=sum(s.sram_traffic for s in found),
        storage_traffic_bytes=sum(s.other_traffic for s in found),
    )


def _summary(graph: bytes, npu: EthosU, directory: Path) -> Summary:
    """Vela's figures for one graph. It runs in a process of its own, which its core may end."""
    with tempfile.TemporaryDirectory(prefix="vela-", dir=directory) as scratch:
        work = Path(scratch)
        source, configuration = work / "block.tosa", work / "board.ini"
        source.write_bytes(graph)
        write_configuration(npu, shipped_configuration(), configuration)
        command = [
            *(sys.executable, "-m", "ethosu.vela", str(source.resolve()), "--output-format", "raw"),
            *("--output-dir", str(work), "--config", str(configuration.resolve())),
            *("--accelerator-config", accelerator_config(npu)),
            *("--system-config", npu.system_config, "--memory-mode", npu.memory_mode),
            *("--optimise", "Performance", "--arena-cache-size", str(npu.sram_bytes)),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired as error:
            raise ConversionError(
                f"Vela did not finish in {_TIME_LIMIT_S // 60} minutes", where="TOSA graph"
            ) from error
        summaries = list(work.glob("*_summary_*.csv"))
        if done.returncode != 0 or not summaries:
            said = [line.strip() for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.strip()]
            reason = said[-1] if said else f"exit code {done.returncode}"
            raise ConversionError(f"Vela can't compile a delegate's TOSA graph: {reason}", where=npu.kind)
        return read_summary(summaries[0])
