"""What setup downloads: lock.toml."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgeopt.toml_data import Form, parse, read_toml
from edgeopt.types import Format

TABLE = Path(__file__).with_name("lock.toml")

Group = Literal["numerics", "counting", "sysroot", "compiler", "headers"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class DebianPackage:
    """One .deb file: `path` below a mirror, its SHA-256, its size in bytes, and what it is for."""

    group: Group
    path: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def version(self) -> str:
        return self.file_name.split("_")[1]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A runtime's aarch64 wheel.

    `sha256` and `size` are None where the host's own package has another version than the one that was pinned: then
    PyPI's word has to do, and what came is recorded.
    """

    format: Format
    name: str
    version: str
    sha256: str | None
    size: int | None


@dataclass(frozen=True, slots=True)
class Lock:
    debian_mirrors: tuple[str, ...]
    debian: tuple[DebianPackage, ...]
    wheels: tuple[Wheel, ...]


class DebianForm(Form):
    group: Group
    path: Annotated[str, Field(pattern=r"^pool/[^\s]+_[^\s_]+_[a-z0-9]+\.deb$")]
    sha256: Sha256
    size: Annotated[int, Field(gt=0)]


class WheelForm(Form):
    format: Format
    name: str
    version: str
    sha256: Sha256
    size: Annotated[int, Field(gt=0)]


class LockForm(Form):
    debian_mirrors: Annotated[list[Annotated[str, Field(pattern=r"^https?://")]], Field(min_length=1)]
    debian: list[DebianForm]
    wheel: list[WheelForm]


def read(path: Path = TABLE) -> Lock:
    """The pinned files. Raises ConfigError on a mistake in the table."""
    form = parse(LockForm, read_toml(path), path)
    return Lock(
        debian_mirrors=tuple(mirror.rstrip("/") for mirror in form.debian_mirrors),
        debian=tuple(DebianPackage(d.group, d.path, d.sha256, d.size) for d in form.debian),
        wheels=tuple(Wheel(w.format, w.name, w.version, w.sha256, w.size) for w in form.wheel),
    )


@cache
def for_this_host() -> Lock:
    """The lock with the runtimes in the versions that this machine has: only like can be compared with like."""
    lock = read()
    return replace(lock, wheels=tuple(_as_installed(wheel) for wheel in lock.wheels))


def _as_installed(wheel: Wheel) -> Wheel:
    try:
        version = metadata.version(wheel.name)
    except metadata.PackageNotFoundError:
        return wheel
    version = version.partition("+")[0]  # "1.5.1+cpu" is a build of 1.5.1
    return wheel if version == wheel.version else replace(wheel, version=version, sha256=None, size=None)
