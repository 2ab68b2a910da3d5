"""What libraries print goes to a log; what we print does not."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeopt.cli.noise import LoggedError, captured
from edgeopt.errors import ConversionError, UsageError


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def make_noise() -> None:
    print("from print")
    print("from print to stderr", file=sys.stderr)
    os.write(1, b"from descriptor 1\n")
    os.write(2, b"from descriptor 2\n")
    ctypes.CDLL(None).puts(b"from C")


NOISE = {"from print", "from print to stderr", "from descriptor 1", "from descriptor 2", "from C"}


def test_noise_is_swallowed_and_our_own_streams_are_not(capfd: pytest.CaptureFixture[str], logs: Path) -> None:
    with captured() as streams:
        make_noise()
        print("ours", file=streams.out)
        print("our progress", file=streams.err)
    print("after")
    out, err = capfd.readouterr()
    assert (out, err) == ("ours\nafter\n", "our progress\n")
    assert list(logs.iterdir()) == []


def test_noise_is_in_the_log_of_a_surprise_with_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        with captured():
            make_noise()
            raise ZeroDivisionError("vendor bug")

    with pytest.raises(LoggedError) as caught:
        crash()
    text = caught.value.log.read_text()
    assert set(text.splitlines()) >= NOISE
    assert "Traceback" in text
    assert caught.value.tail[-1] == "ZeroDivisionError: vendor bug"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert capfd.readouterr() == ("", "")


def test_a_conversion_error_keeps_the_log_with_what_the_converter_raised() -> None:
    def convert() -> None:
        with captured():
            os.write(2, b"op FOO is not supported\n")
            raise ConversionError("can't be converted") from RuntimeError("lowering failed")

    with pytest.raises(LoggedError) as caught:
        convert()
    assert "op FOO is not supported" in caught.value.tail
    assert caught.value.tail[-1] == "RuntimeError: lowering failed"
    assert isinstance(caught.value.__cause__, ConversionError)


@pytest.mark.parametrize("error", [UsageError("wrong"), KeyboardInterrupt()])
def test_errors_that_explain_themselves_leave_no_log(error: BaseException, logs: Path) -> None:
    with pytest.raises(type(error)), captured():
        raise error
    assert list(logs.iterdir()) == []


def test_the_streams_are_back_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    before = (sys.stdout, sys.stderr)
    with pytest.raises(LoggedError), captured():
        raise ValueError
    assert (sys.stdout, sys.stderr) == before
    os.write(1, b"out\n")
    os.write(2, b"err\n")
    assert capfd.readouterr() == ("out\n", "err\n")


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    prelude = "import os, sys, ctypes\nfrom edgeopt.cli.noise import captured\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + script],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        timeout=60,
    )


def test_c_output_is_not_released_to_stdout_when_the_process_ends(logs: Path) -> None:
    """C buffers what goes to a file; unflushed, it would come out at exit, behind a --json document."""
    done = run("with captured():\n    ctypes.CDLL(None).printf(b'noise')\nprint('{}')", logs)
    assert (done.stdout, done.stderr, done.returncode) == ("{}\n", "", 0)


def test_warnings_and_logging_go_to_the_log(logs: Path) -> None:
    script = """
import logging, warnings
with captured():
    warnings.warn("deprecated thing")
    logging.getLogger("vendor").warning("odd thing")
    os.abort()
"""
    done = run(script, logs)
    (log,) = logs.glob("edgeopt-*.log")
    text = log.read_text()
    assert "deprecated thing" in text
    assert "odd thing" in text
    assert done.stderr == ""


def test_what_was_printed_before_still_comes_first(logs: Path) -> None:
    done = run("print('before')\nwith captured() as s:\n    print('during', file=s.out)\nprint('after')", logs)
    assert done.stdout == "before\nduring\nafter\n"


def test_the_log_survives_an_abort_with_the_python_stack(logs: Path) -> None:
    done = run("with captured():\n    os.write(2, b'vendor says no\\n')\n    os.abort()", logs)
    assert done.returncode == -6
    (log,) = logs.glob("edgeopt-*.log")
    assert re.search(r"vendor says no\nFatal Python error: Aborted", log.read_text())
