"""What goes into a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.types import Array, Artifact, Model, Report

if TYPE_CHECKING:
    from edgeopt.device_profiles.schema import DeviceProfile
    from edgeopt.targets.schema import Target


@dataclass(frozen=True, slots=True)
class GoldenVector:
    """One real input with what the shipped file makes of it; arrays are keyed by `SignatureTensor.name`.

    Attributes:
        inputs, outputs: in the file's terms (layout, type, quantized where its I/O is).
        reference: the float twin's outputs for that sample, in the model's terms.
        label: the sample's label; None when unlabelled.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    reference: Mapping[str, Array]
    label: int | Array | None


@dataclass(frozen=True, slots=True)
class BundleContents:
    """Everything that `write_bundle` needs.

    Attributes:
        target: as used, with the run's own gates in place of the target's, so that a later validation judges alike.
        model: for its name, labels, preprocessing and where it came from.
        artifact: the file that ships, and its float twin; None leaves the twin out.
        chart: an .svg picture of what the recipe's steps did; None where there were none.
        device_files: what else the device needs or may use, such as a context binary for one system on chip.
        golden: a handful of samples; each costs its inputs and outputs in bytes.
        licence: of the model, as an SPDX expression; None where nobody declared it.
    """

    target: Target
    device: DeviceProfile
    model: Model
    artifact: Artifact
    float_artifact: Artifact | None
    report: Report
    golden: tuple[GoldenVector, ...]
    chart: bytes | None = None
    device_files: tuple[Path, ...] = ()
    licence: str | None = None
