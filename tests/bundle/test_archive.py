"""Bundles as .zip files: the same bytes every time, and every way in which somebody may have made one up."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from edgeopt.bundle import archive_members, open_bundle
from edgeopt.bundle.archive import open_anywhere, open_archive, write_archive
from edgeopt.errors import MissingError, TamperedError, UsageError

Make = Callable[..., Path]


@pytest.fixture
def zipped(small_bundle: Make, tmp_path: Path) -> Path:
    return write_archive(open_bundle(small_bundle("b")), tmp_path / "b.zip")


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def rebuilt(path: Path, change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], None]) -> Path:
    """The archive again, after `change` had its way with its members."""
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    change(members)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for info, data in members:
            archive.writestr(info, data, compress_type=info.compress_type)
    path.write_bytes(content.getvalue())
    return path


def added(path: Path, name: str, data: bytes = b"x", mode: int = stat.S_IFREG | 0o644) -> Path:
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    return rebuilt(path, lambda members: members.append((info, data)))


def refused(path: Path) -> str:
    with pytest.raises(TamperedError) as caught, open_archive(path):
        pass
    return caught.value.line()


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, nothing of an archive may be left in or beside the temporary directory."""
    folder = tmp_path / "tmp" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []
    assert [path.name for path in folder.parent.iterdir()] == ["inner"]


def test_round_trip(small_bundle: Make, tmp_path: Path) -> None:
    bundle = open_bundle(small_bundle("b"))
    path = write_archive(bundle)
    assert path == tmp_path / "b.zip"
    with open_archive(path) as unpacked:
        assert tree(unpacked.path) == tree(bundle.path)
        assert unpacked.manifest == bundle.manifest
        kept = unpacked.path
    assert not kept.exists()


def test_the_same_bundle_gives_the_same_bytes_wherever_and_whenever_it_is(small_bundle: Make, tmp_path: Path) -> None:
    first, second = (open_bundle(small_bundle(name)) for name in ("a", "b"))
    for path in second.path.rglob("*"):
        os.utime(path, (1, 1))
    (second.path / "README.md").chmod(0o600)
    assert write_archive(first, tmp_path / "1").read_bytes() == write_archive(second, tmp_path / "2").read_bytes()


def test_names_are_sorted_in_one_folder_and_scripts_are_executable(small_bundle: Make, tmp_path: Path) -> None:
    path = write_archive(open_bundle(small_bundle("b", b"#!/bin/sh\n")), tmp_path / "b.zip")
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    names = [info.filename for info in infos]
    assert names == sorted(names)
    assert {name.partition("/")[0] for name in names} == {"net-android-onnx-int8"}
    assert all(info.date_time == (1980, 1, 1, 0, 0, 0) for info in infos)
    modes = {info.filename.rpartition("/")[2]: stat.S_IMODE(info.external_attr >> 16) for info in infos}
    assert (modes["model.onnx"], modes["manifest.json"]) == (0o755, 0o644)
    with open_archive(path) as bundle:
        assert os.access(bundle.path / "model.onnx", os.X_OK)
        assert not os.access(bundle.path / "manifest.json", os.X_OK)


def test_what_does_not_compress_is_stored(small_bundle: Make, tmp_path: Path) -> None:
    path = write_archive(open_bundle(small_bundle("b", os.urandom(5000))), tmp_path / "b.zip")
    with zipfile.ZipFile(path) as archive:
        kinds = {info.filename.rpartition("/")[2]: info.compress_type for info in archive.infolist()}
    assert kinds["model.onnx"] == zipfile.ZIP_STORED
    assert kinds["manifest.json"] == zipfile.ZIP_DEFLATED


