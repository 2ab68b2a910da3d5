"""Times of files for an accelerator: what its compiler says, in place of an emulator's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.accelerators.base import Compiled
from edgeopt.errors import UsageError
from edgeopt.tuning import estimates, timing
from edgeopt.tuning.estimates import estimate, is_emulated
from edgeopt.tuning.timing import time_together
from edgeopt.types import Artifact, EthosU, Measurement, Npu, OpPlacement, OpTiming, Placement, Sample, Signature

NPU = EthosU("ethos-u55", 128, 500, "system", "mode", 1 << 20, 1 << 20)
SAMPLE = Sample({"x": np.zeros(1, np.float32)}, None, "0")


class Compiler:
    """Tells one millisecond per byte of the file, or nothing."""

    tells = True

    def unavailable(self) -> str | None:
        return None

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        assert directory.is_dir()
        ops = (OpPlacement("conv", "CONV_2D", "accelerator", ms=1.5), OpPlacement("erf", "ERF", "cpu"))
        told = Measurement("latency_ms", "quantized", float(artifact.size_bytes), "ms", "estimated", npu.kind)
        return Compiled(artifact, Placement("NPU", "it", False, ops), (told,) if self.tells else ())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(estimates, "load_accelerator", lambda *_: made)
    return made


def artifact(size: int) -> Artifact:
    path = Path("model.tflite")
    return Artifact(path, "litert", "w8a8", Signature((), ()), size, "0" * 64, (), {}, (), emulation=path)


@pytest.mark.usefixtures("compiler")
def test_files_are_estimated_and_never_run() -> None:
    timed = time_together([artifact(4), artifact(2)], "litert", SAMPLE, 1, npu=NPU)
    assert [(t.ms, t.ratio, t.spread) for t in timed] == [(4.0, 1.0, (4.0, 4.0)), (2.0, 0.5, (2.0, 2.0))]


@pytest.mark.usefixtures("compiler")
def test_operators_have_times_where_the_compiler_tells_them() -> None:
    assert estimate(artifact(3), NPU).operators == (OpTiming("conv", "CONV_2D", 1.5),)


def test_what_nobody_can_tell_is_refused_with_what_to_aim_at(compiler: Compiler) -> None:
    compiler.tells = False
    assert estimate(artifact(3), NPU).ms is None
    with pytest.raises(UsageError, match="no tool on this machine can tell the latency on ethos-u55; aim at macs"):
        time_together([artifact(3)], "litert", SAMPLE, 1, npu=NPU)


def test_files_that_run_as_on_the_device_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(artifact(3), emulation=None)
    assert not is_emulated([plain], "litert")
    monkeypatch.setattr(timing, "run_worker", lambda _: (_ for _ in ()).throw(KeyError("timed")))
    with pytest.raises(KeyError, match="timed"):
        time_together([plain], "litert", SAMPLE, 1, npu=NPU)
