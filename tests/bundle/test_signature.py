"""Signatures that minisign makes and checks, and what a signed bundle refuses. Canned files are by minisign 0.11."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from edgeopt.bundle import open_bundle, signature_keys
from edgeopt.bundle.archive import write_archive
from edgeopt.bundle.signature import parse_public_key, parse_signature, read_public_key, sign, verify
from edgeopt.bundle.signature_keys import new_key_pair, read_secret_key
from edgeopt.bundle.verification import sign_bundle, verify_bundle
from edgeopt.errors import EdgeoptError, MissingError, TamperedError, UsageError
from edgeopt.report_file import seal

Make = Callable[..., Path]

CONTENT = b"hello sums\n"
#: Of test keys that protect nothing: `minisign -G -W`, and `minisign -G` with the password "secret".
PLAIN_KEY = (
    "untrusted comment: minisign encrypted secret key\n"
    "RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAWgJC7+/abvOqOUETbGULSYf9SvYgd9XgmyZuRo3apf0zpJpwcrqbkOX2Wz7AOyfc8ZfLyODS/Ph/zHa/2HMtK0Flt1iGIODcAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"
)
PLAIN_PUBLIC = (
    "untrusted comment: minisign public key F36EDAEFEF42025A\n"
    "RWRaAkLv79pu8+X2Wz7AOyfc8ZfLyODS/Ph/zHa/2HMtK0Flt1iGIODc\n"
)
PASSWORD_KEY = (
    "untrusted comment: minisign encrypted secret key\n"
    "RWRTY0IyWOGImctHyw3XBTeWEosSTpaWFZrmrCDJkxM+QIl3EZ4AAAACAAAAAAAAAEAAAAAASwAIhzqfGYJXPQF+Y4aVRKjnFlJ25ZDVNt4avd81RxE07kXTSWx6t5Y4omHAbp6bShmUI5yDmj4F1QGEdYtJ6SuN23TecgFMegn5cKkahwfUYIgr89xOC4VJ/SCqDpoltdXgxyYse7Y=\n"
)
PASSWORD_PUBLIC = (
    "untrusted comment: minisign public key 12A88CDF2A4D698A\n"
    "RWSKaU0q34yoEq/shzg43mp75R5WcXN/5ozQRxEUk3F58EzffxKGf6Yo\n"
)
#: `minisign -S` of CONTENT, with a comment; `-l`, over the file itself; and with the second key.
SIGNED = (
    "untrusted comment: signature from minisign secret key\n"
    "RURaAkLv79pu86worRh++Ve9rCXZbAvvVXO5xk5Uy94yxlou4GPK7Tz+PYl95OVDAhohiSeEkBGV96vCABcaltGvhqrpVHQPqwg=\n"
    "trusted comment: a trusted comment\n"
    "bYXb6CMUQOz7z0KiinGe8av2INWepPtrf2J9hPcfRMZ70J6i1npRYThagq4ux1yZiWAsp59+2DffzWe4EIV1BA==\n"
)
SIGNED_LEGACY = (
    "untrusted comment: signature from minisign secret key\n"
    "RWRaAkLv79pu8z2LrnufwXWt27vuGtTVzSSl24Z3hrJHJoGBAg0iRmyW+GtMnWqrNJ5McZlJQT9KAwkMBERZEiuwXF2GbzUBNQI=\n"
    "trusted comment: timestamp:1795297813\tfile:f\n"
    "7KSEk4CI7ovrpzLy7ZQ09zISACBNTpdv1F5ztHccf1/d79L7E1DefacTK69Mb705RF3bi+0Ouep7PERZgRKIDw==\n"
)
SIGNED_WITH_PASSWORD = (
    "untrusted comment: signature from minisign secret key\n"
    "RUSKaU0q34yoEk674BxrfqN2F3jeHz4x5KppEKmEGPhY7ntvha171+EnArYXJiRSrzEY6hK6y6UVY26oTdcPzIzwf/3YoOz70w8=\n"
    "trusted comment: timestamp:1795297818\tfile:f\thashed\n"
    "52ZnyqLGYu9iZuGNcSCUItM0gTLvn6HTZK8RdLPT6OEIem6SY7eGGV8x06VixA4N8XSYqCo7L2I3GHgtghsYDA==\n"
)


def no_password() -> str:
    raise AssertionError("nobody should be asked")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "plain.key"
    path.write_text(PLAIN_KEY)
    return path


@pytest.mark.parametrize(
    ("signature", "public"),
    [(SIGNED, PLAIN_PUBLIC), (SIGNED_LEGACY, PLAIN_PUBLIC), (SIGNED_WITH_PASSWORD, PASSWORD_PUBLIC)],
)
def test_what_minisign_signed(signature: str, public: str) -> None:
    parsed, public_key = parse_signature(signature.encode(), "s"), parse_public_key(public.encode(), "p")
    verify(CONTENT, parsed, public_key, "f")
    with pytest.raises(TamperedError, match=r"f: is no signature of key .* over this content"):
        verify(CONTENT + b"!", parsed, public_key, "f")


def test_another_key(key: Path) -> None:
    parsed = parse_signature(SIGNED.encode(), "s")
    with pytest.raises(TamperedError, match="was signed with key F36EDAEFEF42025A, not with 12A88CDF2A4D698A"):
        verify(CONTENT, parsed, parse_public_key(PASSWORD_PUBLIC.encode(), "p"), "f")
    forged = read_secret_key(key, no_password).public()
    claimed = parse_public_key(PASSWORD_PUBLIC.encode(), "p")
    disguised = type(forged)(parsed.number, claimed.key)  # the number is a claim; the key decides
    with pytest.raises(TamperedError, match="is no signature of key F36EDAEFEF42025A"):
        verify(CONTENT, parsed, disguised, "f")


def test_a_trusted_comment_is_part_of_it() -> None:
    parsed = parse_signature(SIGNED.replace("a trusted", "another").encode(), "s")
    with pytest.raises(TamperedError, match="trusted comment was changed"):
        verify(CONTENT, parsed, parse_public_key(PLAIN_PUBLIC.encode(), "p"), "f")


@pytest.mark.e2e
def test_a_key_with_a_password_of_minisign(tmp_path: Path) -> None:
    path = tmp_path / "k.key"
    path.write_text(PASSWORD_KEY)
    try:
        key = read_secret_key(path, lambda: "secret")
    except MissingError as error:
        pytest.skip(error.line())  # minisign asks for 1 GiB
    assert key.public().text == PASSWORD_PUBLIC.splitlines()[1]
    verify(CONTENT, parse_signature(sign(CONTENT, key, "mine").encode(), "s"), key.public(), "f")


def test_our_own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, password in (("a", None), ("b", "pässword")):
        secret, public, key = new_key_pair(Path(name), password, operations=1 << 20, memory=1 << 24)
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert read_public_key(str(public)) == key == read_public_key(key.text)
        read = read_secret_key(secret, (lambda: "pässword") if password else no_password)
        assert read.public() == key
        assert repr(read.seed) not in repr(read)
    with pytest.raises(UsageError, match=r"b\.key: the password is wrong"):
        read_secret_key(Path("b.key"), lambda: "password")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_text("mine")
    with pytest.raises(UsageError, match=r"a\.pub: is there already"):
        new_key_pair(tmp_path / "a", None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pub"]
    with pytest.raises(UsageError, match=r"none/a\.key: can't be written: No such file"):
        new_key_pair(tmp_path / "none" / "a", None)


def test_the_same_signature_twice(key: Path) -> None:
    secret = read_secret_key(key, no_password)
    assert sign(CONTENT, secret, "c") == sign(CONTENT, secret, "c")
    with pytest.raises(UsageError, match="one line"):
        sign(CONTENT, secret, "two\nlines")


@pytest.mark.parametrize(
    "text",
    ["", "x", SIGNED.replace("untrusted", "other"), "\n".join(SIGNED.splitlines()[:3]), SIGNED + "more\n",
     SIGNED.replace("RURa", "RVRa"), SIGNED.replace("RURa", "!URa"), SIGNED.replace("=", "")],
)  # fmt: skip
def test_malformed_signatures(text: str) -> None:
    with pytest.raises(TamperedError, match="s: is no minisign signature"):
        parse_signature(text.encode(), "s")


def test_malformed_keys(tmp_path: Path) -> None:
    path = tmp_path / "k"
    body = bytearray(base64.b64decode(PLAIN_KEY.splitlines()[1]))
    swapped = body.copy()
    swapped[64] ^= 1  # the seed no longer makes the public key
    unknown = body.copy()
    unknown[2:4] = b"BK"
    for content, problem in (
        (b"", "no minisign secret key"),
        (b"\xff\xfe", "no minisign secret key"),
        (PLAIN_PUBLIC.encode(), "no minisign secret key"),
        (b"c\n" + base64.b64encode(swapped), "two halves"),
        (b"c\n" + base64.b64encode(unknown), "of a kind that we don't know"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=problem):
            read_secret_key(path, no_password)
    for text in (b"", b"a\nb\nc\n", PLAIN_KEY.encode(), b"\xff"):
        path.write_bytes(text)
        with pytest.raises(UsageError, match="no minisign public key"):
            read_public_key(str(path))
    with pytest.raises(UsageError, match="public key can't be read: No such file"):
        read_public_key(str(tmp_path / "none"))


def test_a_key_that_would_take_all_memory(tmp_path: Path) -> None:
    body = bytearray(base64.b64decode(PASSWORD_KEY.splitlines()[1]))
    body[38:54] = (1 << 40).to_bytes(8, "little") + (1 << 36).to_bytes(8, "little")
    (tmp_path / "k").write_bytes(b"c\n" + base64.b64encode(body))
    with pytest.raises(UsageError, match="more than 1 GiB"):
        read_secret_key(tmp_path / "k", lambda: "secret")


@pytest.mark.parametrize(
    ("operations", "memory", "expected"),
    [(1 << 25, 1 << 30, (20, 8, 1)), (1 << 19, 1 << 24, (14, 8, 1)), (1 << 15, 1 << 30, (10, 8, 1))],
)
def test_costs_as_libsodium_has_them(operations: int, memory: int, expected: tuple[int, int, int]) -> None:
    """Its SENSITIVE and INTERACTIVE limits are documented as N = 2^20 and 2^14."""
    assert signature_keys._costs(operations, memory) == expected


def test_minisign_reads_what_we_write(tmp_path: Path) -> None:
    program = shutil.which("minisign")
    if program is None:
        pytest.skip("no minisign here")
    secret, public, key = new_key_pair(tmp_path / "ours", None)
    (tmp_path / "f").write_bytes(CONTENT)
    (tmp_path / "f.minisig").write_text(sign(CONTENT, read_secret_key(secret, no_password), "mine"))
    done = subprocess.run([program, "-V", "-m", "f", "-p", str(public)], cwd=tmp_path, capture_output=True, text=True)
    assert "Trusted comment: mine" in done.stdout
    subprocess.run([program, "-S", "-W", "-s", str(secret), "-m", "f"], cwd=tmp_path, check=True, capture_output=True)
    verify(CONTENT, parse_signature((tmp_path / "f.minisig").read_bytes(), "s"), key, "f")


def test_without_the_package(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    for work in (lambda: new_key_pair(key.with_name("new"), None), lambda: read_secret_key(key, no_password)):
        with pytest.raises(MissingError, match=r"pip install 'edgeopt\[shipping\]'"):
            work()


# --- bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(small_bundle: Make, key: Path) -> Path:
    bundle = small_bundle("b")
    sign_bundle(open_bundle(bundle), read_secret_key(key, no_password))
    return bundle


PUBLIC = parse_public_key(PLAIN_PUBLIC.encode(), "p")


def refused(path: Path, with_key: bool = True) -> str:
    with pytest.raises(EdgeoptError) as caught:
        verify_bundle(path, PUBLIC if with_key else None)
    assert isinstance(caught.value, TamperedError)
    assert caught.value.exit_code == 2
    return caught.value.line()


def test_a_signed_bundle(signed: Path, tmp_path: Path) -> None:
    verified = verify_bundle(signed, PUBLIC)
    assert (verified.signed_by, verified.signature_verified) == ("F36EDAEFEF42025A", True)
    assert verified.comment == "edgeopt bundle net for android-onnx-int8"
    assert verified.files == sum(path.is_file() for path in signed.rglob("*"))
    assert not verify_bundle(signed).signature_verified
    path = write_archive(open_bundle(signed), tmp_path / "b.zip")
    assert verify_bundle(path, PUBLIC) == verified


def test_sha256sum_checks_the_same(signed: Path) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=signed, check=True)
    lines = (signed / "SHA256SUMS").read_text().splitlines()
    names = [line.split("  ")[1] for line in lines]
    assert names == sorted(names)
    assert {"manifest.json", "report.json", "model.onnx"} <= set(names)
    assert set(names) == {path.relative_to(signed).as_posix() for path in signed.rglob("*") if path.is_file()} - {
        "SHA256SUMS",
        "SHA256SUMS.minisig",
    }


def test_signing_twice_gives_the_same_bytes(signed: Path, key: Path) -> None:
    before = (signed / "SHA256SUMS.minisig").read_bytes()
    sign_bundle(open_bundle(signed), read_secret_key(key, no_password))
    assert (signed / "SHA256SUMS.minisig").read_bytes() == before


def test_no_signature_where_one_is_wanted(small_bundle: Make) -> None:
    bundle = small_bundle("b")
    assert "is not signed" in refused(bundle)
    assert verify_bundle(bundle).signed_by is None


def test_another_signer(signed: Path, tmp_path: Path) -> None:
    new_key_pair(tmp_path / "other", None)
    sign_bundle(open_bundle(signed), read_secret_key(tmp_path / "other.key", no_password))
    assert "not with F36EDAEFEF42025A" in refused(signed)


def test_changed_added_and_removed_files(signed: Path) -> None:
    model = (signed / "model.onnx").read_bytes()
    (signed / "model.onnx").write_bytes(model[:-1] + b"!")
    assert "model.onnx: is not the file that the manifest describes" in refused(signed)
    (signed / "model.onnx").unlink()
    assert "model.onnx: is missing" in refused(signed)
    (signed / "model.onnx").write_bytes(model)
    (signed / "notes").write_text("x")
    assert "notes: is not in the manifest" in refused(signed)


def test_a_change_that_the_manifest_goes_along_with(signed: Path) -> None:
    """Hashes alone don't help against somebody who can compute them: the signature does."""
    import hashlib

    (signed / "model.onnx").write_bytes(b"evil")
    manifest = json.loads((signed / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"sha256": hashlib.sha256(b"evil").hexdigest(), "size_bytes": 4}
    (signed / "manifest.json").write_text(json.dumps(manifest))
    report = json.loads((signed / "report.json").read_text())
    report["manifest_sha256"] = hashlib.sha256((signed / "manifest.json").read_bytes()).hexdigest()
    report["sha256"] = seal(report)
    (signed / "report.json").write_text(json.dumps(report))
    open_bundle(signed)
    assert "manifest.json: was changed after the bundle was signed" in refused(signed)
    assert "was changed after the bundle was signed" in refused(signed, with_key=False)
    sums = (signed / "SHA256SUMS").read_text()
    for name in ("manifest.json", "model.onnx", "report.json"):
        digest = hashlib.sha256((signed / name).read_bytes()).hexdigest()
        sums = "".join(
            f"{digest}  {name}\n" if line.endswith(f"  {name}") else f"{line}\n" for line in sums.splitlines()
        )
    (signed / "SHA256SUMS").write_text(sums)
    assert "SHA256SUMS.minisig: is no signature of key F36EDAEFEF42025A over this content" in refused(signed)


def test_the_signature_of_another_bundle(signed: Path, small_bundle: Make) -> None:
    other = small_bundle("other", b"other weights")
    shutil.copy(signed / "SHA256SUMS", other)
    shutil.copy(signed / "SHA256SUMS.minisig", other)
    assert "was changed after the bundle was signed" in refused(other)


def test_a_report_that_a_device_added_to(signed: Path) -> None:
    (signed / "device_report.json").write_text("{}")
    assert "device_report.json: was added after the bundle was signed; 'edgeopt device run' does that" in refused(
        signed
    )
    (signed / "device_report.json").unlink()
    report = json.loads((signed / "report.json").read_text())
    report["evaluation"] = {"seen": "a device"}
    report["sha256"] = seal(report)
    (signed / "report.json").write_text(json.dumps(report))
    assert "report.json: was changed after the bundle was signed; 'edgeopt device run' does that" in refused(signed)


def test_a_chart_that_is_gone(small_bundle: Make, key: Path) -> None:
    """Files that the manifest doesn't list are covered by the signature only."""
    bundle = small_bundle("b")
    (bundle / "steps.svg").write_text("<svg/>")
    sign_bundle(open_bundle(bundle), read_secret_key(key, no_password))
    verify_bundle(bundle, PUBLIC)
    (bundle / "steps.svg").unlink()
    assert "steps.svg: was removed after the bundle was signed" in refused(bundle)


def test_half_a_signature(signed: Path) -> None:
    (signed / "SHA256SUMS.minisig").rename(signed.parent / "kept")
    assert "lacks SHA256SUMS.minisig, and has SHA256SUMS" in refused(signed, with_key=False)
    (signed.parent / "kept").rename(signed / "SHA256SUMS.minisig")
    (signed / "SHA256SUMS").write_text("nonsense\n")
    assert "SHA256SUMS: is no list of hashes" in refused(signed, with_key=False)


def test_a_bundle_that_can_not_be_written_to(small_bundle: Make, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(small_bundle("b"))

    monkeypatch.setattr(Path, "replace", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match="SHA256SUMS: can't be written: Permission denied"):
        sign_bundle(bundle, read_secret_key(key, no_password))
    assert not list(bundle.path.glob(".*"))
