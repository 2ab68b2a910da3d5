"""A bundle of either kind as a set of files: what zipping, signing and verifying go by."""

from __future__ import annotations

from pathlib import Path

from edgeopt.bundle.generation_manifest import GENERATION, TOP_UNLISTED, is_generation_bundle, unlisted_of_parts
from edgeopt.bundle.generation_reader import GenerationBundle, open_generation_bundle
from edgeopt.bundle.manifest import MANIFEST, UNLISTED, FileEntry
from edgeopt.bundle.reader import LoadedBundle, open_bundle

AnyBundle = LoadedBundle | GenerationBundle


def open_directory(path: Path) -> AnyBundle:
    """A verified bundle of either kind. Raises as `open_bundle` and `open_generation_bundle` do."""
    return open_generation_bundle(path) if is_generation_bundle(path) else open_bundle(path)


def description_of(bundle: AnyBundle) -> str:
    """The file that has the hashes of all others."""
    return GENERATION if isinstance(bundle, GenerationBundle) else MANIFEST


def listed_in(bundle: AnyBundle) -> dict[str, FileEntry]:
    """Every file whose hash the bundle holds, relative to it; of a network that writes, the parts' files too."""
    if isinstance(bundle, LoadedBundle):
        return dict(bundle.manifest.files)
    listed = dict(bundle.manifest.files)
    for part, opened in bundle.parts.items():
        entry = bundle.manifest.parts[part]
        size = (opened.path / MANIFEST).stat().st_size
        listed[f"{entry.folder}/{MANIFEST}"] = FileEntry(entry.manifest_sha256, size)
        listed |= {f"{entry.folder}/{name}": inner for name, inner in opened.manifest.files.items()}
    return listed


def files_of(bundle: AnyBundle) -> tuple[str, ...]:
    """Every file of a bundle, relative to it, the ones that no list holds included."""
    unlisted = UNLISTED if isinstance(bundle, LoadedBundle) else TOP_UNLISTED | unlisted_of_parts(bundle.manifest)
    return tuple(sorted({*listed_in(bundle), *(name for name in unlisted if (bundle.path / name).is_file())}))
