"""`edgeopt export --apply-rewrites`: what the accelerator lacks is written otherwise, and the result is proven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgeopt
from edgeopt.compression.steps import Prune
from edgeopt.errors import UsageError
from edgeopt.sources import ModelSpec
from edgeopt.types import Bundle, TensorSpec

pytestmark = pytest.mark.e2e


def exported(folder: Path, **options: object) -> Bundle:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 4))
    net = nn.Sequential(*layers).eval()
    spec = ModelSpec(net, inputs=(TensorSpec("x", (1, 3, 16, 16), "float32", layout="NCHW"),), name="net")
    random = np.random.default_rng(0)
    data = [random.standard_normal((3, 16, 16)).astype(np.float32) for _ in range(12)]
    options = {"num_calibration_samples": 8, "output_dir": folder, **options}
    return edgeopt.export(spec, target="ethosu55-int8", calibration=data, **options)


def test_rewritten_operators_run_on_the_npu(tmp_path: Path) -> None:
    pytest.importorskip("ethosu")
    pytest.importorskip("tosa_reference_model")
    plain, rewritten = (exported(tmp_path / str(yes), apply_rewrites=yes) for yes in (False, True))
    assert plain.report.placement is not None
    assert rewritten.report.placement is not None
    assert plain.report.placement.on_cpu, "regression: the export failed on a GATHER_ND that moves something"
    assert rewritten.report.placement.on_cpu == ()
    (finding,) = (f for f in rewritten.report.findings if f.code == "rewrite")
    assert finding.where == "adaptive-pool"
    checks = {check.name: check for check in rewritten.report.checks}
    assert checks["source_sqnr_db"].passed, "the float twin is still the model that came in"
    assert rewritten.passed


def test_steps_and_rewrites_are_done_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("ethosu")
    with pytest.raises(UsageError, match="apply-rewrites: works on a model that no step changes"):
        exported(tmp_path, apply_rewrites=True, steps=(Prune(),), train=[np.zeros((3, 16, 16), np.float32)] * 4)
