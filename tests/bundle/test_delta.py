"""Deltas: what they restore, what they cost, and which ones are refused."""

from __future__ import annotations

import bz2
import io
import json
import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle import open_bundle
from edgeopt.bundle.archive import write_archive
from edgeopt.bundle.delta import DeltaCost, write_delta
from edgeopt.bundle.delta_apply import apply_delta
from edgeopt.bundle.delta_patch import apply_patch, make_patch
from edgeopt.bundle.signature_keys import new_key_pair, read_secret_key
from edgeopt.bundle.verification import sign_bundle
from edgeopt.errors import TamperedError, UsageError
from edgeopt.progress import Silent

Make = Callable[..., Path]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


# --- patches ---------------------------------------------------------------------------------------------------------

BASE = noise(100_000)
PAIRS: dict[str, tuple[bytes, bytes]] = {
    "both empty": (b"", b""),
    "from nothing": (b"", b"abc"),
    "to nothing": (b"abc", b""),
    "shorter than a fingerprint": (b"abc", b"abd"),
    "the same": (BASE, BASE),
    "rotated": (BASE, BASE[1000:] + BASE[:1000]),
    "inserted": (BASE, BASE[:500] + b"new" * 700 + BASE[500:]),
    "cut out": (BASE, BASE[:30_000] + BASE[60_000:]),
    "longer": (BASE[:40_000], BASE),
    "in another order": (BASE, BASE[70_000:] + BASE[20_000:70_000] + b"!" + BASE[:5]),
    "nothing in common": (BASE, noise(50_000, seed=1)),
    "zeros": (bytes(50_000), bytes(60_000)),
    "before the start": (BASE[500:], BASE),
}


@pytest.mark.parametrize("name", PAIRS)
def test_patches_restore_the_new_file(name: str) -> None:
    old, new = PAIRS[name]
    patch = make_patch(old, new)
    assert patch == make_patch(old, new)
    assert apply_patch(old, patch, len(new), "p") == new


def test_pieces_in_any_order() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        starts = [chance.randrange(99_000) for _ in range(chance.randrange(1, 6))]
        new = b"".join(BASE[start : start + chance.randrange(1, 30_000)] for start in starts)
        old = BASE[: chance.randrange(100_000)]
        assert apply_patch(old, make_patch(old, new), len(new), "p") == new


def test_bspatch_applies_them(tmp_path: Path) -> None:
    program = shutil.which("bspatch")
    if program is None:
        pytest.skip("no bspatch here (Debian's package bsdiff)")
    for old, new in PAIRS.values():
        for name, content in (("old", old), ("patch", make_patch(old, new))):
            (tmp_path / name).write_bytes(content)
        subprocess.run([program, "old", "new", "patch"], cwd=tmp_path, check=True)
        assert (tmp_path / "new").read_bytes() == new


def test_what_moved_and_weights_that_changed_by_a_step_cost_little() -> None:
    chance = np.random.default_rng(0)
    weights = chance.normal(0, 30, 400_000).astype(np.int8)
    steps = weights.copy()
    steps[::50] += 1
    old, new = b"head" + weights.tobytes(), b"longer head" + steps.tobytes()
    patch = make_patch(old, new)
    assert len(patch) < 0.02 * len(new)
    assert len(make_patch(BASE, BASE[1000:] + BASE[:1000])) < 300


def test_floats_of_which_all_low_bits_changed() -> None:
    """bsdiff sends these whole, for want of equal bytes: sign and exponent are the same all the same."""
    chance = np.random.default_rng(0)
    weights = chance.normal(0, 0.05, 50_000).astype(np.float32)
    tuned = weights * np.float32(1.0001)
    assert len(make_patch(weights.tobytes(), tuned.tobytes())) < 0.65 * len(bz2.compress(tuned.tobytes()))


