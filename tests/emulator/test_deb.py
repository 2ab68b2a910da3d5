from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeopt.emulator.deb import unpack
from edgeopt.errors import TamperedError

Add = Callable[[tarfile.TarFile], None]


def package(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], compression: str = "xz") -> Path:
    """A Debian package: debian-binary, control, data."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{compression}") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return ar(path, {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": tar.getvalue()})


def ar(path: Path, members: dict[str, bytes]) -> Path:
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data
        content += b"\n" * (len(data) % 2)
    path.write_bytes(content)
    return path


def link(name: str, goal: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = goal
    return info


def everything(path: str) -> bool:
    return bool(path)


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2"])
def test_unpacks_what_is_wanted(tmp_path: Path, compression: str) -> None:
    (tmp_path / "out").mkdir()
    deb = package(tmp_path / "a.deb", ("./usr/bin/x", b"one"), ("./usr/doc/y", b"two"), compression=compression)
    assert unpack(deb, tmp_path / "out", "a.deb", lambda path: path.startswith("usr/bin/")) == 1
    assert (tmp_path / "out/usr/bin/x").read_bytes() == b"one"
    assert not (tmp_path / "out/usr/doc").exists()


def test_stops_after_enough(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    deb = package(tmp_path / "a.deb", ("a", b"1"), ("b", b"2"))
    assert unpack(deb, tmp_path / "out", "a.deb", everything, 1) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_links_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    deb = package(tmp_path / "a.deb", ("lib/x.so.1", b"1"), link("lib/x.so", "x.so.1"), link("usr/x", "/lib/x.so.1"))
    unpack(deb, tmp_path / "out", "a.deb", everything)
    assert (tmp_path / "out/lib/x.so").read_bytes() == b"1"
    assert (tmp_path / "out/usr/x").readlink() == Path("../lib/x.so.1")
    assert (tmp_path / "out/usr/x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("../evil", b"")], "outside of its directory"),
        ([("/etc/evil", b"")], "outside of its directory"),
        ([("usr/../../evil", b"")], "outside of its directory"),
        ([link("a", "../../evil")], "link that leads outside"),
        ([link("lib", "/etc"), link("lib2", "/../etc")], "link that leads outside"),
        ([link("dir", "elsewhere"), ("dir/file", b"x")], "write through a link"),
        ([link("hard", "/etc/passwd", tarfile.LNKTYPE)], "something that is no file"),
        ([link("device", "", tarfile.CHRTYPE)], "something that is no file"),
        ([link("pipe", "", tarfile.FIFOTYPE)], "something that is no file"),
    ],
)
def test_nothing_is_written_outside(
    tmp_path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]], words: str
) -> None:
    (tmp_path / "out").mkdir()
    deb = package(tmp_path / "a.deb", *members)
    with pytest.raises(TamperedError, match=words) as caught:
        unpack(deb, tmp_path / "out", "name.deb", everything)
    assert caught.value.where == "name.deb"
    assert not (tmp_path / "evil").exists()


def test_a_member_in_place_of_a_link_does_not_follow_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    deb = package(tmp_path / "a.deb", ("b", b"old"), link("a", "b"), ("a", b"new"))
    unpack(deb, tmp_path / "out", "a.deb", everything)
    assert (tmp_path / "out/b").read_bytes() == b"old"
    assert (tmp_path / "out/a").read_bytes() == b"new"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a package at all",
        b"!<arch>\n",
        b"!<arch>\n" + b"x" * 30,
        b"!<arch>\n" + b"x" * 60,
        f"!<arch>\n{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{0:<8}{'many':<10}`\n".encode(),
        f"!<arch>\n{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{0:<8}{-5:<10}`\n".encode(),
        f"!<arch>\n{'other':<16}{0:<12}{0:<6}{0:<6}{0:<8}{-60:<10}`\n".encode(),
    ],
)
def test_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(TamperedError, match="is no Debian package"):
        unpack(tmp_path / "a.deb", tmp_path / "out", "a.deb", everything)


def test_a_truncated_package(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    deb = package(tmp_path / "a.deb", ("a", bytes(range(256)) * 400))
    deb.write_bytes(deb.read_bytes()[:-100])
    with pytest.raises(TamperedError, match="is no Debian package"):
        unpack(deb, tmp_path / "out", "a.deb", everything)
