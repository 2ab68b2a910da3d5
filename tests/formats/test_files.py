"""Model files that may be directories."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeopt.formats.files import copy, files_of, sha256_of, size_of


def package(folder: Path) -> Path:
    root = folder / "a.mlpackage"
    (root / "Data").mkdir(parents=True)
    (root / "Manifest.json").write_text("{}")
    (root / "Data" / "weights").write_bytes(b"123")
    return root


def test_a_file_is_its_own_only_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert (files_of(path), size_of(path), sha256_of(path)) == ((path,), 3, hashlib.sha256(b"abc").hexdigest())


def test_what_is_not_there_has_no_size(tmp_path: Path) -> None:
    assert size_of(tmp_path / "absent") == 0


def test_a_directorys_hash_tells_content_and_names(tmp_path: Path) -> None:
    root = package(tmp_path)
    before = sha256_of(root)
    assert size_of(root) == 5
    (root / "Data" / "weights").rename(root / "Data" / "other")
    renamed = sha256_of(root)
    (root / "Data" / "other").write_bytes(b"124")
    assert len({before, renamed, sha256_of(root)}) == 3


def test_a_copy_has_the_same_hash(tmp_path: Path) -> None:
    root = package(tmp_path)
    copy(root, tmp_path / "sub" / "b.mlpackage")
    assert sha256_of(tmp_path / "sub" / "b.mlpackage") == sha256_of(root)
