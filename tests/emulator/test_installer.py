"""Setting up without downloading anything: what is left behind, and what the errors say."""

from __future__ import annotations

import errno
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeopt import emulator
from edgeopt.emulator import download, fetching, home, installation, installer, lock, toolchain, wheels
from edgeopt.errors import MissingError
from edgeopt.json_data import dumps
from edgeopt.progress import Silent

MANIFEST = installation.Manifest({"qemu": "10"}, {}, {"cortex-a76": (1, 2)}, {"cortex-a76": (1, 2)})


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(installer, "c_compiler", lambda: ["cc"])


def _steps(monkeypatch: pytest.MonkeyPatch, *, fail: Exception | None = None) -> list[str]:
    """Replace the steps that need a network and an emulator; the build fails with `fail`."""
    done: list[str] = []

    def build(tree: Path, tools: Path, progress: object) -> None:
        del tools, progress
        done.append("build")
        tree.mkdir(parents=True)
        (tree / "half").write_text("half")
        if fail is not None:
            raise fail

    monkeypatch.setattr(fetching, "fetch", lambda lock, cache, _: {w.name: cache for w in lock.wheels})
    monkeypatch.setattr(installer, "unpack_debian", lambda *_: None)
    monkeypatch.setattr(installer, "unpack_wheel", lambda *_: None)
    monkeypatch.setattr(installer, "build", build)
    monkeypatch.setattr(installer, "_manifest", lambda *_: MANIFEST)
    monkeypatch.setattr(installer.selftest, "check", lambda *_: None)
    return done


def test_installs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done = _steps(monkeypatch)
    assert "edgeopt emulator setup" in (emulator.unavailable() or "")
    first = emulator.setup()
    assert emulator.setup() == first == emulator.installed()
    assert emulator.unavailable() is None
    assert done == ["build"]
    assert sorted(path.name for path in home.root().iterdir()) == sorted([".lock", "downloads", home.digest()])


def test_two_at_once_work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done = _steps(monkeypatch)
    threads = [threading.Thread(target=emulator.setup) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["build"]


def test_a_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch, fail=MissingError("can't be built"))
    with pytest.raises(MissingError, match="can't be built"):
        emulator.setup()
    assert sorted(path.name for path in home.root().iterdir()) == [".lock", "downloads"]
    assert emulator.unavailable() is not None


def test_what_a_killed_setup_left_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch)
    killed = [home.root() / ".making-x", home.downloads() / ".making-x"]
    for directory in killed:
        (directory / "tree").mkdir(parents=True)
    emulator.setup()
    assert not any(directory.exists() for directory in killed)


def test_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch, fail=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(MissingError, match="the disk is full; free"):
        emulator.setup()


def test_another_error_of_the_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch, fail=OSError(errno.EROFS, "Read-only file system", "/x/tree"))
    with pytest.raises(MissingError, match=r"^/x/tree: can't be written: Read-only file system; set EDGEOPT_HOME"):
        emulator.setup()


def test_what_is_installed_needs_no_compiler_and_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch)
    emulator.setup()

    def fail() -> None:
        raise MissingError("not here")

    monkeypatch.setattr(installer, "c_compiler", fail)
    monkeypatch.setattr(home, "locked", fail)
    assert emulator.setup() == emulator.installed()


def test_one_failed_download_ends_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They must not go on to their next mirrors."""
    tried: list[str] = []
    failed = threading.Event()

    def read(url: str, part: Path, size: int, tell: Callable[[int], None]) -> None:
        del part, size
        tried.append(url)
        failed.wait(10)
        for _ in range(1000):
            tell(len(tried))
            time.sleep(0.01)

    def no_wheel(wheel: lock.Wheel, cache: Path) -> Path:
        del cache
        failed.set()
        raise MissingError(f"no {wheel.name}")

    monkeypatch.setattr(download, "_resume", read)
    monkeypatch.setattr(wheels, "fetch", no_wheel)
    pinned = lock.read()
    few = lock.Lock(("https://a.example", "https://b.example"), pinned.debian[:3], pinned.wheels[:1])
    with pytest.raises(MissingError, match="no ai-edge-litert"):
        fetching.fetch(few, tmp_path, Silent())
    assert not [url for url in tried if "b.example" in url]


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "needs Linux on x86-64" in (emulator.unavailable() or "")
    with pytest.raises(MissingError, match="needs Linux on x86-64"):
        emulator.setup()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(MissingError, match="apt install gcc"):
        toolchain.c_compiler()


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEOPT_HOME", str(tmp_path / "file"))
    with pytest.raises(MissingError, match="set EDGEOPT_HOME"):
        emulator.setup()


def test_a_damaged_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch)
    found = emulator.setup()
    (found.directory / home.MANIFEST).write_text("{}")
    with pytest.raises(MissingError, match="edgeopt emulator remove"):
        emulator.installed()


def _other_version() -> Path:
    other = home.root() / "0123456789abcdef"
    other.mkdir(parents=True)
    (other / home.MANIFEST).write_text(dumps(MANIFEST))
    return other


def test_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    assert emulator.remove() == 0
    _steps(monkeypatch)
    emulator.setup()
    _other_version()
    assert emulator.remove() > 0
    assert [path.name for path in home.root().iterdir()] == [".lock"]
    assert emulator.unavailable() is not None


def test_remove_what_other_versions_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch)
    emulator.setup()
    other = _other_version()
    assert home.others() == [other]
    assert emulator.remove(outdated_only=True) > 0
    assert not other.exists()
    assert emulator.unavailable() is None


def test_remove_leaves_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch)
    emulator.setup()
    theirs = home.root() / "avd"
    theirs.mkdir()
    (theirs / home.MANIFEST).write_text("{}")
    assert home.others() == []
    emulator.remove()
    assert sorted(path.name for path in home.root().iterdir()) == [".lock", "avd"]


def test_the_digest_covers_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = home.digest()
    assert before == home.digest()
    (tmp_path / "main.cpp").write_text("int main() {}")
    monkeypatch.setattr(home, "SOURCES", tmp_path)
    assert home.digest() != before


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{}", b'{"versions": 3}'])
def test_a_damaged_installation_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / home.MANIFEST).write_bytes(text)
    with pytest.raises(MissingError, match="can't be read; `edgeopt emulator remove`, then `edgeopt emulator setup`"):
        installation.opened(tmp_path)


def test_an_installation_whose_manifest_is_gone(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="can't be read"):
        installation.opened(tmp_path)
