from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from edgeopt.emulator import wheels
from edgeopt.emulator.lock import Wheel
from edgeopt.errors import MissingError, TamperedError


def wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_unpacks_what_is_kept(tmp_path: Path) -> None:
    file = wheel(tmp_path / "a.whl", **{"p/lib/libx.so": b"x", "p/include/a/b.h": b"h", "p/other.py": b""})
    assert wheels.unpack(file, tmp_path / "out", ("p/lib/lib*.so", "p/include/*")) == 2
    assert (tmp_path / "out/p/include/a/b.h").read_bytes() == b"h"
    assert not (tmp_path / "out/p/other.py").exists()


@pytest.mark.parametrize("name", ["../p/evil", "p/../../evil", "/p/evil"])
def test_nothing_is_written_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(TamperedError, match="outside of its directory"):
        wheels.unpack(wheel(tmp_path / "a.whl", **{name: b""}), tmp_path / "out", ("*",))


def test_damage(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"not a zip")
    with pytest.raises(TamperedError, match=r"a\.whl: is no wheel"):
        wheels.unpack(tmp_path / "a.whl", tmp_path / "out", ("*",))


def _pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """Stands in for pip: puts a wheel where it is told to, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")
        Path(command[command.index("--dest") + 1], "x-1-aarch64.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, b"wheel")
    pinned = Wheel("onnx", "x", "1", hashlib.sha256(b"wheel").hexdigest(), 5)
    assert wheels.fetch(pinned, tmp_path).read_bytes() == b"wheel"
    assert wheels.fetch(pinned, tmp_path).read_bytes() == b"wheel"
    assert len(calls) == 1
    assert {"x==1", "--python-version=3.11", "--platform=manylinux_2_28_aarch64"} <= set(calls[0])


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, b"other")
    with pytest.raises(TamperedError, match="SHA-256 is not the pinned one"):
        wheels.fetch(Wheel("onnx", "x", "1", hashlib.sha256(b"wheel").hexdigest(), 5), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unpinned_version_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, b"other")
    assert wheels.fetch(Wheel("onnx", "x", "2", None, None), tmp_path).read_bytes() == b"other"


def test_pip_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, None)
    with pytest.raises(MissingError, match="x==2 for aarch64: No matching distribution found"):
        wheels.fetch(Wheel("onnx", "x", "2", None, None), tmp_path)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="python -m ensurepip"):
        wheels.fetch(Wheel("onnx", "x", "2", None, None), tmp_path)
