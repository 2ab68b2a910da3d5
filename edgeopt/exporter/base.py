"""What every exporter does: one model in, a float file and a quantized file out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from edgeopt.types import WRAPPED_ATTRIBUTE, Artifact, EstimatorSpec, Finding, Format, Model, Sample, Scheme


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """Calibration as an exporter sees it.

    Attributes:
        samples: a fresh, streaming iterator over the calibration samples at each call, always the same ones in the
            same order. Exporters must not keep samples.
        count: how many there are.
        estimator: which range estimator every activation gets.
        on_finding: told about activations that look unhealthy (see `edgeopt.calibration`).
    """

    samples: Callable[[], Iterator[Sample]]
    count: int
    estimator: EstimatorSpec
    on_finding: Callable[[Finding], None]


@dataclass(frozen=True, slots=True)
class QuantizationRequest:
    """What to quantize to, which ranges, and which layers are exempt.

    Attributes:
        scheme: see `Scheme`.
        calibration: set exactly when `scheme.needs_calibration`.
        keep_float: shell patterns matched against source layer paths ("features.0.*", "classifier"); see
            `layer_is_exempt`.
    """

    scheme: Scheme
    calibration: CalibrationRun | None
    keep_float: tuple[str, ...] = ()


class Exporter(Protocol):
    """One per format. Stateless; writes only below the given directory.

    Both methods raise `ConversionError` naming operator and layer when the model can't be converted, and check that
    what the vendor's converter wrote is there, not empty, and readable.
    """

    format: Format
    #: File suffix with its dot.
    suffix: str

    def export_float(self, model: Model, directory: Path) -> Artifact:
        """Write `directory/model_fp32<suffix>`. It is the float twin of every quantized file of this format."""
        ...

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        """Write `directory/model<suffix>` from the same model, at `request.scheme` (fp16 included)."""
        ...


def strip_wrapper(layer: str) -> str:
    """A layer's path in the user's own module, without the source adapter's prefix."""
    return layer.removeprefix(f"{WRAPPED_ATTRIBUTE}.") if layer != WRAPPED_ATTRIBUTE else ""


def layer_is_exempt(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a source layer stays float: a pattern matches its path or that of a module that contains it."""
    parts = strip_wrapper(layer).split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)
