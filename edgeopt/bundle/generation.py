"""Writing the bundle of a network that writes: its parts' ordinary bundles, and what the whole needs around them.

The same contents always give the same bytes, the report.json files (they hold latencies) apart.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeopt.bundle.apps.base import render
from edgeopt.bundle.destination import prepare_output, replace_directory
from edgeopt.bundle.generation_consistency import contradictions, layers_of
from edgeopt.bundle.generation_contents import GenerationContents, GoldenSequence
from edgeopt.bundle.generation_guide import loop_steps, render_guide, tensor_rules
from edgeopt.bundle.generation_manifest import (
    EXAMPLES,
    GENERATION,
    GENERATION_KIND,
    GOLDEN,
    PARTS,
    SCHEMA_VERSION,
    GenerationManifest,
    PartEntry,
)
from edgeopt.bundle.generation_scripts import scripts
from edgeopt.bundle.generation_stored import StoredSequence, json_line
from edgeopt.bundle.licences import LICENCES
from edgeopt.bundle.manifest import MANIFEST, REPORT, TOKENIZER_FILE, FileEntry, Manifest, ModelFile, parse_manifest
from edgeopt.bundle.writer import TOKENIZER_FILES, write_bundle
from edgeopt.errors import ConversionError, UsageError
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.json_data import dumps, loads
from edgeopt.report_file import to_json
from edgeopt.types import Bundle, PartName, TextPreprocessing


def write_generation_bundle(final: Path, contents: GenerationContents) -> Bundle:
    """Write the bundle and put it at `final` in one step, in place of an older one.

    Raises ConversionError when the parts don't fit each other; and as `write_bundle` does: UsageError when it can't be
    put there, MissingError when the disk is full, TamperedError when a part's file has changed since it was made.
    """
    prepare_output(final)
    with replace_directory(final) as directory:
        manifest = _fill(directory, contents)
        text = dumps(manifest)
        (directory / GENERATION).write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        (directory / REPORT).write_text(to_json(contents.report, digest), encoding="utf-8")
    return Bundle(
        path=final,
        target=contents.target.name,
        passed=contents.report.status == "passed",
        report=contents.report,
    )


def _fill(directory: Path, contents: GenerationContents) -> GenerationManifest:
    """Write every file but generation.json and report.json; returns what describes them."""
    order = PARTS[contents.generation.kind]
    if set(contents.parts) != set(order):
        raise ConversionError(f"has the parts {', '.join(contents.parts)}", where=contents.model.name)
    parts = {part: _write_part(directory / part, part, contents) for part in order}
    tokenizer = _copy_tokenizer(directory, contents)
    manifest = _manifest(directory, contents, parts, tokenizer)
    for problem in contradictions(manifest, parts):
        raise ConversionError(problem, where=contents.model.name)
    manifest = replace(manifest, loop=loop_steps(manifest, parts))
    _write_golden(directory, contents.golden)
    examples = "".join(json_line(example) for example in contents.examples)
    (directory / EXAMPLES).write_text(examples, encoding="utf-8")
    has_scripts = all((directory / part / "python").is_dir() for part in parts)
    if has_scripts:
        for name, script in scripts(manifest, parts, truncation=_truncation(directory, tokenizer)).items():
            (directory / name).write_text(script, encoding="utf-8")
    guide = render_guide(
        manifest, parts, contents.report, contents.examples,
        sizes={part: size_of(directory / part / parts[part].model.file) for part in parts}, has_scripts=has_scripts,
    )  # fmt: skip
    (directory / "README.md").write_text(guide, encoding="utf-8")
    (directory / LICENCES).write_text(_licences(manifest), encoding="utf-8")
    return replace(manifest, files=_entries(directory, order))


def _write_part(folder: Path, part: PartName, contents: GenerationContents) -> Manifest:
    """The ordinary bundle of a part. The tokenizer stays at the top: a part takes and gives arrays."""
    inner = contents.parts[part]
    expected = f"{contents.model.name}-{part}"
    if inner.model.name != expected:
        raise ConversionError(f"has the part {inner.model.name!r} for {expected!r}", where=contents.model.name)
    if isinstance(inner.model.preprocessing, TextPreprocessing):
        inner = replace(inner, model=replace(inner.model, preprocessing=None))
    write_bundle(folder, inner)
    return parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))


def _manifest(
    directory: Path, contents: GenerationContents, parts: Mapping[PartName, Manifest], tokenizer: str | None
) -> GenerationManifest:
    """All of generation.json but the loop and the files, which come of it."""
    preprocessing = contents.model.preprocessing
    if isinstance(preprocessing, TextPreprocessing):
        preprocessing = replace(preprocessing, tokenizer=TOKENIZER_FILE)
    decoder = parts["decoder"]
    draft = GenerationManifest(
        schema_version=SCHEMA_VERSION,
        kind=GENERATION_KIND,
        name=contents.model.name,
        target=contents.target.name,
        device=contents.device.name,
        status=contents.report.status,
        format=decoder.format,
        precision=decoder.precision,
        # Layers that were cut out have no cache any more.
        generation=replace(contents.generation, layers=layers_of(decoder)),
        beams=contents.beams,
        length_penalty=contents.length_penalty,
        metric=contents.metric,
        metric_signature=contents.metric_signature,
        preprocessing=preprocessing,
        tokenizer=tokenizer,
        parts={part: PartEntry(part, sha256_of(directory / part / MANIFEST)) for part in parts},
        size_bytes=sum(size_of(directory / part / manifest.model.file) for part, manifest in parts.items()),
        float_size_bytes=_float_bytes(directory, parts),
        tensors={},
        loop=(),
        history=decoder.history,
        source_sha256=contents.model.source_sha256,
        tools={name: tool for manifest in parts.values() for name, tool in manifest.tools.items()},
        target_definition=contents.target,
        files={},
        licence=contents.licence,
    )
    return replace(draft, tensors=tensor_rules(draft))


def _float_bytes(directory: Path, parts: Mapping[PartName, Manifest]) -> int | None:
    twins: dict[PartName, ModelFile | None] = {part: manifest.float_twin for part, manifest in parts.items()}
    sizes = [size_of(directory / part / twin.file) for part, twin in twins.items() if twin is not None]
    return sum(sizes) if len(sizes) == len(twins) else None


def _copy_tokenizer(directory: Path, contents: GenerationContents) -> str | None:
    """tokenizer.json, once for all parts, with what transformers writes beside it about padding."""
    preprocessing = contents.model.preprocessing
    source = contents.tokenizer
    if isinstance(preprocessing, TextPreprocessing):
        source = Path(preprocessing.tokenizer)
    if source is None:
        return None
    folder = source if source.is_dir() else source.parent
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if source.is_file():
        files[TOKENIZER_FILE] = source
    if TOKENIZER_FILE not in files:
        raise UsageError(f"no {TOKENIZER_FILE} there", where=f"tokenizer {source}")
    for name, path in files.items():
        shutil.copyfile(path, directory / name)
    return TOKENIZER_FILE


def _truncation(directory: Path, tokenizer: str | None) -> str:
    """The side on which the tokenizer cuts."""
    plain = loads((directory / tokenizer).read_bytes(), tokenizer) if tokenizer is not None else None
    own = plain.get("truncation") if isinstance(plain, dict) else None
    return "left" if isinstance(own, dict) and own.get("direction") == "Left" else "right"


def _write_golden(directory: Path, golden: tuple[GoldenSequence, ...]) -> None:
    lines = []
    for number, sequence in enumerate(golden):
        files = {name: f"golden/{number}_{place}.npy" for place, name in enumerate(sequence.inputs)}
        for name, file in files.items():
            (directory / file).parent.mkdir(exist_ok=True)
            np.save(directory / file, np.ascontiguousarray(sequence.inputs[name]), allow_pickle=False)
        lines.append(
            json_line(
                StoredSequence(
                    prompt=sequence.prompt,
                    inputs=files,
                    ids=sequence.ids,
                    text=sequence.text,
                    beams=sequence.beams,
                    max_new_tokens=sequence.max_new_tokens,
                )
            )
        )
    (directory / GOLDEN).write_text("".join(lines), encoding="utf-8")


def _licences(manifest: GenerationManifest) -> str:
    folders = [f"`{part}/`" for part in manifest.parts]
    licence = manifest.licence if manifest.licence is not None else "unknown: not declared"
    return render(
        "generation",
        "LICENCES.md.j2",
        name=manifest.name,
        target=manifest.target,
        folders=" and ".join(folders),
        tokenizer=manifest.tokenizer is not None,
        licence=" ".join(licence.split()).replace("|", "\\|"),
        lists=" and ".join(f"`{part}/{LICENCES}`" for part in manifest.parts),
    )


def _entries(directory: Path, parts: tuple[PartName, ...]) -> dict[str, FileEntry]:
    """Every file that is there but the parts'."""
    names = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())
    own = [name for name in names if name.partition("/")[0] not in parts]
    return {name: FileEntry(sha256_of(directory / name), (directory / name).stat().st_size) for name in own}