@pytest.mark.parametrize("place", ["magic", "size", "control", "differences", "extra", "length", "more", "cut"])
def test_malformed_patches(place: str) -> None:
    old, new = BASE, b"xyz" * 100 + BASE[:5000] + noise(20_000, seed=3)
    patch = bytearray(make_patch(old, new))
    control = int.from_bytes(patch[8:16], "little")
    match place:
        case "magic":
            patch[0] ^= 1
        case "size":
            patch[24] ^= 1
        case "control":
            patch[40] ^= 255
        case "differences":
            patch[32 + control + 10] ^= 255
        case "extra":
            patch[-20] ^= 255
        case "length":
            patch[14] ^= 128
        case "more":
            patch += bz2.compress(bytes(100))
        case "cut":
            del patch[-30:]
    with pytest.raises(TamperedError, match=r"^p: "):
        apply_patch(old, bytes(patch), len(new), "p")


def made_up(control: list[int], differences: bytes, extra: bytes, size: int) -> bytes:
    numbers = b"".join((abs(n) | (1 << 63 if n < 0 else 0)).to_bytes(8, "little") for n in control)
    blocks = [bz2.compress(part) for part in (numbers, differences, extra)]
    lengths = [len(blocks[0]), len(blocks[1]), size]
    return b"BSDIFF40" + b"".join(n.to_bytes(8, "little") for n in lengths) + b"".join(blocks)


@pytest.mark.parametrize(
    ("control", "problem"),
    [
        ([-5, 0, 0], "leads out"),
        ([5, -1, 0], "leads out"),
        ([200, 0, 0], "leads out"),
        ([5, 0, -100, 5, 0, 0], "leads out"),
        ([5, 0, 1 << 62, 5, 0, 0], "leads out"),
        ([5, 99, 0], "leads out"),
        ([1, 20, 0], "cut short"),
        ([2, 3, 0], "makes 5 of 50 bytes"),
        ([0, 0, 9, 2, 3, 0], "makes 5 of 50 bytes"),
        ([5, 0, 0, 0, 0, 0, 5, 0, 0], "do nothing"),
        ([], "makes 0 of 50 bytes"),
        ([0], "cut short"),
    ],
)
def test_patches_that_read_or_write_elsewhere(control: list[int], problem: str) -> None:
    assert apply_patch(b"old" * 20, made_up([10, 40, 0], bytes(10), b"e" * 40, 50), 50, "p").endswith(b"e" * 40)
    with pytest.raises(TamperedError, match=problem):
        apply_patch(b"old" * 20, made_up(control, bytes(10), b"e" * 10, 50), 50, "p")


def test_a_patch_that_is_a_bomb() -> None:
    with pytest.raises(TamperedError, match="holds more than it should"):
        apply_patch(b"old", made_up([3, 0, 0], bytes(50 << 20), b"", 50), 50, "p")
    with pytest.raises(TamperedError, match="holds more than it should"):
        apply_patch(b"old", made_up([0, 0, 0] * 100_000, b"", b"", 50), 50, "p")
    # Regression: 240 bytes of patch took a minute to do nothing.
    with pytest.raises(TamperedError, match="do nothing"):
        apply_patch(b"old", made_up([0, 0, 0] * 100_000, b"", b"", 5 << 20), 5 << 20, "p")


# --- bundles ---------------------------------------------------------------------------------------------------------

WEIGHTS = noise(60_000, seed=7)
TUNED = WEIGHTS[:30_000] + bytes(30) + WEIGHTS[30_030:]


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def old(small_bundle: Make) -> Path:
    return small_bundle("v1", WEIGHTS)


@pytest.fixture
def new(small_bundle: Make) -> Path:
    return small_bundle("v2", TUNED)


def delta(old: Path, new: Path) -> DeltaCost:
    return write_delta(open_bundle(old), open_bundle(new), old.parent / "delta", Silent())


