"""The user's own Python: every way it can go wrong is one line that says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.errors import DataError, UsageError
from edgeopt.user_code import load_user_object


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("def make(): raise SystemExit(0)", "it failed at mine.py:1: SystemExit: 0"),
        ("def make(): import json; json.loads('')", "it failed at mine.py:1: JSONDecodeError"),
        ("def make(a, b=1, *, c): ...", "takes the arguments a, c, and is called without any"),
        ("make = 3", "is a int, not a function"),
        ("def made(): ...", "has no factory 'make'; did you mean 'made'?"),
        ("import sys; sys.exit(3)", "running the file failed at mine.py:1: SystemExit: 3"),
        ("\ndef make(:", "running the file failed at mine.py:2: SyntaxError: invalid syntax"),
    ],
)
def test_a_failure_is_one_line(tmp_path: Path, code: str, line: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UsageError) as caught:
        load_user_object(f"{tmp_path}/mine.py:make", "factory").call("it failed")
    assert f"mine.py:make: {line}" in caught.value.line()


def test_a_dotted_name_and_another_kind_of_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Net:\n    @staticmethod\n    def small(): return 1 / 0\n")
    small = load_user_object(f"{tmp_path}/mine.py:Net.small", "factory")
    with pytest.raises(DataError, match=r"mine\.py:3: ZeroDivisionError"):
        small.call("it failed", DataError)


def test_running_out_of_memory_is_not_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make(): raise MemoryError")
    with pytest.raises(MemoryError):
        load_user_object(f"{tmp_path}/mine.py:make", "factory").call("it failed")
