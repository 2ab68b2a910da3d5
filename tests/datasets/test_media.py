"""Which files a folder gives, and with which labels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from edgeopt.datasets import open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.errors import DataError, UsageError
from edgeopt.types import ArrayPreprocessing, TensorSpec

INPUTS = (TensorSpec("image", (1, 3, 4, 4), "float32", "NCHW"),)


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (len(name) % 256, 0, 0)).save(root / name)


def open_(path: Path) -> Dataset:
    return open_dataset(str(path), INPUTS, None)


def test_class_folders_are_numbered_by_sorted_name(tmp_path: Path) -> None:
    put(tmp_path, "dog/2.png", "cat/b.png", "cat/deep/a.png", "dog/.hidden.png", "__MACOSX/x.png", ".git/x.png")
    (tmp_path / "bee").mkdir()
    (tmp_path / "cat/notes.txt").write_text("not a picture")
    dataset = open_(tmp_path)
    assert dataset.class_names == ("bee", "cat", "dog")
    assert [(s.name, s.label) for s in dataset] == [("cat/b.png", 1), ("cat/deep/a.png", 1), ("dog/2.png", 2)]


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.png")
    dataset = open_(tmp_path)
    assert [(s.name, s.label) for s in dataset] == [("a.png", None), ("b.png", None)]
    assert (dataset.is_labelled, dataset.class_names) == (False, ())


def test_files_beside_class_folders_are_ambiguous(tmp_path: Path) -> None:
    put(tmp_path, "cat/a.png", "stray.png")
    with pytest.raises(DataError, match=r"both in class folders and beside them \('stray.png'\)"):
        open_(tmp_path)


@pytest.mark.parametrize("header", ["", "file,label\n", "id,Label,FileName\n"])
@pytest.mark.parametrize("by_folder", [True, False])
def test_labels_csv(tmp_path: Path, header: str, by_folder: bool) -> None:
    put(tmp_path, "a.png", "sub/b.png")
    rows = "7,3,a.png\n8,0,sub/b.png\n" if header.startswith("id") else "a.png,3\n\nsub/b.png,0\n"
    (tmp_path / "labels.csv").write_text("\ufeff" + header + rows, encoding="utf-8")
    dataset = open_(tmp_path if by_folder else tmp_path / "labels.csv")
    assert [(s.name, s.label) for s in dataset] == [("a.png", 3), ("sub/b.png", 0)]
    assert dataset.class_names == ()


def test_labels_csv_with_names(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "labels.csv").write_text("a.png,dog\nb.png, cat\nc.png,dog\n")
    dataset = open_(tmp_path)
    assert dataset.class_names == ("cat", "dog")
    assert [s.label for s in dataset] == [1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,1\n../secret.png,0\n", r"line 2: '../secret.png' is not a file below"),
        ("/etc/passwd,1\n", r"line 1: '/etc/passwd' is not a file below"),
        ("..\\x.png,1\n", r"line 1: .* is not a file below"),
        ("a.png,1\ngone.png,0\n", r"line 2: no such file: 'gone.png'"),
        ("a.png,1\na.png,cat\n", r"line 2: labels mix class indices and class names \('1' and 'cat'\)"),
        ("a.png,-1\n", r"line 1: -1 is not a class index"),
        ("a.png,\n", r"line 1: has no label"),
        ("a.png\n", r"line 1: lacks a column"),
        ("file,label\n", r"is empty"),
        ("", r"is empty"),
    ],
)
def test_csv_mistakes_are_named_by_line(tmp_path: Path, rows: str, message: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text(rows)
    with pytest.raises(DataError, match=message):
        open_(tmp_path)


def test_binary_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match="is not a UTF-8 CSV file"):
        open_(tmp_path)


def test_empty_and_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is empty: no \.jpg"):
        open_(tmp_path)
    with pytest.raises(UsageError, match="no such data set; give a folder"):
        open_(tmp_path / "nowhere")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="no data set that edgeopt can read"):
        open_(tmp_path / "a.parquet")


def test_preprocessing_of_another_kind_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(UsageError, match="the declared preprocessing is 'array'"):
        open_dataset(str(tmp_path), INPUTS, ArrayPreprocessing())


def test_fingerprint_knows_contents_names_and_labels_but_not_the_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    put(one, "cat/a.png", "dog/b.png")
    put(two, "cat/a.png", "dog/b.png")
    os.utime(two / "cat/a.png", (0, 0))
    original = open_(one).fingerprint()
    assert open_(two).fingerprint() == original
    (two / "cat").rename(two / "cow")
    assert open_(two).fingerprint() != original
    (two / "cow").rename(two / "cat")
    assert open_(two).fingerprint() == original
    Image.new("RGB", (6, 6), "blue").save(two / "cat/a.png")
    assert open_(two).fingerprint() != original


def test_a_subset_reads_only_its_own_files_for_its_fingerprint(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(10)))
    subset = select(open_(tmp_path), 3, seed=0)
    before = subset.fingerprint()
    chosen = {f"{i}.png" for i in subset.indices}
    other = next(p for p in sorted(tmp_path.iterdir()) if p.name not in chosen)
    Image.new("RGB", (6, 6), "blue").save(other)
    assert select(open_(tmp_path), 3, seed=0).fingerprint() == before


def test_an_index_beyond_the_end_is_an_index_error(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(IndexError):
        open_(tmp_path)[1]
    with pytest.raises(IndexError):
        open_(tmp_path)[-1]
