"""A file of finished trials, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Generic, TypeVar

from edgeopt.errors import UsageError
from edgeopt.json_data import from_plain, loads, to_plain

T = TypeVar("T")


class Journal(Generic[T]):
    """Results by name, one JSON document a line, appended as they come.

    A line that an interruption cut short is dropped; everything else must be ours.
    """

    def __init__(self, path: Path, type_: type[T]) -> None:
        """Read what is there. Raises UsageError when the file can't be read or written, or holds something else."""
        self._path = path
        self._entries: dict[str, T] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            if lines and not lines[-1].endswith("\n"):
                lines.pop()
                path.write_text("".join(lines), encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError("can't be used to resume from", where=str(path), fix="name another folder") from error
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            entry = loads(line, where)
            if not isinstance(entry, dict) or not isinstance(name := entry.get("trial"), str):
                raise UsageError("is not a record of a trial", where=where, fix="name another folder")
            self._entries[name] = from_plain(type_, entry.get("result"), where)

    def get(self, name: str) -> T | None:
        return self._entries.get(name)

    def add(self, name: str, result: T) -> None:
        """Keep a result; it is on disk when this returns."""
        self._entries[name] = result
        line = json.dumps({"trial": name, "result": to_plain(result)}, sort_keys=True) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
