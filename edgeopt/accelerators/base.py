"""What every accelerator module does: one exported file in, the compiled file and its placement out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeopt.types import Artifact, Check, Finding, Measurement, Npu, Placement

#: `Measurement.subject` of everything that is said about the file that ships.
SUBJECT = "quantized"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What an accelerator's tools made of one file, and said about it.

    Attributes:
        artifact: the file that ships. Where a compiler wrote it, `path`, `size_bytes`, `sha256`, `history` and `tools`
            are the new file's, and `emulation` is the one that came in; otherwise the artifact that came in.
        placement: where its operators run.
        measurements: figures of the compiler or of a model of the device, all with provenance "estimated":
            `latency_ms`, `cycles`, `sram_bytes`, `storage_bytes`, `macs`, ...
        checks: figures against what the device has. A failed one fails the run.
        findings: what a person should know.
        extra_files: more files for the device, such as a context binary for one system on chip.
    """

    artifact: Artifact
    placement: Placement
    measurements: tuple[Measurement, ...] = ()
    checks: tuple[Check, ...] = ()
    findings: tuple[Finding, ...] = ()
    extra_files: tuple[Path, ...] = ()


class Accelerator(Protocol):
    """One per pair of format and accelerator. Stateless; writes only below the given directory."""

    def unavailable(self) -> str | None:
        """What is missing on this machine without which nothing can be made or said, and how to get it; None when all
        is there. Quick: it is asked before any work."""
        ...

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        """Compile the file where the compiler is on this machine, and tell where its operators run.

        The same file and `npu` give the same bytes. `artifact` may be any file of the format, not only one of ours.
        Raises ConversionError when the compiler refuses the file, naming the operator.
        """
        ...
