"""`edgeopt bundle` and `edgeopt verify`: what they write, print and refuse."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeopt.bundle.verification import Verified
from edgeopt.cli import main
from edgeopt.cli.bundle import PASSWORD_VARIABLE

Make = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_sign_zip_and_verify(run: Run, small_bundle: Make) -> None:
    small_bundle("b")
    code, out, err = run("bundle", "--new-key", "k", "--no-password")
    assert (code, err) == (0, "")
    assert "k.key: keep it to yourself" in out
    assert "k.pub, or RW" in out
    code, out, err = run("bundle", "b", "--sign", "k.key", "--zip")
    assert (code, err) == (0, "")
    assert "edgeopt verify b --public-key k.pub" in out
    assert "b.zip" in out
    for name in ("b", "b.zip"):
        code, out, err = run("verify", name, "--public-key", "k.pub")
        assert (code, err) == (0, "")
        assert "net for android-onnx-int8, passed" in out
        assert "valid, key" in out
    _, out, _ = run("verify", "b")
    assert "NOT verified: give --public-key" in out


def test_json(run: Run, small_bundle: Make) -> None:
    small_bundle("b")
    _, out, _ = run("bundle", "--new-key", "k", "--no-password", "--json")
    key = json.loads(out)
    assert key["public_key"] == "k.pub"
    _, out, _ = run("bundle", "b", "--sign", "k.key", "--zip", "--output", "x.zip", "--json")
    document = json.loads(out)
    assert (document["archive"], document["signed_by"]) == ("x.zip", key["key"])
    assert document["size_bytes"] == Path("x.zip").stat().st_size
    _, out, _ = run("verify", "x.zip", "--public-key", key["text"], "--json")
    assert json.loads(out)["verified"]["signature_verified"] is True


def test_a_tampered_bundle_is_refused(run: Run, small_bundle: Make) -> None:
    bundle = small_bundle("b")
    (bundle / "model.onnx").write_bytes(b"other")
    code, out, err = run("verify", "b")
    assert (code, out) == (2, "")
    assert err == "error: b/model.onnx: is not the file that the manifest describes (SHA-256 differs)\n"
    code, _, err = run("verify", "none")
    assert (code, err) == (2, "error: none: is not there\n")


def test_an_unsigned_bundle_where_a_signature_is_wanted(run: Run, small_bundle: Make) -> None:
    small_bundle("b")
    run("bundle", "--new-key", "k", "--no-password")
    code, _, err = run("verify", "b", "--public-key", "k.pub")
    assert code == 2
    assert err.startswith("error: b: is not signed; ")


def test_deltas(run: Run, small_bundle: Make) -> None:
    small_bundle("v1", bytes(range(256)) * 50)
    small_bundle("v2", bytes(range(256)) * 49 + b"new" * 20)
    code, out, err = run("bundle", "v2", "--delta-from", "v1", "--output", "d")
    assert (code, err) == (0, "")
    assert "model.onnx" in out
    assert "patch" in out
    assert "instead of" in out
    run("bundle", "v1", "--zip")
    code, out, err = run("bundle", "v1.zip", "--apply", "d", "--output", "v3")
    assert (code, err) == (0, "")
    assert Path("v3/model.onnx").read_bytes() == Path("v2/model.onnx").read_bytes()
    assert "Signature" in out
    assert "Written" in out
    _, out, _ = run("bundle", "v2", "--delta-from", "v1.zip", "--output", "d", "--json")
    assert json.loads(out)["delta"]["files"]["model.onnx"]["how"] == "patch"
    _, out, _ = run("bundle", "v1", "--apply", "d", "--output", "v4", "--json")
    assert json.loads(out)["verified"]["signed_by"] is None
    code, _, err = run("bundle", "v2", "--apply", "d", "--output", "v5")
    assert code == 2
    assert "is a delta for another bundle" in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("b", "nothing to do; give one of --new-key, --zip or --sign, --delta-from, --apply"),
        ("b --zip --apply d", "--zip or --sign and --apply can't go together"),
        ("b --delta-from a --apply d", "--delta-from and --apply can't go together"),
        ("--zip", "--zip or --sign needs a BUNDLE"),
        ("b --delta-from a", "--delta-from needs --output"),
        ("b --apply d", "--apply needs --output"),
        ("b --sign k --output x", "--output has no meaning here; see 'edgeopt bundle --help'"),
        ("b --zip --public-key k", "--public-key has no meaning here; see 'edgeopt bundle --help'"),
        ("b --zip --no-password", "--no-password has no meaning here; see 'edgeopt bundle --help'"),
        ("b --zip --password-file f", "--password-file has no meaning here; see 'edgeopt bundle --help'"),
        ("b --new-key k", "BUNDLE has no meaning here; see 'edgeopt bundle --help'"),
        ("b --zip", "b: is not a bundle directory"),
        ("b --sign none.key", "none.key: the secret key can't be read: No such file or directory"),
        ("--new-key k", "k.key: needs a password; set EDGEOPT_KEY_PASSWORD, give --password-file, or --no-password"),
        ("--new-key k --password-file none", "none: can't be read: No such file or directory"),
    ],
)
def test_wrong_use_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: str, problem: str) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    code, out, err = run("bundle", *arguments.split())
    assert (code, out, err) == (2, "", f"error: {problem}\n")


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys whose password takes milliseconds instead of seconds to try."""
    from edgeopt.bundle import signature_keys

    real = signature_keys.new_key_pair
    monkeypatch.setattr(signature_keys, "new_key_pair", lambda name, password: real(name, password, 1 << 20, 1 << 24))


