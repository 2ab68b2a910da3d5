"""A network that writes is zipped, signed and verified as a whole; its parts are given where one bundle is wanted."""

from __future__ import annotations

import shutil
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from edgeopt.bundle.archive import open_anywhere, open_archive, open_whole, write_archive
from edgeopt.bundle.archive_whole import files_of, open_directory
from edgeopt.bundle.generation import write_generation_bundle
from edgeopt.bundle.generation_reader import GenerationBundle
from edgeopt.bundle.signature_keys import new_key_pair, read_secret_key
from edgeopt.bundle.verification import sign_bundle, verify_bundle
from edgeopt.errors import TamperedError, UsageError
from edgeopt.formats.files import sha256_of

_spec = spec_from_file_location("generation_toys", Path(__file__).parent / "fixtures/generation_toys.py")
assert _spec is not None
assert _spec.loader is not None
toys = module_from_spec(_spec)
_spec.loader.exec_module(toys)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return write_generation_bundle(folder / "toy", toys.contents(folder / "work")).path


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt: bringing a new one to disk takes a second."""
    return shutil.copytree(written, tmp_path / "toy")


@pytest.fixture(scope="module")
def zipped(written: Path) -> Path:
    return write_archive(open_directory(written))


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def changed(zipped: Path, target: Path, change: dict[str, bytes | None]) -> Path:
    """A copy of an archive with other members: None takes one out."""
    with zipfile.ZipFile(zipped) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, data in (members | change).items():
            if data is not None:
                new.writestr(f"{root}/{name}", data)
    return target


def test_an_archive_holds_all_parts_and_comes_back(written: Path, zipped: Path) -> None:
    with zipfile.ZipFile(zipped) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"toy-linux-arm64-onnx-fp32"}
    with open_archive(zipped) as opened:
        assert isinstance(opened, GenerationBundle)
        assert tree(opened.path) == tree(written)
    again = write_archive(open_directory(written), zipped.with_name("again.zip"))
    assert sha256_of(again) == sha256_of(zipped)


def test_it_is_verified_as_a_whole(written: Path, zipped: Path) -> None:
    found = verify_bundle(written)
    assert (found.name, found.target, found.status, found.signed_by) == (
        "toy", "linux-arm64-onnx-fp32", "passed", None,
    )  # fmt: skip
    assert found.files == len(tree(written))
    assert found.manifest_sha256 == sha256_of(written / "generation.json")
    assert verify_bundle(zipped) == found


@pytest.mark.parametrize("name", ["generate.py", "encoder/model.onnx", "decoder/golden/0/input_token.bin"])
def test_damage_anywhere_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"other")
    with pytest.raises(TamperedError) as caught:
        verify_bundle(bundle)
    assert caught.value.where == str(bundle / name)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"encoder/model.onnx": None}, "lacks 'encoder/model.onnx'"),
        ({"decoder/manifest.json": None}, "lacks 'decoder/manifest.json'"),
        ({"decoder/manifest.json": b"{}"}, "is not the one in its generation.json"),
        ({"decoder/model.onnx": b"x" * 100}, "unpacks to 100 bytes, which it shouldn't"),
        ({"decoder/extra": b"x"}, "holds 'decoder/extra', which its manifest doesn't list"),
        ({"elsewhere/model.onnx": b"x"}, "holds 'elsewhere/model.onnx'"),
        ({"manifest.json": b"{}"}, "holds 'manifest.json'"),
        ({"report.json": None}, "lacks 'report.json'"),
        ({"decoder/report.json": None}, "is missing from the bundle"),
    ],
)
def test_an_archive_with_other_members_is_refused(
    zipped: Path, tmp_path: Path, change: dict[str, bytes | None], problem: str
) -> None:
    path = changed(zipped, tmp_path / "other.zip", change)
    with pytest.raises(TamperedError) as caught, open_archive(path):
        pass
    assert problem in caught.value.line()
    assert str(path) in caught.value.line()


def test_a_signature_covers_every_part(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    secret, _, public = new_key_pair(tmp_path / "key", None)
    sign_bundle(open_directory(bundle), read_secret_key(secret, str))
    found = verify_bundle(bundle, public)
    assert found.signature_verified
    assert found.files == len(tree(bundle)) == len(files_of(open_directory(bundle)))
    assert verify_bundle(write_archive(open_directory(bundle), tmp_path / "signed.zip"), public) == found
    shutil.copyfile(bundle / "decoder/report.json", bundle / "decoder/device_report.json")
    with pytest.raises(TamperedError, match="'edgeopt device run' does that") as caught:
        verify_bundle(bundle, public)
    assert caught.value.where == f"{bundle}: decoder/device_report.json"


def test_where_one_bundle_is_wanted_a_line_says_which_to_give(written: Path, zipped: Path) -> None:
    with pytest.raises(UsageError) as caught, open_anywhere(written):
        pass
    assert caught.value.line() == (
        f"{written}: is the bundle of a network that writes, which consists of several bundles; "
        f"give one of them, such as {written / 'decoder'}"
    )
    with pytest.raises(UsageError, match="unpack it, and give one of its bundles"), open_anywhere(zipped):
        pass
    with open_anywhere(written / "decoder") as part, open_whole(written) as whole:
        assert (part.name, whole.name) == ("toy-decoder", "toy")


def test_an_archive_is_not_written_into_its_bundle(written: Path) -> None:
    with pytest.raises(UsageError, match="lies inside the bundle"):
        write_archive(open_directory(written), written / "decoder/x.zip")
