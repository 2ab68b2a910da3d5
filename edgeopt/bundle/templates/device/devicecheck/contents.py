"""The bundle that this directory lies in: read, and held against its own hashes."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import figures
from .errors import USAGE, CheckError

if TYPE_CHECKING:
    from typing import Any

    Json = dict[str, Any]

MANIFEST = "manifest.json"
_FORMATS = ("litert", "onnx", "executorch")


@dataclass(frozen=True)
class Tensor:
    name: str
    native_name: str
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A golden input or output. `shape` is in elements; the file holds little-endian numbers in C order."""

    tensor: Tensor
    path: Path
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * figures.itemsize(self.tensor.dtype)


@dataclass(frozen=True)
class Vector:
    """In the order of the model's signature."""

    inputs: tuple[Stored, ...]
    outputs: tuple[Stored, ...]


@dataclass(frozen=True)
class Contents:
    """What the check needs to know of a bundle. Limits are None where there is no such gate."""

    name: str
    target: str
    profile: str
    format: str
    precision: str
    model: Path
    model_sha256: str
    manifest_sha256: str
    vectors: tuple[Vector, ...]
    tolerance: float
    max_latency_ms: float | None
    max_peak_memory_bytes: int | None


def read(bundle: Path) -> Contents:
    """Raises CheckError when it is no bundle, one that runs elsewhere than on a CPU, or when a file is damaged."""
    try:
        text = (bundle / MANIFEST).read_bytes()
        plain = json.loads(text)
        if plain["kind"] != "edgeopt-bundle" or plain["schema_version"] != 1:
            raise CheckError(f"{bundle} is no bundle of a version that this check knows", USAGE)
        return _parse(bundle, plain, hashlib.sha256(text).hexdigest())
    except OSError as error:
        raise CheckError(
            f"{error.filename or bundle} can't be read: {error.strerror}; is this a bundle?", USAGE
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{bundle / MANIFEST} is damaged: {type(error).__name__} {error}", USAGE) from error


def _parse(bundle: Path, plain: Json, sha256: str) -> Contents:
    target = plain["target_definition"]
    if plain["format"] not in _FORMATS or plain["model"]["emulation"] is not None or target["accelerator"] is not None:
        raise CheckError(
            f"{bundle} is for {plain['device']}'s accelerator or for Core ML, which this can't check", USAGE
        )
    signature = plain["model"]["signature"]
    inputs, outputs = (tuple(map(_tensor, signature[kind])) for kind in ("inputs", "outputs"))
    model = _intact(bundle, plain["model"]["file"], plain["files"])
    vectors = tuple(
        Vector(
            tuple(_stored(bundle, tensor, vector["inputs"][tensor.name], plain["files"]) for tensor in inputs),
            tuple(_stored(bundle, tensor, vector["outputs"][tensor.name], plain["files"]) for tensor in outputs),
        )
        for vector in plain["golden"]
    )
    if not vectors:
        raise CheckError(f"{bundle} has no golden vectors to check with", USAGE)
    gates = target["gates"]
    return Contents(
        name=plain["name"],
        target=plain["target"],
        profile=plain["device"],
        format=plain["format"],
        precision=plain["precision"],
        model=model,
        model_sha256=plain["files"][plain["model"]["file"]]["sha256"],
        manifest_sha256=sha256,
        vectors=vectors,
        tolerance=float(plain["golden_tolerance"]),
        max_latency_ms=gates["max_latency_ms"],
        max_peak_memory_bytes=gates["max_peak_memory_bytes"],
    )


def _tensor(plain: Json) -> Tensor:
    return Tensor(plain["name"], plain["native_name"], plain["dtype"])


def _stored(bundle: Path, tensor: Tensor, plain: Json, files: Json) -> Stored:
    stored = Stored(tensor, _intact(bundle, plain["file"], files), tuple(int(size) for size in plain["shape"]))
    if stored.path.stat().st_size != stored.size_bytes:
        raise CheckError(f"{stored.path} does not hold {stored.shape} of {tensor.dtype}", USAGE)
    return stored


def _intact(bundle: Path, name: str, files: Json) -> Path:
    """The file, which must be a plain one in the bundle and have the hash that the manifest says."""
    path = bundle / name
    if path.is_symlink() or bundle.resolve() not in path.resolve().parents:
        raise CheckError(f"{path} leads out of the bundle", USAGE)
    if hashlib.sha256(path.read_bytes()).hexdigest() != files[name]["sha256"]:
        raise CheckError(f"{path} is not the file that the manifest describes (SHA-256 differs)", USAGE)
    return path
