"""What a target says. Its TOML form is documented in docs/targets.md; keys are these names in kebab-case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.types import EstimatorSpec, Format, Gates, NpuKind, Scheme

#: Gates and flags in "MB" count mebibytes, so that a limit of 5 shows as 5.00 MiB beside the measured size.
BYTES_PER_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """What to build and how to judge it.

    Attributes:
        name: `<platform>-<precision>` or `<platform>-<runtime>-<precision>`.
        summary: one line for `edgeopt targets`.
        platform: "android", "linux-arm64", ...
        format: which exporter.
        runtimes: names in `edgeopt.runtimes.RUNTIMES` to validate in; the first decides latency.
        device: default device profile.
        scheme: what to quantize to.
        estimator: default range estimator.
        recipe: passes that a model gets before it is quantized, ("auto",) or none.
        accelerator: what the file is compiled for; the device must have one of that kind. None for CPU kernels.
        emulators: stand in for `runtimes` where those can't run on this machine.
        gates: default limits; flags and edgeopt.toml override them one by one.
        advice: failed check name -> what to try, e.g. {"speedup": "transformers: try android-int8-dynamic"}.
    """

    name: str
    summary: str
    platform: str
    format: Format
    runtimes: tuple[str, ...]
    device: str
    scheme: Scheme
    estimator: EstimatorSpec
    gates: Gates
    advice: Mapping[str, str]
    recipe: tuple[str, ...] = ()
    accelerator: NpuKind | None = None
    emulators: tuple[str, ...] = ()
