"""The fitted parameters, as benchmarks/prediction.py wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from edgeopt.prediction.model import Parameters
from edgeopt.toml_data import Form, parse, read_toml

_FILE = Path(__file__).with_name("parameters.toml")


class _DeviceForm(Form):
    compute: float = Field(gt=0)
    memory: float = Field(gt=0)
    figures: int
    old_figures: int


class _ModelForm(Form):
    figures: int
    devices: int
    networks: int
    serial: float
    sharing: float
    dispatch_us: float
    old_kernels: dict[str, float]
    interval: dict[str, float]
    efficiency: dict[str, float]
    core: dict[str, float]
    memory: dict[str, float]
    device: dict[str, _DeviceForm]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """The parameters and what they rest on.

    Attributes:
        figures, devices, networks: how many published figures they were fitted to, of how many devices and networks.
        published: by device, how many of the figures are its own; of_old_kernels: how many of those are of a time
            before XNNPACK, whose figures are longer by `old_kernels`, by precision.
        coverage: share of held-out figures that an interval holds. widths: half-widths in logarithms, by what is known
            of the device: "published", "unseen", "calibrated-1", "calibrated-3".
        digest: of the file.
    """

    parameters: Parameters
    figures: int
    devices: int
    networks: int
    published: Mapping[str, int]
    of_old_kernels: Mapping[str, int]
    old_kernels: Mapping[str, float]
    coverage: float
    widths: Mapping[str, float]
    digest: str


def load() -> LatencyModel:
    """Read the package's parameters."""
    form = parse(_ModelForm, read_toml(_FILE), _FILE)
    parameters = Parameters(
        efficiency=form.efficiency,
        serial=form.serial,
        sharing=form.sharing,
        dispatch_us=form.dispatch_us,
        core=form.core,
        memory=form.memory,
        device={name: (own.compute, own.memory) for name, own in form.device.items()},
    )
    widths = dict(form.interval)
    return LatencyModel(
        parameters=parameters,
        figures=form.figures,
        devices=form.devices,
        networks=form.networks,
        published={name: own.figures for name, own in form.device.items()},
        of_old_kernels={name: own.old_figures for name, own in form.device.items()},
        old_kernels=form.old_kernels,
        coverage=widths.pop("coverage"),
        widths=widths,
        digest=sha256(_FILE.read_bytes()).hexdigest(),
    )