def test_an_older_archive_is_replaced_and_nothing_else(small_bundle: Make, tmp_path: Path) -> None:
    bundle = open_bundle(small_bundle("b"))
    write_archive(bundle, tmp_path / "out" / "b.zip")
    write_archive(bundle, tmp_path / "out" / "b.zip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.zip"]
    (tmp_path / "thesis").write_text("mine")
    with zipfile.ZipFile(tmp_path / "holiday.zip", "w") as other:
        other.writestr("beach.jpg", b"")
    for name in ("thesis", "holiday.zip"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UsageError, match=f"{name}: is in the way"):
            write_archive(bundle, tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(UsageError, match="lies inside the bundle"):
        write_archive(bundle, bundle.path / "b.zip")


def test_a_failure_leaves_the_older_archive(zipped: Path, small_bundle: Make) -> None:
    before = zipped.read_bytes()
    bundle = open_bundle(small_bundle("c"))
    (bundle.path / "README.md").unlink()
    with pytest.raises(UsageError, match="can't be written: No such file"):
        write_archive(bundle, zipped)
    assert zipped.read_bytes() == before
    with pytest.raises(UsageError):
        write_archive(bundle, zipped.parent / "x" / "y" / "b.zip")
    assert not (zipped.parent / "x").exists()
    assert not list(zipped.parent.glob(".*tmp*"))


def test_a_bundle_may_be_either(zipped: Path, small_bundle: Make, tmp_path: Path) -> None:
    for path in (zipped, small_bundle("c")):
        with open_anywhere(path) as bundle:
            assert bundle.name == "net"
    with pytest.raises(UsageError, match="none: is not there"), open_anywhere(tmp_path / "none"):
        pass


# --- archives that somebody made up ----------------------------------------------------------------------------------

ROOT = "net-android-onnx-int8"


@pytest.mark.parametrize(
    "name",
    [
        f"{ROOT}/../../escaped", "../escaped", "/tmp/escaped", f"{ROOT}//escaped", f"{ROOT}/./escaped", "C:/escaped",
        f"{ROOT}/..\\escaped", f"{ROOT}/..", "C:escaped",
    ],
)  # fmt: skip
def test_names_that_lead_out(zipped: Path, name: str) -> None:
    assert "leads out of its folder" in refused(added(zipped, name))
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_members_that_are_no_files(zipped: Path, kind: int) -> None:
    problem = refused(added(zipped, f"{ROOT}/notes", b"/etc/passwd", kind | 0o777))
    assert ("is a link" if kind == stat.S_IFLNK else "is no regular file") in problem


def test_a_listed_file_that_became_a_link(zipped: Path) -> None:
    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        for info, _ in members:
            if info.filename.endswith("README.md"):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16

    assert "README.md' is a link" in refused(rebuilt(zipped, change))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_names_there_twice(zipped: Path) -> None:
    assert "README.md' twice" in refused(added(zipped, f"{ROOT}/README.md"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (f"{ROOT}/readme.md", "README.md', which some systems take for the same"),
        (f"{ROOT}/MODEL.onnx", "model.onnx', which some systems take for the same"),
        (f"{ROOT}/Golden/0/x", "Golden' as a folder, and also"),
        (f"{ROOT}/model.onnx/x", "model.onnx' as a folder, and also"),
    ],
)
def test_names_that_collide_where_case_does_not_count(zipped: Path, name: str, problem: str) -> None:
    assert problem in refused(added(zipped, name))


def test_names_that_fool_the_eye(zipped: Path) -> None:
    assert "can't be printed" in refused(added(zipped, f"{ROOT}/a\x1b[2Jb"))


def test_encrypted_members(zipped: Path) -> None:
    raw = bytearray(zipped.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 8] |= 1
    zipped.write_bytes(raw)
    assert "is encrypted" in refused(zipped)


def test_compression_that_we_never_use(zipped: Path) -> None:
    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        members[0][0].compress_type = zipfile.ZIP_LZMA

    assert "never uses" in refused(rebuilt(zipped, change))


def test_files_that_the_manifest_does_not_list_or_that_are_gone(zipped: Path) -> None:
    def remove(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        members[:] = [member for member in members if not member[0].filename.endswith("check.py")]

    assert "lacks 'check.py'" in refused(rebuilt(zipped, remove))


def test_files_that_the_manifest_does_not_list(zipped: Path) -> None:
    assert "holds 'notes', which its manifest doesn't list" in refused(added(zipped, f"{ROOT}/notes"))


def test_a_file_of_another_size_is_never_unpacked(zipped: Path) -> None:
    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        for k, (info, _) in enumerate(members):
            if info.filename.endswith("model.onnx"):
                info.compress_type = zipfile.ZIP_DEFLATED
                members[k] = (info, bytes(50 << 20))

    assert "unpacks to 52428800 bytes, which it shouldn't" in refused(rebuilt(zipped, change))


def test_a_member_that_holds_more_than_it_says(zipped: Path) -> None:
    """The sizes in the archive's directory are a claim, too."""

    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        for k, (info, _) in enumerate(members):
            if info.filename.endswith("model.onnx"):
                info.compress_type = zipfile.ZIP_DEFLATED
                members[k] = (info, bytes(5 << 20))

    rebuilt(zipped, change)
    raw = bytearray(zipped.read_bytes())
    while (at := raw.find((5 << 20).to_bytes(4, "little"))) >= 0:
        raw[at : at + 4] = (700).to_bytes(4, "little")
    zipped.write_bytes(raw)
    assert "b.zip: " in refused(zipped)


def test_a_report_that_is_a_bomb(zipped: Path) -> None:
    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        for k, (info, _) in enumerate(members):
            if info.filename.endswith("report.json"):
                info.compress_type = zipfile.ZIP_DEFLATED
                members[k] = (info, bytes(65 << 20))

    assert "'report.json' unpacks to" in refused(rebuilt(zipped, change))


def test_a_manifest_that_announces_a_bomb(zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members, "HARMLESS_BYTES", 0)
    monkeypatch.setattr(archive_members, "MOST_EXPANSION", 1)
    assert "more than 1 times its size" in refused(zipped)


def test_a_disk_that_is_too_small(zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_members.shutil, "disk_usage", Mock(return_value=Mock(free=100)))
    with pytest.raises(MissingError, match="bytes to unpack"), open_archive(zipped):
        pass


def test_changed_bytes(zipped: Path) -> None:
    def change(members: list[tuple[zipfile.ZipInfo, bytes]]) -> None:
        for k, (info, data) in enumerate(members):
            if info.filename.endswith("model.onnx"):
                members[k] = (info, data[:-1] + b"!")

    problem = refused(rebuilt(zipped, change))
    assert "b.zip: model.onnx: is not the file that the manifest describes" in problem


def test_damaged_archives(zipped: Path) -> None:
    raw = zipped.read_bytes()
    at = raw.index(b"PK\x01\x02")
    zipped.write_bytes(raw[: at // 2] + bytes(8) + raw[at // 2 + 8 :])
    assert "b.zip: " in refused(zipped)
    for broken in (b"", b"PK\x03\x04", raw[:-30]):
        zipped.write_bytes(broken)
        with pytest.raises(UsageError, match=r"is no \.zip file"), open_archive(zipped):
            pass


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("pictures/manifest.txt", b"")
    with pytest.raises(UsageError, match="is no zipped bundle"), open_archive(tmp_path / "a.zip"):
        pass


def test_other_tools_unpack_it(zipped: Path, tmp_path: Path) -> None:
    with open_archive(zipped) as bundle:
        expected = tree(bundle.path)
    try:
        subprocess.run(["unzip", "-q", str(zipped), "-d", str(tmp_path / "u")], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unzip here")
    assert tree(tmp_path / "u" / ROOT) == expected
    open_bundle(tmp_path / "u" / ROOT)
