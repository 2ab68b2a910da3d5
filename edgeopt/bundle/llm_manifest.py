"""What edgeopt notes in the folder of a language-model layout: whose it is, and how it was proven."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeopt.formats.files import sha256_of
from edgeopt.json_data import dumps
from edgeopt.types import Model

LLM = "edgeopt-llm.json"


def write_llm_manifest(directory: Path, model: Model, told: Mapping[str, object]) -> None:
    """Write the note: what is told of the layout, and the SHA-256 of every file that is there."""
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir()) if path.name != LLM}
    document = {"model": model.name, "source_sha256": model.source_sha256, **told, "files": files}
    (directory / LLM).write_text(dumps(document), encoding="utf-8")
