"""Real exports of one model, layer by layer: against their float twins, and runtime against runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import load as load_onnx
from onnx import numpy_helper

from edgeopt.config import config_of
from edgeopt.debugging import Debugging, debug
from edgeopt.plan import load, open_data, plan_jobs
from edgeopt.progress import Silent
from edgeopt.types import EstimatorSpec, Format, LayerRules, Scheme
from edgeopt.workbench import Workbench

pytestmark = pytest.mark.e2e

FACTORY = '''
import numpy as np
import torch
from edgeopt.sources import ModelSpec
from edgeopt.types import TensorSpec
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.heat = nn.Parameter(torch.tensor([1.0, 2.0]).view(2, 1, 1))

    def heads(self, x):
        return x.view(1, -1, 2, 8).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        return (torch.softmax(q @ k.transpose(2, 3) * self.heat, -1) @ v).transpose(1, 2).reshape(1, -1, 16)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.Hardswish())
        self.project = nn.Conv2d(48, 16, 1)

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


class Net(nn.Module):
    """Convolutions, then attention over the pixels that are left."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
        self.block = Block()
        self.pool = nn.AvgPool2d(4)
        self.norm = nn.LayerNorm(16)
        self.attention = Attention()
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        maps = self.pool(self.block(self.stem(image)))
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        return self.head((tokens + self.attention(tokens)).mean(1))


def build():
    torch.manual_seed(0)
    return ModelSpec(Net(), inputs=(TensorSpec("image", (1, 3, 32, 32), "float32", "NCHW"),), name="net")


def data():
    random = np.random.default_rng(0)
    return [({"image": random.normal(size=(3, 32, 32)).astype("float32")}, k % 5) for k in range(24)]
'''

#: What every format has to show.
LAYERS = {
    "stem.0", "block.expand.0", "block.depthwise.0", "block.depthwise.1", "block.project", "attention", "head"
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    float: Path
    int8: Path


@pytest.fixture(scope="module")
def litert(workbench: Workbench) -> Files:
    return files(workbench, "litert")


@pytest.fixture(scope="module")
def onnx(workbench: Workbench) -> Files:
    return files(workbench, "onnx")


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("debug")
    source = folder / "net.py"
    source.write_text(FACTORY)
    config = config_of({"model": f"{source}:build", "calibration": f"{source}:data", "target": ["android-int8"]})
    model = load(config)
    data = open_data(config, model, plan_jobs(config))
    return Workbench(model, data.calibration, LayerRules(), 0, folder, Silent())


def files(workbench: Workbench, format_: Format) -> Files:
    scheme = Scheme("w8a8", "static")
    quantized, _ = workbench.quantized_artifact(format_, scheme, EstimatorSpec())
    return Files(workbench.float_artifact(format_).path, quantized.path)


def figures(result: Debugging) -> dict[str, float]:
    """Layer -> SQNR of its worst result."""
    found: dict[str, float] = {}
    for layer in result.layers:
        found[layer.layer] = min(layer.sqnr_db, found.get(layer.layer, layer.sqnr_db))
    return found


@pytest.mark.parametrize("format_", ["litert", "onnx"])
def test_every_layer_is_close_to_the_float_twin(format_: str, request: pytest.FixtureRequest) -> None:
    made: Files = request.getfixturevalue(format_)
    result = debug(made.float, made.int8)
    found = figures(result)
    assert found.keys() >= LAYERS
    assert min(found.values()) > 15
    assert result.first_divergence is None
    assert result.matched_by == "layer"
    assert result.instrumented_db_b == 200.0  # looking inside changed no bit of the answers


def test_runtime_against_runtime(litert: Files, onnx: Files) -> None:
    result = debug(litert.int8, onnx.int8)
    found = figures(result)
    assert found.keys() >= LAYERS
    assert len(result.layers) >= len(LAYERS) + 4  # query, key and value, and both products of the attention
    assert min(found.values()) > 15  # NHWC against NCHW, heads split off in one and not in the other
    assert {(layer.type_a, layer.type_b) for layer in result.layers} >= {("DEPTHWISE_CONV_2D", "Conv")}
    assert (result.runtime_a, result.runtime_b) == ("litert", "onnxruntime")


def test_a_damaged_layer_is_found(litert: Files, onnx: Files, tmp_path: Path) -> None:
    proto = load_onnx(onnx.int8)
    conv = next(n for n in proto.graph.node if n.name.startswith("block.depthwise.0/") and n.op_type == "Conv")
    decode = next(n for n in proto.graph.node if conv.input[1] in n.output)
    weight = next(i for i in proto.graph.initializer if i.name == decode.input[0])
    weight.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(weight), 1, axis=0), weight.name))
    (tmp_path / "damaged.onnx").write_bytes(proto.SerializeToString())
    result = debug(litert.int8, tmp_path / "damaged.onnx")
    assert result.first_divergence is not None
    assert result.layers[result.first_divergence.index].layer == "block.depthwise.0"


def test_a_file_without_names_is_matched_by_order(litert: Files, onnx: Files, tmp_path: Path) -> None:
    proto = load_onnx(onnx.int8)
    for i, node in enumerate(proto.graph.node):
        node.name = f"n{i}"
    (tmp_path / "stripped.onnx").write_bytes(proto.SerializeToString())
    result = debug(litert.int8, tmp_path / "stripped.onnx")
    assert result.matched_by == "order"
    assert figures(result)["stem.0"] > 15
    assert figures(result)["head"] > 15
