"""report.json: what validation found, in a form that tools can rely on (see docs/bundle.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from edgeopt.errors import UsageError
from edgeopt.json_data import Plain, dumps, from_plain, loads, to_plain
from edgeopt.types import Report

SCHEMA_VERSION = 1


def to_json(report: Report, manifest_sha256: str) -> str:
    """The report as text. `manifest_sha256` binds it to its bundle; "" where there is none."""
    plain = to_plain(report)
    assert isinstance(plain, dict)
    document: dict[str, Plain] = {"schema_version": SCHEMA_VERSION, "manifest_sha256": manifest_sha256, **plain}
    return dumps({**document, "sha256": seal(document)})


def seal(document: Mapping[str, Plain]) -> str:
    """SHA-256 of a report without its key `sha256`, as the UTF-8 JSON that we write: sorted keys, two spaces."""
    text = dumps({key: value for key, value in document.items() if key != "sha256"})
    return hashlib.sha256(text.encode()).hexdigest()


def from_json(text: str | bytes, where: str = "report.json") -> Report:
    """The report back. Raises UsageError naming `where` when the text isn't a report of a version that we know."""
    plain = loads(text, where)
    if not isinstance(plain, dict):
        raise UsageError("is not a report", where=where)
    if plain.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"has schema version {plain.get('schema_version')!r}, this edgeopt reads {SCHEMA_VERSION}",
            where=where,
            fix="use the edgeopt that wrote it",
        )
    known = {key: value for key, value in plain.items() if key not in ("schema_version", "manifest_sha256", "sha256")}
    return from_plain(Report, known, where)
