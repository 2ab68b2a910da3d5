"""`device/` as it stands in a bundle."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from edgeopt.bundle.apps import cpp
from edgeopt.bundle.device_check import write_device_check
from edgeopt.bundle.manifest import KIND, SCHEMA_VERSION, Manifest, ModelFile
from edgeopt.native import IMPLEMENTATIONS
from edgeopt.targets import load_target
from edgeopt.types import Format, Signature


def manifest(format_: Format) -> Manifest:
    target = load_target("linux-arm64-onnx-fp32")
    model = ModelFile("model.onnx", "fp32", Signature((), ()))
    return Manifest(
        SCHEMA_VERSION, KIND, "net", target.name, "raspberry-pi-5", "passed", format_, "fp32", model, None, None, (),
        (), 0.1, (), "0" * 64, {}, target, {},
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format_", sorted(IMPLEMENTATIONS))
def test_the_check_and_what_builds_its_runner(tmp_path: Path, format_: Format) -> None:
    for name in ("a", "b"):
        write_device_check(manifest(format_), tmp_path / name)
    files = contents(tmp_path / "a")
    assert files == contents(tmp_path / "b")
    assert {"device/check", "device/devicecheck/on_device.sh", "device/runner/main.cpp"} <= files.keys()
    assert not any(name.endswith((".pyc", ".toml")) for name in files)
    sources = {source for other, i in IMPLEMENTATIONS.items() if other != format_ for source in [i.source]}
    assert not {f"device/runner/{source}" for source in sources} & files.keys()
    assert b"@" not in files["device/runner/build.sh"].replace(b'"$@"', b"")
    # Every header that a source asks for in quotes is there.
    for name, text in files.items():
        if name.endswith((".cpp", ".hpp")):
            for line in text.decode().splitlines():
                if line.startswith('#include "'):
                    assert f"device/runner/{line.split(chr(34))[1]}" in files, line


def test_scripts_start(tmp_path: Path) -> None:
    write_device_check(manifest("litert"), tmp_path)
    assert (tmp_path / "device/check").stat().st_mode & 0o111
    for words in (["device/check", "--help"], ["device/runner/build.sh", "--help"]):
        done = subprocess.run(["sh", *words], cwd=tmp_path, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout.startswith("usage:")) == (0, True), done.stderr
    done = subprocess.run(["sh", "device/check", "--threads", "0"], cwd=tmp_path, capture_output=True, timeout=20)
    assert done.returncode == 2
    words = ["device/check", "--output", "nowhere/report.json"]
    done = subprocess.run(["sh", *words], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (
        2, "error: nowhere/report.json can't be written; name another place with --output\n",
    )  # fmt: skip


def test_what_the_app_has_is_not_there_twice_and_still_built(tmp_path: Path) -> None:
    """A stand-in for the compiler writes down what it is given."""
    made = manifest("litert")
    for name, text in cpp.files(made).items():
        (tmp_path / "cpp").mkdir(exist_ok=True)
        (tmp_path / "cpp" / name).write_text(text)
    write_device_check(made, tmp_path)
    runner = tmp_path / "device/runner"
    assert not {path.name for path in runner.iterdir()} & {path.name for path in (tmp_path / "cpp").iterdir()}
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs/libLiteRt.so").touch()
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"""#!/bin/sh
[ "$1" = -dumpmachine ] && echo aarch64-linux-gnu && exit
printf '%s\\n' "$@" >{tmp_path}/words
"""
    )
    compiler.chmod(0o755)
    words = ["--libraries", str(tmp_path / "libs"), "--include", "a b", "--output", str(tmp_path / "o u t")]
    done = subprocess.run(
        ["sh", str(runner / "build.sh"), *words], env={**os.environ, "CXX": str(compiler)}, capture_output=True,
        text=True, timeout=20,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/o u t/edgeopt-runner\n"), done.stderr
    given = (tmp_path / "words").read_text().splitlines()
    assert {"a b", f"{runner}/../../cpp/litert.cpp", f"{runner}/main.cpp", f"{tmp_path}/o u t/libLiteRt.so"} <= {*given}
    done = subprocess.run(
        ["sh", str(runner / "build.sh"), "--libraries"], env={**os.environ, "CXX": str(compiler)}, capture_output=True,
        text=True, timeout=20,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: --libraries lacks its value\n")


def test_no_check_where_it_could_not_run(tmp_path: Path) -> None:
    onnx = manifest("onnx")
    accelerated = replace(onnx, target_definition=replace(onnx.target_definition, accelerator="hexagon"))
    emulated = replace(onnx, model=replace(onnx.model, emulation="emulation/model.tosa"))
    assert set(get_args(Format)) - set(IMPLEMENTATIONS) == {"coreml"}
    for other in (manifest("coreml"), accelerated, emulated):
        write_device_check(other, tmp_path)
        assert not list(tmp_path.iterdir())