def test_round_trip(old: Path, new: Path, tmp_path: Path) -> None:
    cost = delta(old, new)
    verified = apply_delta(open_bundle(old), cost.path, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(new)
    assert verified.manifest_sha256 == cost.delta.new.manifest_sha256
    assert cost.delta.files["model.onnx"].how == "patch"
    assert cost.delta.files["golden/0/input_x.bin"].how == "same"
    assert cost.sent["model.onnx"] < 400
    assert "golden/0/input_x.bin" not in cost.sent
    first = cost.path.read_bytes()
    assert delta(old, new).path.read_bytes() == first


def test_files_that_moved_came_and_went(old: Path, new: Path, tmp_path: Path) -> None:
    def edit(bundle: Path, change: Callable[[dict[str, object]], None]) -> None:
        """A manifest with other files, and a report that goes with it."""
        import hashlib

        from edgeopt.report_file import seal

        manifest = json.loads((bundle / "manifest.json").read_text())
        change(manifest["files"])
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        report = json.loads((bundle / "report.json").read_text())
        report["manifest_sha256"] = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
        (bundle / "report.json").write_text(json.dumps({**report, "sha256": seal(report)}))

    def rename(files: dict[str, object]) -> None:
        (new / "check.py").rename(new / "verify.py")
        files["verify.py"] = files.pop("check.py")

    edit(new, rename)
    cost = delta(old, new)
    assert cost.delta.removed == ("check.py",)
    assert (cost.delta.files["verify.py"].how, cost.delta.files["verify.py"].base) == ("same", "check.py")
    apply_delta(open_bundle(old), cost.path, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(new)


def test_a_patch_that_would_be_larger_is_not_sent(old: Path, small_bundle: Make, tmp_path: Path) -> None:
    other = small_bundle("other", noise(60_000, seed=8))
    cost = delta(old, other)
    assert cost.delta.files["model.onnx"].how == "whole"
    apply_delta(open_bundle(old), cost.path, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(other)


def test_it_fits_whatever_was_measured_on_the_old_bundle(old: Path, new: Path, tmp_path: Path) -> None:
    cost = delta(old, new)
    (old / "steps.svg").write_text("<svg/>")
    (old / "device_report.json").write_text("{}")
    apply_delta(open_bundle(old), cost.path, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(new)


def test_the_signature_travels(old: Path, new: Path, tmp_path: Path) -> None:
    _, _, public = new_key_pair(tmp_path / "k", None)
    unsigned = delta(old, new)
    with pytest.raises(TamperedError, match="is not signed"):
        apply_delta(open_bundle(old), unsigned.path, tmp_path / "out", public)
    assert not (tmp_path / "out").exists()
    secret = read_secret_key(tmp_path / "k.key", lambda: "")
    sign_bundle(open_bundle(new), secret)
    sign_bundle(open_bundle(old), secret)
    cost = delta(old, new)
    assert apply_delta(open_bundle(old), cost.path, tmp_path / "out", public).signature_verified
    assert tree(tmp_path / "out") == tree(new)


def test_another_base(old: Path, new: Path, tmp_path: Path) -> None:
    cost = delta(old, new)
    with pytest.raises(UsageError, match="is a delta for another bundle: net for android-onnx-int8"):
        apply_delta(open_bundle(new), cost.path, tmp_path / "out")


def test_what_is_no_delta(old: Path, tmp_path: Path) -> None:
    bundle = open_bundle(old)
    with pytest.raises(UsageError, match="is a bundle, not a delta"):
        apply_delta(bundle, write_archive(bundle, tmp_path / "b.zip"), tmp_path / "out")
    (tmp_path / "text").write_text("x")
    for name, problem in (("text", r"is no \.zip file"), ("none", "is not there")):
        with pytest.raises(UsageError, match=problem):
            apply_delta(bundle, tmp_path / name, tmp_path / "out")


def test_nothing_is_overwritten(old: Path, new: Path, tmp_path: Path) -> None:
    (tmp_path / "delta").write_text("mine")
    with pytest.raises(UsageError, match="delta: is in the way"):
        delta(old, new)
    with pytest.raises(UsageError, match="lies inside the bundle"):
        write_delta(open_bundle(old), open_bundle(new), new / "d", Silent())
    (tmp_path / "delta").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(UsageError, match="is in the way"):
        apply_delta(open_bundle(old), delta(old, new).path, tmp_path / "out")


def tampered(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED)
    path.write_bytes(content.getvalue())


def test_tampered_deltas(old: Path, new: Path, tmp_path: Path) -> None:
    def with_plan(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[dict[str, bytes]], None]:
        def apply(members: dict[str, bytes]) -> None:
            plan = json.loads(members["delta.json"])
            change(plan["files"])
            members["delta.json"] = json.dumps(plan).encode()

        return apply

    def member_of(members: dict[str, bytes], name: str) -> str:
        return str(json.loads(members["delta.json"])["files"][name]["member"])

    def other_model(members: dict[str, bytes]) -> None:
        members[member_of(members, "model.onnx")] = make_patch(WEIGHTS, TUNED[::-1])

    def other_report(members: dict[str, bytes]) -> None:
        members[member_of(members, "report.json")] += b" "

    def no_patch(members: dict[str, bytes]) -> None:
        members[member_of(members, "model.onnx")] = b"?"

    def large_patch(members: dict[str, bytes]) -> None:
        members[member_of(members, "model.onnx")] = bytes(5 << 20)

    def lost(members: dict[str, bytes]) -> None:
        del members[member_of(members, "model.onnx")]

    cases: tuple[tuple[Callable[[dict[str, bytes]], None], str], ...] = (
        (other_model, "model.onnx: doesn't come out as announced"),
        (other_report, "report.json' is larger than|is larger than"),
        (no_patch, "model.onnx: is no patch for this file"),
        (lost, "model.onnx: lacks its member"),
        (lambda members: members.update(more=b"x"), "holds 'more', which delta.json doesn't speak of"),
        (lambda members: members.update({"../../escaped": b"x"}), "leads out of its folder"),
        (with_plan(lambda files: files.update({"../escaped": files["report.json"]})), "leads out of its folder"),
        (with_plan(lambda files: files.update({"/escaped": files["report.json"]})), "leads out of its folder"),
        (with_plan(lambda files: files["model.onnx"].update(base="../../etc/passwd")), "which the old bundle lacks"),
        (with_plan(lambda files: files["model.onnx"].update(base_sha256="0" * 64)), "which the old bundle lacks"),
        (with_plan(lambda files: files["model.onnx"].update(size_bytes=1 << 50)), "would unpack to"),
        (with_plan(lambda files: files["model.onnx"].update(size_bytes=-1)), "has the size -1"),
        (with_plan(lambda files: files["report.json"].update(base="../../etc/passwd")), "which the old bundle lacks"),
        (with_plan(lambda files: files["golden/0/input_x.bin"].update(base=None)), "which the old bundle lacks"),
        (large_patch, "is larger than"),
        (with_plan(lambda files: files.update(notes=files["report.json"])), "notes: is not in the manifest"),
        (with_plan(lambda files: files.pop("README.md")), "README.md: is missing from the bundle"),
    )
    for change, problem in cases:
        cost = delta(old, new)
        tampered(cost.path, change)
        with pytest.raises(TamperedError, match=problem):
            apply_delta(open_bundle(old), cost.path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))


def test_descriptions_of_other_kinds_and_versions(old: Path, new: Path, tmp_path: Path) -> None:
    for text, problem in (
        ("{", "is not valid JSON"),
        ("[]", "is not the description of a delta"),
        ('{"kind": "edgeopt-delta", "schema_version": 2}', "has schema version 2"),
        ('{"kind": "edgeopt-delta", "schema_version": 1}', r"delta\.json: "),
    ):
        cost = delta(old, new)
        tampered(cost.path, lambda members, text=text: members.update({"delta.json": text.encode()}))
        with pytest.raises(UsageError, match=problem):
            apply_delta(open_bundle(old), cost.path, tmp_path / "out")
