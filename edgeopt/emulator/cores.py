"""Which CPUs the emulated phone can be: cores.toml, and what device profiles say about theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edgeopt.device_profiles import list_devices, load_device
from edgeopt.device_profiles.schema import CoreCluster, DeviceProfile, Feature
from edgeopt.errors import UsageError
from edgeopt.toml_data import Form, parse, read_toml

TABLE = Path(__file__).with_name("cores.toml")

#: Those that levels are made of.
FEATURES: tuple[Feature, ...] = ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme")

#: Variant (bits 23-20) and revision (bits 3-0) of a MIDR; both 0 is the first of its kind, "r0p0".
_VERSION_BITS = 0x00F0000F


@dataclass(frozen=True, slots=True)
class Core:
    """One emulated CPU.

    Attributes:
        name: as in device profiles, "cortex-a76".
        title: for people, "Arm Cortex-A76".
        level: name of its set of extensions, "armv8.2-dotprod".
        features: what the emulated CPU executes. A device's core may have more; `stand_in` then says so.
        midr: Main ID Register, which programs are shown; kernels are chosen by it and by the features.
        cache_kb: first and second level data cache, KiB.
        qemu: value of QEMU 10's -cpu.
        qemu_counting: value of QEMU 7.2's -cpu; the same features.
        llvm: name for LLVM's -mcpu.
        stand_in: what it differs in from the real core, None where QEMU has a model of this very core.
    """

    name: str
    title: str
    level: str
    features: tuple[Feature, ...]
    midr: int
    cache_kb: tuple[int, int]
    qemu: str
    qemu_counting: str
    llvm: str
    stand_in: str | None


class LevelForm(Form):
    name: str
    features: list[Feature]
    qemu: str
    qemu_counting: str


class CoreForm(Form):
    name: str
    title: str
    midr: Annotated[int, Field(gt=0, lt=1 << 32)] | None = None
    cache_kb: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)] | None = None
    stands_in: str | None = None
    level: str
    qemu: str | None = None
    llvm: str


class TableForm(Form):
    sources: list[str]
    level: list[LevelForm]
    core: list[CoreForm]


def all_cores() -> tuple[Core, ...]:
    """All cores of the table, with the extensions that they have where no device says otherwise."""
    table = _table()
    return tuple(_core(table, form, _level_named(table, form.level)) for form in table.core)


def cpus() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The -cpu values that cores can have: those of QEMU 10, and those of QEMU 7.2 for counting."""
    table = _table()
    own = [form.qemu for form in table.core if form.qemu is not None]
    return (
        tuple(dict.fromkeys([*(level.qemu for level in table.level), *own])),
        tuple(dict.fromkeys(level.qemu_counting for level in table.level)),
    )


def core_for(profile: str) -> Core:
    """The CPU of a profile: a core ("cortex-a76"), a device ("pixel-4": the core with the highest clock), or a core of
    a device ("pixel-4:cortex-a55"). A device is a built-in one or the path of a .toml file.

    Raises UsageError on an unknown name, and where the device's cores are not Arm application cores.
    """
    device_name, _, core_name = profile.partition(":")
    table = _table()
    form = next((form for form in table.core if form.name == profile), None)
    if form is not None:
        return _core(table, form, _level_named(table, form.level))
    if not core_name:
        _check_known(device_name, table)
    device = load_device(device_name)
    cluster = _cluster(device, core_name)
    form = next((form for form in table.core if form.name == cluster.core), None)
    if form is None:
        raise UsageError(
            f"{device.title} has a {cluster.core}, which the emulated phone can't be",
            where=f"phone:{profile}",
            fix="only Arm application cores can be emulated: `edgeopt emulator doctor` lists them",
        )
    return _of_device(table, form, cluster.features)


@cache
def _table() -> TableForm:
    return parse(TableForm, read_toml(TABLE), TABLE)


def _level_named(table: TableForm, name: str) -> LevelForm:
    return next(level for level in table.level if level.name == name)


def _core(table: TableForm, form: CoreForm, level: LevelForm) -> Core:
    double = next((other for other in table.core if other.name == form.stands_in), form)
    assert double.midr is not None, f"{form.name} has neither midr nor stands-in"
    assert double.cache_kb is not None, f"{double.name} lacks cache-kb"
    own_level = form.level == level.name
    own_model = own_level and form.qemu is not None
    return Core(
        name=form.name,
        title=form.title,
        level=level.name,
        features=tuple(level.features),
        # The extensions that a later version of a core got are told from its version: show the first one without them.
        midr=double.midr if own_level or _is_newer(table, level.name, form.level) else double.midr & ~_VERSION_BITS,
        cache_kb=(double.cache_kb[0], double.cache_kb[1]),
        qemu=form.qemu if own_model and form.qemu is not None else level.qemu,
        qemu_counting=level.qemu_counting,
        llvm=form.llvm,
        stand_in=None if own_model else _stand_in(double if double is not form else None, level),
    )


def _is_newer(table: TableForm, level: str, than: str) -> bool:
    names = [form.name for form in table.level]
    return names.index(level) > names.index(than)


def _stand_in(double: CoreForm | None, level: LevelForm) -> str:
    shown = f", shown to programs as {double.title}" if double is not None else ""
    return f"QEMU's {level.qemu.partition(',')[0]}, which has the same instruction sets{shown}"


def _of_device(table: TableForm, form: CoreForm, features: Sequence[Feature]) -> Core:
    """The core with a device's extensions: those of the highest level that has no more than the device."""
    has = frozenset(features)
    fitting = [level for level in table.level if has.issuperset(level.features)]
    level = max(fitting, key=lambda level: len(level.features), default=table.level[0])
    core = _core(table, form, level)
    lacking = ", ".join(sorted(has - set(level.features)))
    if not lacking:
        return core
    return replace(
        core, stand_in=f"QEMU's {level.qemu.partition(',')[0]}, which has all its instruction sets but {lacking}"
    )


def _cluster(device: DeviceProfile, core_name: str) -> CoreCluster:
    if not core_name:
        return max(device.clusters, key=lambda cluster: cluster.max_mhz)
    for cluster in device.clusters:
        if cluster.core == core_name:
            return cluster
    names = list(dict.fromkeys(cluster.core for cluster in device.clusters))
    raise UsageError(
        f"has no core {core_name!r}", where=f"device {device.name!r}", fix=f"its cores: {', '.join(names)}"
    )


def _check_known(name: str, table: TableForm) -> None:
    """Raises UsageError on what is neither a core nor a device, with near names of both."""
    if "/" in name or name.endswith(".toml"):
        return
    known = [*(form.name for form in table.core), *(device.name for device in list_devices())]
    if name in known:
        return
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`edgeopt emulator doctor` lists the cores"
    raise UsageError(f"unknown core or device {name!r}", where=f"phone:{name}", fix=hint)