@pytest.mark.usefixtures("cheap")
def test_passwords_from_a_file_the_environment_and_a_prompt(
    run: Run, small_bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bundle("b")
    Path("pw").write_text("secret\r\nsecond line\n")
    assert run("bundle", "--new-key", "k", "--password-file", "pw")[0] == 0
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    assert run("bundle", "b", "--sign", "k.key")[0] == 0
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    assert run("bundle", "b", "--sign", "k.key")[2] == "error: k.key: the password is wrong\n"
    monkeypatch.delenv(PASSWORD_VARIABLE)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    typed = iter(["secret", "new", "other"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(typed))
    assert run("bundle", "b", "--sign", "k.key")[0] == 0
    assert run("bundle", "--new-key", "other")[2] == "error: other.key: the two passwords differ\n"
    assert not Path("other.key").exists()


def test_a_name_can_not_look_like_a_signature(run: Run, small_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bundle("b")
    found = Verified("net\nSignature  valid", "t", "passed", 9, "ab", None, signature_verified=False, comment=None)
    monkeypatch.setattr("edgeopt.bundle.verification.verify_bundle", lambda *_: found)
    _, out, _ = run("verify", "b")
    assert "net\\nSignature  valid for t, passed" in out
    assert [line.split()[0] for line in out.splitlines()] == ["Bundle", "Files", "Manifest", "Signature"]


@pytest.mark.usefixtures("cheap")
def test_a_password_may_be_any_bytes(run: Run, small_bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: one that isn't UTF-8 was an internal error in a file, and in the environment a lack of memory."""
    small_bundle("b")
    Path("pw").write_bytes(b"\xff\xfe\n")
    assert run("bundle", "--new-key", "k", "--password-file", "pw")[0] == 0
    monkeypatch.setenv(PASSWORD_VARIABLE, os.fsdecode(b"\xff\xfe"))
    assert run("bundle", "b", "--sign", "k.key")[0] == 0
    monkeypatch.setenv(PASSWORD_VARIABLE, os.fsdecode(b"\xff\xfd"))
    assert run("bundle", "b", "--sign", "k.key")[2] == "error: k.key: the password is wrong\n"


def test_what_it_says_to_run_can_be_pasted(run: Run, small_bundle: Make) -> None:
    """Regression: names with spaces were not quoted."""
    small_bundle("my b")
    run("bundle", "--new-key", "my k", "--no-password")
    _, out, _ = run("bundle", "my b", "--sign", "my k.key")
    (line,) = (line for line in out.splitlines() if "edgeopt verify" in line)
    assert run(*shlex.split(line)[3:])[0] == 0


def test_the_help(run: Run) -> None:
    _, out, _ = run("bundle", "--help")
    for flag in ("--zip", "--sign", "--delta-from", "--apply", "--output", "--new-key", "--password-file", "--json"):
        assert flag in out
    _, out, _ = run("verify", "--help")
    assert "--public-key" in out
