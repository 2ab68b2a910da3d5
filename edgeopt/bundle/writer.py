"""Writing a bundle: the same contents always give the same bytes, report.json (it holds latencies) apart."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path
from typing import get_args

import numpy as np

from edgeopt.bundle.apps import write_apps
from edgeopt.bundle.contents import BundleContents, GoldenVector
from edgeopt.bundle.destination import prepare_output, replace_directory
from edgeopt.bundle.device_check import write_device_check
from edgeopt.bundle.guide import render_guide
from edgeopt.bundle.licences import LICENCES, licences
from edgeopt.bundle.manifest import (
    CHART,
    KIND,
    MANIFEST,
    REPORT,
    SCHEMA_VERSION,
    TOKENIZER_FILE,
    FileEntry,
    Manifest,
    ModelFile,
    StoredArray,
    StoredVector,
)
from edgeopt.bundle.sbom import SBOM, sbom
from edgeopt.bundle.sparse_storage import StorageSizes, compare, is_sparse, pack
from edgeopt.errors import TamperedError, UsageError
from edgeopt.formats.files import copy, sha256_of
from edgeopt.json_data import dumps
from edgeopt.report_file import to_json
from edgeopt.types import (
    Array,
    Artifact,
    Bundle,
    DType,
    ImagePreprocessing,
    Precision,
    Preprocessing,
    TextPreprocessing,
)

#: Fraction of a golden output's range by which other hardware may differ. Measured on int8: XNNPACK, builtin and
#: reference kernels of one LiteRT are up to 8 of 255 steps apart.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2}
QUANTIZED_TOLERANCE = 0.05

TOKENIZER = "tokenizer"
#: A tokenizer's directory may also hold gigabytes of weights.
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json")


def write_bundle(final: Path, contents: BundleContents) -> Bundle:
    """Write the bundle and put it at `final` in one step, in place of an older one.

    Raises UsageError when it can't be put there (see `prepare_output`) and MissingError when the disk is full, leaving
    nothing behind and an older bundle untouched; TamperedError when an artifact's file has changed since it was made.
    """
    prepare_output(final)
    with replace_directory(final) as directory:
        manifest = _fill(directory, contents)
        text = dumps(manifest)
        (directory / MANIFEST).write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        (directory / REPORT).write_text(to_json(contents.report, digest), encoding="utf-8")
        if contents.chart is not None:
            (directory / CHART).write_bytes(contents.chart)
    return Bundle(
        path=final,
        target=contents.target.name,
        passed=contents.report.status == "passed",
        report=contents.report,
    )


def _fill(directory: Path, contents: BundleContents) -> Manifest:
    """Write every file but manifest and report; returns the manifest that describes them."""
    model, artifact = contents.model, contents.artifact
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        kind=KIND,
        name=model.name,
        target=contents.target.name,
        device=contents.device.name,
        status=contents.report.status,
        format=artifact.format,
        precision=artifact.precision,
        model=_copy_model(artifact, directory, f"model{artifact.path.suffix}"),
        float_twin=_copy_twin(contents.float_artifact, directory),
        preprocessing=_copy_preprocessing(model.preprocessing, directory),
        labels=model.labels,
        golden=tuple(_store_vector(vector, directory, k) for k, vector in enumerate(contents.golden)),
        golden_tolerance=TOLERANCE.get(artifact.precision, QUANTIZED_TOLERANCE),
        history=artifact.history,
        source_sha256=model.source_sha256,
        tools={**artifact.tools, **_resizer(model.preprocessing)},
        target_definition=contents.target,
        files={},
        device_files=tuple(_copy_device_file(path, directory) for path in contents.device_files),
        licence=contents.licence,
    )
    if model.labels:
        lines = "".join(" ".join(label.split()) + "\n" for label in model.labels)
        (directory / "labels.txt").write_text(lines, encoding="utf-8")
    sizes = _pack(directory / manifest.model.file) if _can_be_packed(artifact) else None
    _copy_scripts(("check.py",) if sizes is None else ("check.py", "unpack.py", "unpack.hpp"), directory)
    write_apps(manifest, directory)
    write_device_check(manifest, directory)
    guide = render_guide(manifest, has_chart=contents.chart is not None, sizes=sizes, folders=_folders(directory))
    (directory / "README.md").write_text(guide, encoding="utf-8")
    (directory / LICENCES).write_text(licences(manifest), encoding="utf-8")
    (directory / SBOM).write_text(sbom(replace(manifest, files=_entries(directory))), encoding="utf-8")
    return replace(manifest, files=_entries(directory))


def _folders(directory: Path) -> frozenset[str]:
    return frozenset(path.name for path in directory.iterdir() if path.is_dir())


def _can_be_packed(artifact: Artifact) -> bool:
    """A compiler's output and a directory are no model files whose zeros could be told."""
    return is_sparse(artifact.history) and artifact.emulation is None and artifact.path.is_file()


