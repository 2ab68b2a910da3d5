"""What a person reads when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

import errno
import sys
import tempfile
from pathlib import Path

import pytest

from edgeopt import errors
from edgeopt.cli import main
from edgeopt.cli.failures import report_failure
from edgeopt.cli.noise import LoggedError


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def report(error: Exception, capsys: pytest.CaptureFixture[str], debug: bool = False) -> tuple[int, str]:
    code = report_failure(error, debug)
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.GateError, 1),
        (errors.UsageError, 2),
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.TamperedError, 2),
        (errors.MissingError, 3),
        (errors.ConversionError, 4),
    ],
)
def test_every_branch_has_its_exit_code_and_one_line(
    kind: type[errors.EdgeoptError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("is wrong", where="here", fix="do that")
    assert report(error, capsys) == (code, "error: here: is wrong; do that\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (errors.EdgeoptError("p"), "p"),
        (errors.EdgeoptError("p", where="w"), "w: p"),
        (errors.EdgeoptError("p", fix="f"), "p; f"),
        (errors.EdgeoptError("two\n  lines", where="w"), "w: two lines"),
    ],
)
def test_the_line_has_what_there_is(error: errors.EdgeoptError, line: str) -> None:
    assert error.line() == str(error) == line


def test_a_missing_extra_comes_with_its_command() -> None:
    line = errors.MissingError.extra("transformers", "hf", "a Hugging Face model").line()
    assert line == "a Hugging Face model needs the package 'transformers'; pip install 'edgeopt[hf]'"


def test_control_characters_of_file_names_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = report(errors.UsageError("no such file", where="a\x1b[31mb"), capsys)
    assert text == "error: a\\x1b[31mb: no such file\n"


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (errno.ENOSPC, 3, "error: /x/y: no space left on the disk; free some, or move --output-dir or TMPDIR\n"),
        (errno.EACCES, 2, "error: /x/y: permission denied\n"),
        (errno.EROFS, 2, "error: /x/y: read-only file system\n"),
    ],
)
def test_a_full_or_closed_disk_is_no_bug(number: int, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(OSError(number, "", "/x/y"), capsys) == (code, line)


def test_out_of_memory_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = report(MemoryError(), capsys)
    assert code == 3
    assert text.startswith("error: out of memory; ")


def test_a_bug_is_one_line_and_a_file_with_the_traceback(capsys: pytest.CaptureFixture[str], logs: Path) -> None:
    try:
        {}["key\nwith break"]
    except KeyError as error:
        code, text = report(error, capsys)
    (log,) = logs.iterdir()
    assert code == 1
    assert text.splitlines() == [
        "internal error: KeyError: 'key\\nwith break'",
        f"  traceback and library output: {log}",
        "  this is a bug in edgeopt: please report it with that file",
    ]
    assert "Traceback" in log.read_text()


def test_debug_shows_the_traceback_and_writes_no_file(capsys: pytest.CaptureFixture[str], logs: Path) -> None:
    _, text = report(ValueError("x"), capsys, debug=True)
    assert text == "ValueError: x\ninternal error: ValueError: x\n"
    assert list(logs.iterdir()) == []


def test_a_failed_conversion_shows_the_end_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    failure = LoggedError(Path("/tmp/edgeopt-1.log"), ("op FOO\x07", "not supported"))
    failure.__cause__ = errors.ConversionError("operator FOO can't be converted", where="layer 'a.b'")
    code, text = report(failure, capsys)
    assert code == 4
    assert text.splitlines() == [
        "error: layer 'a.b': operator FOO can't be converted",
        "  library output: /tmp/edgeopt-1.log, which ends:",
        "  | op FOO\\x07",
        "  | not supported",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["exprt"], "error: no such command 'exprt'; did you mean 'export'?"),
        (
            ["export", "--max-acuracy-drop", "1"],
            "error: no such option: --max-acuracy-drop; did you mean --max-accuracy-drop",
        ),
        (["export", "--target"], "error: option '--target' requires an argument"),
        (["inspect"], "error: missing argument 'FILE'; see 'edgeopt inspect --help'"),
        (["targets", "a", "b"], "error: got unexpected extra argument(s) (b); see 'edgeopt targets --help'"),
        (["export", "x.onnx", "--threads", "x"], "error: --threads: 'x' is not a whole number of at least 1"),
        (["targets", "andriod-int8"], "error: unknown target 'andriod-int8'; did you mean android-int8"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_the_line_is_not_wrapped_or_boxed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgeopt", "export"])
    assert main() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) > 120
    assert "edgeopt export net.py:build" in err
    assert "--example digits" in err
    assert "edgeopt init" in err
