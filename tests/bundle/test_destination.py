"""A bundle appears all at once or not at all, whatever the machine does meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from edgeopt.bundle import destination, prepare_output
from edgeopt.bundle.destination import replace_directory
from edgeopt.errors import EdgeoptError

# Another test in this process may have loaded JAX, which warns of any fork; the child here only writes files.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

MANIFEST = '{"kind": "edgeopt-bundle", "schema_version": 1, "files": {"model": {}}}'


def put(final: Path, content: str) -> None:
    with replace_directory(final) as directory:
        (directory / "manifest.json").write_text(MANIFEST)
        (directory / "model").write_text(content)


def fail_while_writing(final: Path, error: BaseException) -> None:
    with replace_directory(final) as directory:
        (directory / "model").write_text("half")
        raise error


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_creates_parents_and_replaces_an_older_bundle(tmp_path: Path) -> None:
    final = tmp_path / "dist" / "b"
    put(final, "old")
    put(final, "new")
    assert (final / "model").read_text() == "new"
    assert names(final.parent) == ["b"]


def test_replaces_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination.ctypes, "CDLL", Mock(return_value=object()))  # a C library without renameat2
    put(tmp_path / "b", "old")
    put(tmp_path / "b", "new")
    assert (tmp_path / "b" / "model").read_text() == "new"
    assert names(tmp_path) == ["b"]


def test_a_failure_leaves_the_older_bundle_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    with pytest.raises(ValueError):
        fail_while_writing(tmp_path / "b", ValueError())
    assert (tmp_path / "b" / "model").read_text() == "old"
    assert names(tmp_path) == ["b"]


def test_a_failure_removes_the_parents_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(tmp_path / "x" / "y" / "b", KeyboardInterrupt())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "not writable"),
        (errno.EACCES, "not writable"),
        (errno.EIO, "can't be written: Input/output error"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(tmp_path: Path, code: int, problem: str) -> None:
    with pytest.raises(EdgeoptError, match=problem):
        fail_while_writing(tmp_path / "dist" / "b", OSError(code, os.strerror(code)))
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_only_when_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(destination.os, "fsync", Mock(side_effect=full))
    with pytest.raises(EdgeoptError, match="no space left"):
        put(tmp_path / "b", "new")
    assert names(tmp_path) == []


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    return child.exitcode


def test_kill_leaves_the_older_bundle_and_the_next_run_sweeps(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")

    def work() -> None:
        with replace_directory(tmp_path / "b") as directory:
            (directory / "model").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    assert (tmp_path / "b" / "model").read_text() == "old"
    assert len(names(tmp_path)) == 2
    put(tmp_path / "b", "new")
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b" / "model").read_text() == "new"


def test_a_living_run_is_not_swept(tmp_path: Path) -> None:
    with replace_directory(tmp_path / "b") as directory:
        (directory / "manifest.json").write_text(MANIFEST)
        (directory / "model").write_text("mine")
        assert in_child(lambda: put(tmp_path / "b", "theirs")) == 0
        assert (directory / "model").read_text() == "mine"
    assert (tmp_path / "b" / "model").read_text() == "mine"
    assert names(tmp_path) == ["b"]


def test_neighbours_with_similar_names_are_left_alone(tmp_path: Path) -> None:
    neighbour = tmp_path / ".bb.tmp-12345678"
    neighbour.mkdir()
    put(tmp_path / "b", "new")
    put(tmp_path / "[b]*", "new")
    assert neighbour.exists()


# --- what may be replaced --------------------------------------------------------------------------------------------


def test_never_replaces_what_it_did_not_write(tmp_path: Path) -> None:
    for name in ("folder", "file", "link", "added"):
        final = tmp_path / name
        match name:
            case "folder":
                final.mkdir()
                (final / "thesis.tex").write_text("")
            case "file":
                final.write_text("")
            case "link":
                final.symlink_to(tmp_path)
            case "added":
                put(final, "ours")
                (final / "notes.txt").write_text("mine")
        with pytest.raises(EdgeoptError, match=f"{name}: is in the way"):
            prepare_output(final)


def test_notes_added_while_the_new_bundle_was_made_are_not_lost(tmp_path: Path) -> None:
    put(tmp_path / "b", "old")
    with pytest.raises(EdgeoptError, match="in the way"), replace_directory(tmp_path / "b"):
        (tmp_path / "b" / "notes.txt").write_text("mine")
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["b"]


def test_accepts_new_places_and_empty_folders(tmp_path: Path) -> None:
    prepare_output(tmp_path / "x" / "y")
    (tmp_path / "empty").mkdir()
    prepare_output(tmp_path / "empty")
    put(tmp_path / "empty", "new")
    assert names(tmp_path) == ["empty"]


def test_a_parent_that_is_a_file_or_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeoptError, match="file: is not a directory"):
        prepare_output(tmp_path / "file" / "b")
    with pytest.raises(EdgeoptError, match="file"):
        put(tmp_path / "file" / "b", "new")
    monkeypatch.setattr(destination.os, "access", Mock(return_value=False))
    with pytest.raises(EdgeoptError, match="is not writable"):
        prepare_output(tmp_path / "b")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a 64 KiB tmpfs of its own, where the kernel lets us mount one."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(destination.__file__).parents[2])!r})
from edgeopt.bundle.destination import replace_directory
from edgeopt.errors import EdgeoptError
try:
    with replace_directory(Path({str(tmp_path)!r}) / "dist" / "b") as directory:
        (directory / "model").write_bytes(bytes(1 << 20))
except EdgeoptError as error:
    print(error.line(), list(Path({str(tmp_path)!r}).iterdir()))
"""
    mount = f'mount -t tmpfs -o size=64k none {tmp_path} || exit 77; exec {sys.executable} -c "$SCRIPT"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SCRIPT": script},
    )
    if done.returncode in (1, 77):
        pytest.skip("this kernel lets us mount nothing")
    assert "no space left for the bundle" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("[]")
