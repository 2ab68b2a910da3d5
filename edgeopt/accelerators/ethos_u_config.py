"""An Ethos-U as Vela wants it described: one system configuration and one memory mode, at the board's clock."""

from __future__ import annotations

from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

from edgeopt.accelerators.ethos_u_boards import BOARDS
from edgeopt.errors import ConfigError, MissingError
from edgeopt.types import EthosU

#: Multiply-accumulates per cycle that each family is offered with, and that Vela knows.
MACS = {
    "ethos-u55": (64, 128, 256),
    "ethos-u65": (256, 512),
    "ethos-u85": (128, 256, 512, 1024, 2048),
}


def accelerator_config(npu: EthosU) -> str:
    """Vela's name of the accelerator: "ethos-u55-128". Raises ConfigError on a size that the family doesn't have."""
    if npu.macs not in MACS[npu.kind]:
        sizes = ", ".join(map(str, MACS[npu.kind]))
        raise ConfigError(f"there is no {title(npu)}", where="device: npu.macs", fix=f"take one of {sizes}")
    return f"{npu.kind}-{npu.macs}"


def title(npu: EthosU) -> str:
    """As people call it: "Ethos-U55-128"."""
    return f"{npu.kind.replace('ethos-u', 'Ethos-U')}-{npu.macs}"


def shipped_configuration() -> Path:
    """Arm's own configuration file, in Vela's package. Raises MissingError where Vela isn't installed."""
    spec = find_spec("ethosu")
    if spec is None or spec.submodule_search_locations is None:
        raise MissingError.extra("ethos-u-vela", "ethos-u", "an Ethos-U file")
    return Path(next(iter(spec.submodule_search_locations))) / "config_files" / "Arm" / "vela.ini"


def write_configuration(npu: EthosU, shipped: Path, destination: Path) -> None:
    """Write a Vela configuration with just this board's two sections.

    The NPU and its SRAM run at `npu.mhz`. Flash and DRAM have a clock of their own, so they keep the bytes per second
    that the system configuration gives them (Vela states their clock as a fraction of the NPU's).

    Args:
        shipped: the file that the sections come from, beside `ethos_u_boards`.

    Raises ConfigError when the device names a section that isn't there.
    """
    known = ConfigParser()
    known.optionxform = str  # type: ignore[assignment, method-assign]  # Vela's keys are case-sensitive
    known.read(shipped, encoding="utf-8")
    known.read_dict({f"System_Config.{name}": keys for name, keys in BOARDS.items()})
    system = _section(known, "System_Config", npu.system_config, "system-config")
    memory = _section(known, "Memory_Mode", npu.memory_mode, "memory-mode")
    ratio = float(system["core_clock"]) / (npu.mhz * 1e6)
    for key, value in system.items():
        if key.endswith("_clock_scale") and not key.startswith("Sram"):
            system[key] = repr(min(1.0, float(value) * ratio))
    system["core_clock"] = f"{npu.mhz}e6"
    own = ConfigParser()
    own.optionxform = str  # type: ignore[assignment, method-assign]
    own[f"System_Config.{npu.system_config}"] = system
    own[f"Memory_Mode.{npu.memory_mode}"] = memory
    with destination.open("w", encoding="utf-8") as file:
        own.write(file, space_around_delimiters=False)


def weights_in_sram(npu: EthosU) -> bool:
    """Whether this memory mode keeps weights and command stream in SRAM, beside the activations."""
    return npu.memory_mode.startswith("Sram_Only")


def arena_in_dram(npu: EthosU) -> bool:
    """Whether this memory mode keeps activations in DRAM, with SRAM as a cache of the NPU's own."""
    return npu.memory_mode.startswith("Dedicated_Sram")


def _section(known: ConfigParser, group: str, name: str, key: str) -> dict[str, str]:
    """One section's keys, with those of the section that it inherits from."""
    full = f"{group}.{name}"
    if full not in known:
        names = ", ".join(section.partition(".")[2] for section in known.sections() if section.startswith(group))
        raise ConfigError(f"Vela has no {name!r}", where=f"device: npu.{key}", fix=f"take one of {names}")
    values = dict(known[full])
    parent = values.pop("inherit", None)
    return values if parent is None else {**_section(known, group, parent.partition(".")[2], key), **values}
