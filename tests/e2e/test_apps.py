"""The C++ and Python in a real bundle: built against the installed runtimes, they give edgeopt's own results."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle import open_bundle
from edgeopt.config import config_of
from edgeopt.native import IMPLEMENTATIONS
from edgeopt.pipeline import export
from edgeopt.runtimes import load_runtime
from edgeopt.types import Format

pytestmark = pytest.mark.e2e

TARGETS: dict[Format, str] = {
    "litert": "android-int8",
    "onnx": "android-onnx-int8",
    "executorch": "android-executorch-int8",
}
FACTORY = '''
import numpy as np
import torch
from edgeopt.sources import ModelSpec
from edgeopt.types import TensorSpec


class Net(torch.nn.Module):
    """Two inputs of different types, a dict of two outputs."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU6())
        self.embedding = torch.nn.Embedding(10, 16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, image, kind):
        maps = self.features(image)
        return {"class": self.head(maps.mean(dim=(2, 3)) + self.embedding(kind)), "maps": maps}


def build():
    torch.manual_seed(0)
    inputs = (TensorSpec("image", (1, 3, 8, 8), "float32"), TensorSpec("kind", (1,), "int64"))
    return ModelSpec(Net(), inputs=inputs, name="two-inputs", labels=("a", 'b"', "c\\\\", "ö"))


def data():
    random = np.random.default_rng(0)
    return [
        ({"image": random.normal(size=(3, 8, 8)).astype("float32"), "kind": random.integers(0, 10)}, k % 4)
        for k in range(16)
    ]
'''
USE = """
import sys
import numpy as np
import two_inputs as app

with np.load(sys.argv[1]) as given:
    output = app.TwoInputs().run(app.Input(**given))
np.savez(sys.argv[2], scores=output.class_, maps=output.maps, best=[k for k, _ in app.top(output)])
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    folder = tmp_path_factory.mktemp("apps")
    (folder / "net.py").write_text(FACTORY)
    config = config_of(
        {
            "model": f"{folder / 'net.py'}:build",
            "calibration": f"{folder / 'net.py'}:data",
            "target": list(TARGETS.values()),
            "float_twin": False,
            "min_speedup": "off",
            "output_dir": folder / "dist",
        }
    )
    made = {bundle.target: bundle.path for bundle in export(config)}
    return {format_: made[target] for format_, target in TARGETS.items()}


@pytest.fixture(params=TARGETS)
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Format, Path]:
    """A format, and the folder that its CMake option wants, made of the installed wheel."""
    format_: Format = request.param
    implementation = IMPLEMENTATIONS[format_]
    spec = find_spec(implementation.package)
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    if format_ != "onnx":
        return format_, package
    folder = tmp_path / "runtime"
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(request.getfixturevalue("onnxruntime_headers"))
    (library,) = package.glob(implementation.libraries[0])
    for name in ("libonnxruntime.so", implementation.soname or ""):
        (folder / "lib" / name).symlink_to(library)
    return format_, folder


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="no cmake or g++ on this machine")
def test_golden_vectors_in_cpp(bundles: dict[Format, Path], runtime: tuple[Format, Path], tmp_path: Path) -> None:
    format_, folder = runtime
    bundle, build = bundles[format_], tmp_path / "build"
    option = {"litert": "LITERT_DIR", "onnx": "ONNXRUNTIME_DIR", "executorch": "EXECUTORCH_DIR"}[format_]
    flags = "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"
    for command in (
        ["cmake", "-S", bundle / "cpp", "-B", build, f"-D{option}={folder}", flags],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = build / "golden_test"
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all outputs agree"), done.stdout + done.stderr

    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    output = changed / "golden" / "0" / "output_maps.bin"
    output.write_bytes(bytes(reversed(output.read_bytes())))
    assert subprocess.run([program, changed], capture_output=True, check=False).returncode == 1
    model = changed / open_bundle(bundle).manifest.model.file
    model.write_bytes(b"not a model")
    assert subprocess.run([program, changed], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("format_", TARGETS)
def test_python_gives_what_edgeopt_gives(bundles: dict[Format, Path], format_: Format, tmp_path: Path) -> None:
    bundle = open_bundle(bundles[format_])
    random = np.random.default_rng(7)
    given = {"image": random.normal(size=(1, 3, 8, 8)).astype(np.float32), "kind": np.array([3])}
    np.savez(tmp_path / "in.npz", **given)
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, tmp_path / "use.py", tmp_path / "in.npz", tmp_path / "out.npz"]
    environment = {"PYTHONPATH": str(bundle.path / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    runtime = load_runtime(bundle.target.runtimes[0])
    with runtime.open(bundle.model_path, bundle.signature) as session, np.load(tmp_path / "out.npz") as got:
        wanted = session.run(given)
        assert np.array_equal(got["scores"], wanted["class"])
        assert np.array_equal(got["maps"], wanted["maps"])
        order = np.argsort(-wanted["class"][0], kind="stable")
        assert got["best"].tolist() == [bundle.labels[k] for k in order]


@pytest.mark.parametrize("format_", TARGETS)
def test_golden_vectors_in_python(bundles: dict[Format, Path], format_: Format) -> None:
    script = bundles[format_] / "python" / "golden_test.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all outputs agree"), done.stdout + done.stderr
    open_bundle(bundles[format_])  # nothing was left in it
