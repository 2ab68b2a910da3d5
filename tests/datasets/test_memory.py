"""Peak memory does not grow with the number of samples."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeopt.datasets import open_dataset, select
from edgeopt.types import TensorSpec

KIB = 1024

Case = tuple[str, tuple[TensorSpec, ...]]


def compressed(path: Path, count: int) -> Case:
    np.savez_compressed(path / "d.npz", x=np.zeros((count, 4096), np.float32), y=np.zeros(count, np.int64))
    return str(path / "d.npz"), (TensorSpec("x", (1, 4096), "float32"),)


def stored(path: Path, count: int) -> Case:
    np.savez(path / "d.npz", x=np.zeros((count, 4096), np.float32), y=np.zeros(count, np.int64))
    return str(path / "d.npz"), (TensorSpec("x", (1, 4096), "float32"),)


def pictures(path: Path, count: int) -> Case:
    for i in range(count):
        Image.new("RGB", (64, 64), (i % 256, 0, 0)).save(path / f"{i}.bmp")
    return str(path), (TensorSpec("x", (1, 3, 32, 32), "float32", "NCHW"),)


def json_lines(path: Path, count: int) -> Case:
    line = json.dumps({"x": [0.5] * 512, "label": 1}) + "\n"
    (path / "d.jsonl").write_text(line * count)
    return str(path / "d.jsonl"), (TensorSpec("x", (1, 512), "float32"),)


def stream(path: Path, count: int) -> Case:
    (path / "s.py").write_text(
        f"import numpy as np\ndef data():\n    for i in range({count}): yield np.zeros(4096, 'float32'), 1\n"
    )
    return f"{path}/s.py:data", (TensorSpec("x", (1, 4096), "float32"),)


@pytest.mark.parametrize("make", [compressed, stored, pictures, json_lines, stream])
def test_peak_of_a_pass_and_a_fingerprint(tmp_path: Path, make: Callable[[Path, int], Case]) -> None:
    peaks = []
    for count in (60, 60, 600):
        folder = tmp_path / f"{len(peaks)}"
        folder.mkdir()
        spec, inputs = make(folder, count)
        tracemalloc.start()
        dataset = open_dataset(spec, inputs, None)
        for sample in select(dataset, count // 2, 0):
            del sample
        for sample in dataset:
            del sample
        dataset.fingerprint()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first pass warms imports and caches up. 540 more samples cost their names and indices, not their 16 KiB each.
    assert peaks[2] < peaks[1] + 540 * 512, peaks


def test_resident_memory_of_a_compressed_archive(tmp_path: Path) -> None:
    """Also what tracemalloc can't see: mapped pages, buffers of libraries."""
    # VmHWM, since ru_maxrss survives exec: a child of a large test process starts with that process's peak.
    code = """
import re, sys
from pathlib import Path
from edgeopt.datasets import open_dataset
from edgeopt.types import TensorSpec
for sample in open_dataset(sys.argv[1], (TensorSpec("x", (1, 4096), "float32"),), None):
    pass
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    peaks = []
    for count in (16, 4096):  # 0.25 and 64 MiB once unpacked
        folder = tmp_path / str(count)
        folder.mkdir()
        spec, _ = compressed(folder, count)
        done = subprocess.run([sys.executable, "-c", code, spec], check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 8 * KIB, peaks


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    spec, inputs = compressed(tmp_path, 4)
    dataset = open_dataset(spec, inputs, None)
    assert list(scratch.iterdir()) == []
    assert dataset[3].inputs["x"].shape == (1, 4096)
