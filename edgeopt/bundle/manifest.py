"""manifest.json: what is in a bundle and how to use it. Documented in docs/bundle.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from edgeopt.errors import TamperedError, UsageError
from edgeopt.json_data import from_plain, loads
from edgeopt.targets.schema import Target
from edgeopt.types import DType, Format, Precision, Preprocessing, Signature, StepRecord, TextPreprocessing

SCHEMA_VERSION = 1
KIND: Literal["edgeopt-bundle"] = "edgeopt-bundle"
MANIFEST = "manifest.json"
REPORT = "report.json"
#: A picture of what the report says.
CHART = "steps.svg"
#: What `device/check` measured on a device, added later.
DEVICE_REPORT = "device_report.json"
#: The hash of every file and its signature: made last of all.
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.minisig"
#: Files that the manifest does not list and that a bundle may lack.
ADDED = frozenset({CHART, DEVICE_REPORT, SUMS, SIGNATURE})
#: Files that the manifest does not list: they hold latencies, which no second run repeats, or come later.
UNLISTED = frozenset({MANIFEST, REPORT}) | ADDED
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A file of raw little-endian numbers in C order."""

    file: str
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class StoredVector:
    """A `GoldenVector` on disk."""

    inputs: Mapping[str, StoredArray]
    outputs: Mapping[str, StoredArray]
    reference: Mapping[str, StoredArray]
    label: int | StoredArray | None

    def arrays(self) -> tuple[StoredArray, ...]:
        label = (self.label,) if isinstance(self.label, StoredArray) else ()
        return (*self.inputs.values(), *self.outputs.values(), *self.reference.values(), *label)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model in the bundle: where (a directory for Core ML), and how to call it.

    `emulation` is a file with the same arithmetic that runs on a computer, where `file` only runs on the device.
    """

    file: str
    precision: Precision
    signature: Signature
    emulation: str | None = None

    @property
    def runnable(self) -> str:
        return self.emulation or self.file


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed manifest.json.

    Attributes:
        target: name of `target_definition`, which holds the gates and runtimes that the bundle was judged with.
        golden_tolerance: how far an output may be from its golden vector on other hardware, as a fraction of the
            golden output's range (kernels of one runtime differ by some quantization steps between processors).
        device_files: files that the device may use besides the model.
        licence: of the model, as an SPDX expression; None where nobody declared it.
        files: every file but manifest.json and report.json, by path relative to the bundle, with "/".
    """

    schema_version: int
    kind: Literal["edgeopt-bundle"]
    name: str
    target: str
    device: str
    status: Literal["passed", "failed"]
    format: Format
    precision: Precision
    model: ModelFile
    float_twin: ModelFile | None
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    golden: tuple[StoredVector, ...]
    golden_tolerance: float
    history: tuple[StepRecord, ...]
    source_sha256: str
    tools: Mapping[str, str]
    target_definition: Target
    files: Mapping[str, FileEntry]
    device_files: tuple[str, ...] = ()
    licence: str | None = None

    def referenced(self) -> tuple[str, ...]:
        """Every file or directory that another part of the manifest speaks of."""
        twin = (self.float_twin.file,) if self.float_twin else ()
        emulation = (self.model.emulation,) if self.model.emulation else ()
        arrays = (array.file for vector in self.golden for array in vector.arrays())
        files = (self.model.file, *twin, *emulation, *self.device_files, *arrays)
        if isinstance(self.preprocessing, TextPreprocessing):
            return (*files, f"{self.preprocessing.tokenizer}/{TOKENIZER_FILE}")
        return files


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Raises UsageError on anything but a manifest of a version that we know, TamperedError on a name that escapes."""
    plain = loads(text, where)
    if not isinstance(plain, dict) or plain.get("kind") != KIND:
        raise UsageError("is not the manifest of an edgeopt bundle", where=where)
    if plain.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"has schema version {plain.get('schema_version')!r}, this edgeopt reads {SCHEMA_VERSION}",
            where=where,
            fix="use the edgeopt that wrote the bundle",
        )
    manifest = from_plain(Manifest, plain, where)
    for name in manifest.files:
        if not _stays_inside(name):
            raise TamperedError(f"the file name {name!r} leads out of the bundle", where=where)
    for name in manifest.referenced():
        if name not in manifest.files and not any(file.startswith(f"{name}/") for file in manifest.files):
            raise TamperedError(f"speaks of {name!r}, which `files` does not list", where=where)
    return manifest


def is_bundle(directory: Path) -> bool:
    """Whether a directory looks like a bundle of ours, of any schema version."""
    try:
        plain = loads((directory / MANIFEST).read_bytes(), MANIFEST)
    except (OSError, UsageError):
        return False
    return isinstance(plain, dict) and plain.get("kind") == KIND


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and str(path) == name and "\\" not in name
