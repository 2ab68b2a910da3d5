"""What a clumsy or hostile user meets: exit codes, one line, nothing half-written. Each case is its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.e2e

MODEL = """
import os, sys, time, torch
from torch import nn
def build(): torch.manual_seed(0); return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
def exits(): sys.exit(0)
def none(): return None
def needs(width): return nn.Linear(4, width)
def prints(): os.write(1, b"RAW\\n"); print("PRINTED"); return build()
def waits(): print("ready"); open("ready", "w").close(); time.sleep(60)
"""
TARGET = ("--target", "android-onnx-int8", "--min-speedup", "off")
INPUT = ("--input", "x=float32[1,4]")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=rows, label=np.arange(64) % 3)
    np.savez(tmp_path / "nan.npz", x=np.where(np.arange(64)[:, None] == 7, np.nan, rows).astype(np.float32))
    np.savez(tmp_path / "empty.npz", x=rows[:0])
    np.savez(tmp_path / "range.npz", x=rows, label=np.full(64, 77))
    np.savez(tmp_path / "shape.npz", x=rows[:, :3])
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "tmp").mkdir()
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "edgeopt", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), **environment},
            timeout=60,
        )

    return call


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in (*(folder / "tmp").glob("edgeopt-*"), *folder.glob("dist"))]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("net.py:exits", *INPUT), 2, "net.py:exits: the factory failed at net.py:5: SystemExit: 0"),
        (("net.py:none", *INPUT), 2, "net.py:none: returned a NoneType"),
        (("net.py:needs", *INPUT), 2, "net.py:needs: takes the arguments width"),
        (("net.py:bild", *INPUT), 2, "net.py:bild: has no factory 'bild'; did you mean 'build'?"),
        (("net.py:build", *INPUT, "--calibration", "empty.npz"), 2, "empty.npz: is empty"),
        (("net.py:build", *INPUT, "--calibration", "shape.npz"), 2, "input 'x': has shape (1, 3)"),
        (("net.py:build", *INPUT, "--evaluation", "nan.npz"), 2, "sample 'row 7', input 'x': holds NaN"),
        (("net.py:build", *INPUT, "--evaluation", "range.npz"), 2, "has label 77, but the model tells 3 classes"),
        (("net.py:build", *INPUT, "--output-dir", "net.py"), 2, "net.py: is not a directory"),
    ],
)
def test_one_line_its_code_and_nothing_left(
    run: Run, folder: Path, arguments: tuple[str, ...], code: int, line: str
) -> None:
    data = () if "--calibration" in arguments else ("--calibration", "data.npz")
    done = run("export", *arguments, *TARGET, *data, "--json")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    assert left_behind(folder) == []


def test_weights_that_would_run_code_do_not(run: Run, folder: Path) -> None:
    import pickle

    marker = folder / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {marker}",)

    (folder / "evil.pt").write_bytes(pickle.dumps(Malicious()))
    done = run("export", "net.py:build", *INPUT, "--weights", "evil.pt", *TARGET, "--calibration", "data.npz")
    assert done.returncode == 2
    assert "edgeopt runs no code from weights files" in done.stderr
    assert not marker.exists()


def test_standard_output_is_the_report_alone_and_a_tampered_bundle_is_refused(run: Run, folder: Path) -> None:
    arguments = ("net.py:prints", *INPUT, *TARGET, "--calibration", "data.npz", "--output-dir", "a b/ü")
    arguments += ("--min-speedup", "off")  # other tests run beside this one
    done = run("export", *arguments, "--json", TERM="dumb", COLUMNS="40", PYTHONOPTIMIZE="1")
    assert (done.returncode, done.stderr) == (0, "")
    bundle = json.loads(done.stdout)["bundles"][0]["path"]
    assert [path.name for path in (folder / "tmp").glob("edgeopt-*")] == []
    report = folder / bundle / "report.json"
    report.write_text(report.read_text().replace('"limit": 10.0', '"limit": 1.0'))
    done = run("validate", bundle)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {bundle}/report.json: was changed (its SHA-256 differs)\n"


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_leaves_nothing(folder: Path, number: signal.Signals, code: int, word: str) -> None:
    # A background job of a shell, CI's for example, starts with SIGINT ignored and hands that on.
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from edgeopt.cli import main
sys.exit(main(sys.argv[1:]))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, "export", "net.py:waits", *INPUT, *TARGET, "--calibration", "data.npz"],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (code, "", f"error: {word}\n")
    assert left_behind(folder) == []


def test_a_missing_package_is_named_with_the_command_that_brings_it(folder: Path) -> None:
    script = """
import sys
sys.modules["sklearn"] = sys.modules["onnxsim"] = None
from edgeopt.cli import main
sys.exit(main(sys.argv[1:]))
"""
    for arguments, line in [
        (("export", "--example", "digits"), "pip install 'edgeopt[examples]'\n"),
        (("export", "net.py:build", *INPUT, "--target", "android-onnx-fp32"), "pip install 'onnxsim>="),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=folder, timeout=60
        )
        assert done.returncode == 3, done.stderr
        assert line in done.stderr
        assert done.stderr.count("\n") == 1