def _pack(model: Path) -> StorageSizes:
    """Put the model's packed form beside it."""
    pack(model, model.with_name(f"{model.name}.packed"))
    return compare(model)


def _copy_scripts(names: tuple[str, ...], directory: Path) -> None:
    for name in names:
        text = resources.files("edgeopt.bundle").joinpath("templates", name).read_bytes()
        (directory / name).write_bytes(text)


def _copy_model(artifact: Artifact, directory: Path, name: str) -> ModelFile:
    copy(artifact.path, directory / name)
    if sha256_of(directory / name) != artifact.sha256:
        raise TamperedError("has changed since it was exported", where=str(artifact.path), fix="export it again")
    emulation = None
    if artifact.emulation is not None:
        emulation = f"emulation/model{''.join(artifact.emulation.suffixes)}"
        copy(artifact.emulation, directory / emulation)
    return ModelFile(file=name, precision=artifact.precision, signature=artifact.signature, emulation=emulation)


def _copy_device_file(path: Path, directory: Path) -> str:
    name = f"compiled/{path.name}"
    copy(path, directory / name)
    return name


def _copy_twin(artifact: Artifact | None, directory: Path) -> ModelFile | None:
    if artifact is None:
        return None
    return _copy_model(artifact, directory, f"float/model_fp32{artifact.path.suffix}")


def _resizer(preprocessing: Preprocessing | None) -> dict[str, str]:
    """Pillow resized the pictures that the model was proven with; versions of it differ in the pixels."""
    return {"pillow": metadata.version("pillow")} if isinstance(preprocessing, ImagePreprocessing) else {}


def _copy_preprocessing(preprocessing: Preprocessing | None, directory: Path) -> Preprocessing | None:
    """The preprocessing as the bundle tells it; a tokenizer is copied, and its path is then relative to the bundle."""
    if not isinstance(preprocessing, TextPreprocessing):
        return preprocessing
    source = Path(preprocessing.tokenizer)
    if source.is_file():
        files = {TOKENIZER_FILE: source}
    else:
        files = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    if TOKENIZER_FILE not in files:
        raise UsageError(f"no {TOKENIZER_FILE} there", where=f"tokenizer {preprocessing.tokenizer}")
    (directory / TOKENIZER).mkdir()
    for name, path in files.items():
        shutil.copyfile(path, directory / TOKENIZER / name)
    return replace(preprocessing, tokenizer=TOKENIZER)


def _store_vector(vector: GoldenVector, directory: Path, index: int) -> StoredVector:
    folder = f"golden/{index}"
    (directory / folder).mkdir(parents=True)

    def store_all(kind: str, arrays: Mapping[str, Array]) -> dict[str, StoredArray]:
        files = _file_names(kind, tuple(arrays))
        return {name: _store(array, directory, f"{folder}/{files[name]}") for name, array in arrays.items()}

    label = vector.label
    return StoredVector(
        inputs=store_all("input", vector.inputs),
        outputs=store_all("output", vector.outputs),
        reference=store_all("reference", vector.reference),
        label=_store(label, directory, f"{folder}/label.bin") if isinstance(label, np.ndarray) else label,
    )


def _file_names(kind: str, names: tuple[str, ...]) -> dict[str, str]:
    """A file name for each tensor; tensors may be called anything, and two may differ in a character we can't use."""
    slugs = {name: re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] for name in names}
    unique = len({slug.lower() for slug in slugs.values()}) == len(names)
    return {
        name: f"{kind}_{slug}.bin" if unique else f"{kind}_{slug}-{position}.bin"
        for position, (name, slug) in enumerate(slugs.items())
    }


def _store(array: Array, directory: Path, name: str) -> StoredArray:
    known: tuple[DType, ...] = get_args(DType)
    if array.dtype.name not in known:  # labels come in whatever the data set holds
        array = array.astype("float32" if array.dtype.kind == "f" else "int64")
    dtype = next(dtype for dtype in known if dtype == array.dtype.name)
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    (directory / name).write_bytes(little_endian.tobytes())
    return StoredArray(file=name, shape=tuple(array.shape), dtype=dtype)


def _entries(directory: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(directory).as_posix(): FileEntry(sha256_of(path), path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
