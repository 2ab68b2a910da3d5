"""Which files a folder of pictures or recordings holds, and what their labels are."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeopt.datasets.labels import ClassLabels, LabelColumn
from edgeopt.errors import DataError

LABELS_FILE = "labels.csv"
FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "audio")
LABEL_COLUMNS = ("label", "class", "labels", "class_name")


@dataclass(frozen=True, slots=True)
class Listing:
    """Files by name relative to `root`, with forward slashes; `labels` is None for a flat folder."""

    root: Path
    names: tuple[str, ...]
    labels: ClassLabels | None


def list_folder(root: Path, suffixes: tuple[str, ...]) -> Listing:
    """The files under a folder: as its labels.csv says, else one subfolder per class, else flat and unlabelled.

    Class folders are indexed in the order of their sorted names, as torchvision's ImageFolder does; one without
    files keeps its index.

    Raises DataError when the folder can't be read, or has files both beside and inside its subfolders.
    """
    table = root / LABELS_FILE
    if table.is_file():
        return list_csv(table)
    try:
        entries = sorted((entry for entry in os.scandir(root) if not _is_hidden(entry.name)), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", where=str(root)) from error
    flat = tuple(entry.name for entry in entries if _is_media(entry.name, suffixes) and entry.is_file())
    folders = [entry.name for entry in entries if entry.is_dir()]
    names: list[str] = []
    codes = array("q")
    for index, folder in enumerate(folders):
        inside = sorted(_walk(root, folder, suffixes))
        names += inside
        codes.extend([index] * len(inside))
    if flat and names:
        raise DataError(
            f"has files both in class folders and beside them ({flat[0]!r})",
            where=str(root),
            fix=f"sort them all into class folders, or list them in {LABELS_FILE}",
        )
    if flat:
        return Listing(root, flat, None)
    return Listing(root, tuple(names), ClassLabels(codes, tuple(folders)))


def list_csv(table: Path) -> Listing:
    """The files that a CSV names in its columns file and label, relative to its own folder.

    A header is recognised by its column names; without one the first two columns count. Labels are class indices or
    class names. Raises DataError naming the row.
    """
    root = table.parent
    names: list[str] = []
    labels = LabelColumn()
    file_column, label_column = 0, 1
    for number, row in _rows(table):
        where = f"{table.name}, line {number}"
        header = _header(row) if not names else None
        if header is not None:
            file_column, label_column = header
            continue
        if len(row) <= max(file_column, label_column):
            raise DataError("lacks a column", where=where, fix="write file,label on every line")
        names.append(_checked_name(root, row[file_column].strip(), where))
        labels.add(row[label_column], where)
    return Listing(root, tuple(names), labels.freeze())


def _walk(root: Path, folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for where, subfolders, files in os.walk(root / folder):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        for file in files:
            if _is_media(file, suffixes) and not _is_hidden(file):
                yield (Path(where) / file).relative_to(root).as_posix()


def _is_hidden(name: str) -> bool:
    """Also the folder of resource forks that macOS puts into zip files, which would become a class."""
    return name.startswith(".") or name == "__MACOSX"


def _is_media(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the lines that aren't blank."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", where=str(table)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"is not a UTF-8 CSV file: {error}", where=str(table)) from error


def _header(row: list[str]) -> tuple[int, int] | None:
    """(file column, label column) if the row names both."""
    cells = [cell.strip().lower() for cell in row]
    file = next((cells.index(name) for name in FILE_COLUMNS if name in cells), None)
    label = next((cells.index(name) for name in LABEL_COLUMNS if name in cells), None)
    return None if file is None or label is None else (file, label)


def _checked_name(root: Path, name: str, where: str) -> str:
    """The name, once it is known to stay inside the folder and to exist."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name!r} is not a file below {LABELS_FILE}'s folder", where=where)
    if not (root / path).is_file():
        raise DataError(f"no such file: {name!r}", where=where)
    return str(path)
