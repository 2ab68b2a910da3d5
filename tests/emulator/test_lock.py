from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from edgeopt.emulator import lock
from edgeopt.errors import ConfigError

GOOD = """
debian-mirrors = ["https://deb.example/debian/"]

[[debian]]
group = "sysroot"
path = "pool/main/g/glibc/libc6_2.36-9+deb12u14_arm64.deb"
sha256 = "{sha}"
size = 10

[[wheel]]
format = "onnx"
name = "onnxruntime"
version = "1.2.3"
sha256 = "{sha}"
size = 10
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "lock.toml"
    path.write_text(text.replace("{sha}", "0" * 64))
    return path


def test_reads(tmp_path: Path) -> None:
    found = lock.read(written(tmp_path, GOOD))
    assert found.debian_mirrors == ("https://deb.example/debian",)
    assert (found.debian[0].file_name, found.debian[0].version) == (
        "libc6_2.36-9+deb12u14_arm64.deb",
        "2.36-9+deb12u14",
    )
    assert found.wheels[0].version == "1.2.3"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("{sha}", "0" * 63, "sha256"),
        ("{sha}", "G" * 64, "sha256"),
        ("size = 10", "size = 0", "size"),
        ('group = "sysroot"', 'group = "other"', "group"),
        ("pool/main", "../../etc", "path"),
        ("https://deb.example", "file:///etc", "debian-mirrors"),
        ('version = "1.2.3"\n', "", "version"),
    ],
)
def test_mistakes_name_the_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        lock.read(written(tmp_path, GOOD.replace(old, new, 1)))


def test_the_lock_itself() -> None:
    found = lock.read()
    assert {package.group for package in found.debian} == {"numerics", "counting", "sysroot", "compiler", "headers"}
    assert {wheel.format for wheel in found.wheels} == {"litert", "onnx", "executorch"}
    assert any("snapshot.debian.org/archive/debian/20" in mirror for mirror in found.debian_mirrors)


def test_runtimes_have_the_versions_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {wheel.name: wheel for wheel in lock.read().wheels}

    def version(name: str) -> str:
        if name == "executorch":
            raise metadata.PackageNotFoundError(name)
        return {"onnxruntime": "99.0+cpu"}.get(name, pinned[name].version)

    monkeypatch.setattr(metadata, "version", version)
    lock.for_this_host.cache_clear()
    try:
        found = {wheel.name: wheel for wheel in lock.for_this_host().wheels}
    finally:
        lock.for_this_host.cache_clear()
    assert (found["onnxruntime"].version, found["onnxruntime"].sha256) == ("99.0", None)
    assert found["executorch"] == pinned["executorch"]
    assert found["ai-edge-litert"] == pinned["ai-edge-litert"]
