"""check.py runs real files of the formats whose runtimes need a converter to make one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

X = np.array([[1.0, -2.0, 3.0]], np.float32)


def lay_out(folder: Path, model: bytes, format_: str, suffix: str, native: tuple[str, str], y: np.ndarray) -> Path:
    """The parts of a bundle that check.py reads, around a real model file."""
    arrays = {"x.bin": X, "y.bin": y}
    for name, array in arrays.items():
        (folder / name).write_bytes(array.astype("<f4").tobytes())
    (folder / f"model{suffix}").write_bytes(model)
    stored = {n: {"file": n, "shape": list(a.shape), "dtype": "float32"} for n, a in arrays.items()}
    manifest = {
        "format": format_,
        "model": {
            "file": f"model{suffix}",
            "signature": {
                "inputs": [{"name": "x", "native_name": native[0]}],
                "outputs": [{"name": "y", "native_name": native[1]}],
            },
        },
        "golden_tolerance": 1e-3,
        "golden": [{"inputs": {"x": stored["x.bin"]}, "outputs": {"y": stored["y.bin"]}}],
        "files": {
            p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in folder.iterdir() if p.is_file()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    script = resources.files("edgeopt.bundle").joinpath("templates", "check.py").read_bytes()
    (folder / "check.py").write_bytes(script)
    return folder / "check.py"


def run(script: Path) -> int:
    return subprocess.run([sys.executable, "-I", str(script)], check=False, capture_output=True).returncode


@pytest.mark.e2e
@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_executorch(tmp_path: Path, factor: float) -> None:
    import torch
    from executorch.exir import to_edge_transform_and_lower

    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    program = to_edge_transform_and_lower(torch.export.export(Doubling(), (torch.zeros(1, 3),))).to_executorch()
    script = lay_out(tmp_path, program.buffer, "executorch", ".pte", ("in", "out"), X * factor)
    assert run(script) == (0 if factor == 2.0 else 1)


@pytest.mark.e2e
@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_litert(tmp_path: Path, factor: float) -> None:
    import litert_torch
    import torch

    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    litert_torch.convert(Doubling().eval(), (torch.zeros(1, 3),)).export(str(tmp_path / "made.tflite"))
    model = (tmp_path / "made.tflite").read_bytes()
    (tmp_path / "made.tflite").unlink()
    script = lay_out(tmp_path, model, "litert", ".tflite", ("args_0", "output_0"), X * factor)
    assert run(script) == (0 if factor == 2.0 else 1)
