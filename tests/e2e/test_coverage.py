"""Coverage of a real network: files are made, compilers asked, rewrites applied."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeopt.config import RunConfig
from edgeopt.coverage import coverage
from edgeopt.coverage_values import Cell
from edgeopt.errors import UsageError
from edgeopt.pipeline import export
from edgeopt.progress import Silent
from edgeopt.sources import ModelSpec
from edgeopt.types import Array, TensorSpec

pytestmark = pytest.mark.e2e

SHAPE = (1, 3, 16, 16)
GATES = frozenset({"max_accuracy_drop", "min_agreement", "min_sqnr_db", "min_speedup"})
needs_vela = pytest.mark.skipif(find_spec("ethosu") is None, reason="vela is not installed (edgeopt[ethos-u])")


class Net(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 1), nn.GELU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.pool(self.body(x)).mean((2, 3)))
        return result


def config(*targets: str, pool: nn.Module | None = None) -> RunConfig:
    torch.manual_seed(0)
    spec = TensorSpec("x", SHAPE, "float32", "NCHW")
    return RunConfig(
        model=ModelSpec(module=Net(pool or nn.Identity()).eval(), inputs=(spec,), name="net"), target=targets
    )


def samples() -> list[dict[str, Array]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal(SHAPE[1:]).astype(np.float32)} for _ in range(8)]


def test_cpu_target_and_unknown_one() -> None:
    report = coverage(config("android-int8"), Silent())
    (target,) = report.targets
    assert target.problem is None
    rows = {row.name: row.cells.get("android-int8") for row in report.rows}
    assert rows["Conv2d"] == Cell(2, 2)
    assert rows["LeakyReLU"] == Cell(0, 1)
    assert report.fallbacks[0].type == "LEAKY_RELU"
    with pytest.raises(UsageError, match="android-int9"):
        coverage(config("android-int9"), Silent())


@needs_vela
def test_rewrites_bring_everything_to_the_npu() -> None:
    pooled = config("ethosu55-int8", "android-int8", pool=nn.AdaptiveAvgPool2d(3))
    report = coverage(pooled, Silent(), rewrite=True)
    before = report.targets[0]
    assert before.placement is not None
    assert before.on_cpu
    assert "adaptive-pool" in report.recommended
    assert report.after is not None
    assert report.after.targets[0].on_cpu == 0
    for outcome in report.outcomes:
        assert outcome.applied.sqnr_db is not None
        assert outcome.applied.sqnr_db >= outcome.applied.min_sqnr_db


@needs_vela
def test_exported_file_is_only_read(tmp_path: Path) -> None:
    exported = export(replace(config("android-int8"), output_dir=tmp_path, calibration=samples(), gates_off=GATES))
    file = next(exported[0].path.glob("*.tflite"))
    content = file.read_bytes()
    report = coverage(RunConfig(model=str(file), target=("ethosu55-int8", "openvino-int8")), Silent())
    assert file.read_bytes() == content
    npu, other = report.targets
    assert npu.placement is not None
    assert {op.type for op in npu.placement.on_cpu} >= {"GELU"}
    assert other.problem == "can't convert: takes onnx files, and this is litert"
