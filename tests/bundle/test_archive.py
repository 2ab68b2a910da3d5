"""Bundles as .zip files: the same bytes every time, and every way in which somebody may have made one up."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from edgeopt.bundle import archive_members, open_bundle
from edgeopt.bundle.archive import open_anywhere, open_archive, write_archive
from edgeopt.errors import MissingError, TamperedError, UsageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

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
        f"{ROOT}/..\\escaped", f"{ROOT}/..", "C:escaped", f"{ROOT}/model.onnx:stream",
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


def test_names_that_collide_where_accents_are_normalized(zipped: Path) -> None:
    assert "which some systems take for the same" in refused(added(added(zipped, f"{ROOT}/\u00e9"), f"{ROOT}/e\u0301"))


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
                members[k] = (info, bytes(17 << 20))

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


def test_what_no_directory_speaks_of(zipped: Path) -> None:
    """Regression: a tool that reads from the start on unpacked other files than those that were verified."""
    raw = zipped.read_bytes()
    hidden = io.BytesIO()
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr(f"{ROOT}/model.onnx", b"another")
    entry = hidden.getvalue()[: hidden.getvalue().index(b"PK\x01\x02")]
    for before in (entry, b"#!/bin/sh\n"):
        zipped.write_bytes(before + raw)
        assert "of something else" in refused(zipped)
    directory = raw.index(b"PK\x01\x02")
    start = int.from_bytes(raw[-6:-2], "little")
    moved = raw[-22:-6] + (start + len(entry)).to_bytes(4, "little") + raw[-2:]
    zipped.write_bytes(raw[:directory] + entry + raw[directory:-22] + moved)
    assert "something else than its members" in refused(zipped)
    for after in (entry, b"x"):
        zipped.write_bytes(raw + after)
        with pytest.raises(UsageError, match="its directory isn't at its very end"), open_archive(zipped):
            pass


@pytest.mark.parametrize(("at", "value"), [(6, 2), (8, 12), (14, 0), (18, 1), (22, 1), (30, ord("x"))])
def test_members_described_in_two_ways(zipped: Path, at: int, value: int) -> None:
    """Flags, method, CRC, sizes and name stand before each member, too."""
    raw = bytearray(zipped.read_bytes())
    assert raw[:4] == b"PK\x03\x04"
    raw[at] = raw[at] ^ 0xFF if value == 0 else value
    zipped.write_bytes(raw)
    assert "LICENCES.md' in two ways" in refused(zipped)


def test_a_directory_that_is_too_large(tmp_path: Path) -> None:
    """Regression: three million members of 47 bytes took a gigabyte and a minute, to be refused then."""
    path = tmp_path / "b.zip"
    for claim in (17 << 20, 0xFFFFFFFF):
        path.write_bytes(bytes(100) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, claim, 0, 0))
        with pytest.raises(UsageError, match=f"its directory takes {claim} bytes"), open_archive(path):
            pass
    large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 9, 9, 1 << 40, 0)
    locator, end = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1), struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 9, 0, 0)
    path.write_bytes(large + locator + end)
    with pytest.raises(UsageError, match=f"its directory takes {1 << 40} bytes"), open_archive(path):
        pass


def test_devices_and_pipes() -> None:
    """Regression: /dev/zero was read until memory ran out."""
    for name in ("/dev/zero", "/dev/null"):
        with pytest.raises(UsageError, match=f"{name}: is no regular file"), open_archive(Path(name)):
            pass


class Stream(io.RawIOBase):
    """What can't be sought in, as a pipe or a connection: sizes then come after each member."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@pytest.mark.parametrize("way", ["streamed", "large", "folders"])
def test_bundles_that_others_zipped(small_bundle: Make, tmp_path: Path, way: str) -> None:
    bundle = small_bundle("b")
    path = tmp_path / "other.zip"
    if way == "folders":
        (tmp_path / "r").mkdir()
        bundle.rename(tmp_path / "r" / "b")
        shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path / "r")
    else:
        stream = Stream(path) if way == "streamed" else path.open("wb")
        with stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(bundle.rglob("*")):
                if file.is_file():
                    name = f"b/{file.relative_to(bundle).as_posix()}"
                    with archive.open(name, "w", force_zip64=way == "large") as target:
                        target.write(file.read_bytes())
    with open_archive(path) as opened:
        assert opened.name == "net"


def test_a_file_that_changes_while_it_is_archived(small_bundle: Make, tmp_path: Path) -> None:
    bundle = open_bundle(small_bundle("b"))
    (bundle.path / "model.onnx").write_bytes(b"another")
    with pytest.raises(TamperedError, match=r"model\.onnx: is being changed"):
        write_archive(bundle, tmp_path / "b.zip")
    assert not list(tmp_path.glob("*.zip"))


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
