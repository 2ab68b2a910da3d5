"""The memory that an export takes, by the size of the network: no more than it was measured to be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc"),
]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: What is done for large networks only, here for one of 75 MB, so that the test is done in seconds.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from edgeopt import workbench
from edgeopt.exporter import litert_convert, onnx_aside
litert_convert.LARGE = onnx_aside.LARGE = workbench.LARGE = 1 << 20
import seq2seq_scale
seq2seq_scale.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


@pytest.mark.parametrize(
    ("target", "limit"),
    # Measured: 3.7, 3.9 and 4.8; docs/scale.md says why it is not below 3.
    [("android-int8-dynamic", 5.0), ("android-executorch-int8-dynamic", 5.5), ("android-onnx-fp32", 6.5)],
)
def test_peak_memory_is_no_more_than_was_measured(work: Path, target: str, limit: float) -> None:
    figures = work / f"{target}.json"
    options = ["--scale", "small", "--work", str(work), "--parts", "decoder", "--no-timing", "--json", str(figures)]
    command = [sys.executable, "-c", SCRIPT, str(BENCHMARKS), target, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(figures.read_text())
    assert outcome["weights_bytes"] > 70e6
    assert outcome["growth"] < limit, done.stdout
