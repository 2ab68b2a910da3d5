"""generation.json: the bundle of a network that writes, a folder of ordinary bundles. See docs/generation-bundle.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeopt.bundle.manifest import (
    MANIFEST,
    REPORT,
    SIGNATURE,
    SUMS,
    TOKENIZER_FILE,
    UNLISTED,
    FileEntry,
)
from edgeopt.errors import TamperedError, UsageError
from edgeopt.json_data import from_plain, loads
from edgeopt.targets.schema import Target
from edgeopt.types import Format, Generation, PartName, Precision, Preprocessing, StepRecord, TextPreprocessing

SCHEMA_VERSION = 1
GENERATION_KIND: Literal["edgeopt-generation-bundle"] = "edgeopt-generation-bundle"
GENERATION = "generation.json"
GOLDEN = "golden.jsonl"
EXAMPLES = "examples.jsonl"
#: Files at the top that generation.json doesn't list: itself, what no second run repeats, and what is made last.
TOP_UNLISTED = frozenset({GENERATION, REPORT, SUMS, SIGNATURE})
#: The same in a part's folder. The part's manifest.json isn't one of them: `PartEntry` holds its hash.
PART_UNLISTED = UNLISTED - {MANIFEST}
#: The parts of each kind, in the order in which the loop runs them.
PARTS: Mapping[str, tuple[PartName, PartName]] = {
    "encoder-decoder": ("encoder", "decoder"),
    "decoder": ("prefill", "decoder"),
}


@dataclass(frozen=True, slots=True)
class PartEntry:
    """An ordinary bundle in a folder of this one; the hash is that of its manifest.json, which has all others."""

    folder: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class GenerationManifest:
    """The parsed generation.json.

    Attributes:
        precision: of the decoder, which is what runs for every token.
        beams, length_penalty: what the report's texts were searched with; the decoder has so many rows.
        metric, metric_signature: what judged the texts, None where nothing did.
        preprocessing: of the whole network; a tokenizer's path is relative to the bundle.
        tokenizer: what turns ids into text: "tokenizer.json", None where there is none.
        size_bytes: of the model files together, as a device needs them. float_size_bytes: of their twins; None where
            one is left out.
        tensors, loop: how the parts' tensors are named, and how to write with them, in words.
        files: every file but those in `TOP_UNLISTED` and in the parts' folders.
    """

    schema_version: int
    kind: Literal["edgeopt-generation-bundle"]
    name: str
    target: str
    device: str
    status: Literal["passed", "failed"]
    format: Format
    precision: Precision
    generation: Generation
    beams: int
    length_penalty: float
    metric: str | None
    metric_signature: str | None
    preprocessing: Preprocessing | None
    tokenizer: str | None
    parts: Mapping[PartName, PartEntry]
    size_bytes: int
    float_size_bytes: int | None
    tensors: Mapping[str, str]
    loop: tuple[str, ...]
    history: tuple[StepRecord, ...]
    source_sha256: str
    tools: Mapping[str, str]
    target_definition: Target
    files: Mapping[str, FileEntry]
    licence: str | None = None


def parse_generation_manifest(text: bytes, where: str) -> GenerationManifest:
    """Raises UsageError on anything but a generation.json of a version that we know, TamperedError on a file or a
    folder that leads out of the bundle or into a part."""
    plain = loads(text, where)
    if not isinstance(plain, dict) or plain.get("kind") != GENERATION_KIND:
        raise UsageError("is not the description of a network that writes", where=where)
    if plain.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"has schema version {plain.get('schema_version')!r}, this edgeopt reads {SCHEMA_VERSION}",
            where=where,
            fix="use the edgeopt that wrote the bundle",
        )
    manifest = from_plain(GenerationManifest, plain, where)
    if set(manifest.parts) != set(PARTS[manifest.generation.kind]):
        wanted, found = " and ".join(PARTS[manifest.generation.kind]), ", ".join(manifest.parts) or "none"
        raise TamperedError(f"has the parts {found}; a network of this kind has {wanted}", where=where)
    for part, entry in manifest.parts.items():
        if entry.folder != part:  # other folders could lead anywhere, or be each other's
            raise TamperedError(f"says that the part {part!r} is in {entry.folder!r}", where=where)
    for name in manifest.files:
        if not _is_at_the_top(name, manifest):
            raise TamperedError(f"the file name {name!r} leads out of the bundle's own folder", where=where)
    for name in (GOLDEN, EXAMPLES, *((TOKENIZER_FILE,) if manifest.tokenizer is not None else ())):
        if name not in manifest.files:
            raise TamperedError(f"speaks of {name!r}, which `files` does not list", where=where)
    used = manifest.preprocessing.tokenizer if isinstance(manifest.preprocessing, TextPreprocessing) else None
    if manifest.tokenizer not in (None, TOKENIZER_FILE) or used not in (None, manifest.tokenizer):
        raise TamperedError(f"has the tokenizer {(used or manifest.tokenizer)!r}", where=where)
    return manifest


def is_generation_bundle(directory: Path) -> bool:
    """Whether a directory looks like the bundle of a network that writes, of any schema version."""
    try:
        plain = json.loads((directory / GENERATION).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(plain, dict) and plain.get("kind") == GENERATION_KIND


def refuse_generation_bundle(directory: Path) -> None:
    """Raises UsageError, for whoever wants an ordinary bundle, where a directory is that of a network that writes."""
    if is_generation_bundle(directory):
        raise UsageError(
            "is the bundle of a network that writes, which consists of several bundles",
            where=str(directory),
            fix=f"give one of them, such as {directory / 'decoder'}",
        )


def unlisted_of_parts(manifest: GenerationManifest) -> frozenset[str]:
    """Files in the parts' folders that may be there without a hash in generation.json or in the part's manifest."""
    return frozenset(f"{entry.folder}/{name}" for entry in manifest.parts.values() for name in PART_UNLISTED)


def _is_at_the_top(name: str, manifest: GenerationManifest) -> bool:
    """A plain relative name, neither one of the unlisted files nor in a part's folder."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and "\\" not in name
    return plain and name not in TOP_UNLISTED and parts[0] not in manifest.parts
