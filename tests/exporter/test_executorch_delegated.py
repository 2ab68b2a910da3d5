"""Rewrites and bookkeeping around the delegates, without lowering anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest, make_artifact
from edgeopt.exporter.executorch_coreml import CoreMLDelegateExporter, _deployment_target, _settle
from edgeopt.exporter.executorch_delegated import _layers_by_order, _round_to_float16, capture_model
from edgeopt.exporter.executorch_vulkan import VulkanExporter, _spell_attention_out
from edgeopt.formats.executorch_delegated import (
    COREML_MANIFEST,
    COREML_METADATA,
    COREML_MODEL,
    coreml_blob,
    coreml_files,
)
from edgeopt.types import LayerRules, Model, NeuralEngine, Scheme, Signature, TensorSpec, Vulkan


class Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, 2 * x, x + 1, **self.options)


def model_of(module: nn.Module, shape: tuple[int, ...]) -> Model:
    example = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    spec = TensorSpec("x", shape, "float32")
    return Model("net", module.eval(), None, (spec,), (spec,), {"x": example}, None, (), (), "0" * 64)


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}])
def test_attention_without_a_mask_is_spelt_out(options: dict[str, float]) -> None:
    model = model_of(Attention(**options), (1, 2, 5, 8))
    program = capture_model(model)
    _spell_attention_out(program)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("scaled_dot_product" in target for target in targets)
    x = torch.randn(1, 2, 5, 8)
    assert model.module is not None
    torch.testing.assert_close(program.module()(x), model.module(x))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": torch.zeros(5, 5)}])
def test_masked_attention_keeps_its_guard(options: dict[str, object]) -> None:
    program = capture_model(model_of(Attention(**options), (1, 2, 5, 8)))
    _spell_attention_out(program)
    assert any("scaled_dot_product" in str(node.target) for node in program.graph.nodes)


def test_every_tensor_is_rounded_and_the_model_s_own_are_not() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(1 + 2**-12)
    module = capture_model(model_of(layer, (1, 4))).module(check_guards=False)
    _round_to_float16(module)
    assert (layer.weight == 1 + 2**-12).all()
    x = torch.full((1, 4), 70_000.0)
    assert torch.isinf(module(x)).all()
    half = layer.weight.detach().half().float() @ torch.ones(4) + layer.bias.half().float()
    assert (module(torch.ones(1, 4))[0] == half.detach().half().float()).all()


def test_a_model_without_a_module() -> None:
    model = Model("net", None, None, (), (), {}, None, (), (), "0" * 64)
    with pytest.raises(ConversionError, match="made from a PyTorch module"):
        capture_model(model)


def test_layers_are_given_only_where_operators_can_be_told_apart() -> None:
    program = capture_model(model_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (1, 4)))
    nodes = [node for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    made = [
        (0, "et_vk.prepack.default"),
        (1, "aten.linear.default"),
        (2, "aten.relu.default"),
        (3, "aten.linear.default"),
    ]
    assert _layers_by_order(made, nodes) == {1: "0", 2: "1", 3: "2"}
    assert 1 not in _layers_by_order(made[:-1], nodes)


def package(identifier: str, entries: list[str], day: str) -> bytes:
    proto = pytest.importorskip("coremltools.proto.Model_pb2", reason="needs coremltools")
    model = proto.Model(specificationVersion=8)
    for key in ("b", "a", "com.github.apple.coremltools.conversion_date"):
        model.description.metadata.userDefined[key] = day if "date" in key else key
    names = {path: f"{identifier}{number}" for number, path in enumerate(entries)}
    manifest = {
        "itemInfoEntries": {names[path]: {"path": path} for path in entries},
        "rootModelIdentifier": names["model.mlmodel"],
    }
    return coreml_blob(
        {
            COREML_MODEL: model.SerializeToString(),
            COREML_MANIFEST: json.dumps(manifest).encode(),
            COREML_METADATA: json.dumps({"inputNames": ["x"], "identifier": identifier}).encode(),
        }
    )


def test_the_same_model_has_the_same_bytes_on_another_day() -> None:
    one = _settle(package("f00", ["weights", "model.mlmodel"], "2026-01-01"))
    two = _settle(package("ba5", ["model.mlmodel", "weights"], "2026-01-02"))
    assert one == two == _settle(one)
    files = coreml_files(one)
    manifest = json.loads(files[COREML_MANIFEST])
    assert manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] == "model.mlmodel"
    assert json.loads(files[COREML_METADATA])["inputNames"] == ["x"]


def test_another_model_has_another_identifier() -> None:
    blobs = [package("f00", entries, "2026-01-01") for entries in (["weights", "model.mlmodel"], ["model.mlmodel"])]
    changed = coreml_files(blobs[0]) | {"model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"other"}
    found = [json.loads(coreml_files(_settle(b))[COREML_METADATA]) for b in (blobs[0], coreml_blob(changed))]
    assert found[0]["identifier"] != found[1]["identifier"]


@pytest.mark.parametrize(("ios", "name"), [(13, "iOS15"), (17, "iOS17"), (19, "iOS18"), (99, "iOS26")])
def test_deployment_target_is_no_newer_than_the_device(ios: int, name: str) -> None:
    coremltools = pytest.importorskip("coremltools", reason="needs coremltools")
    assert _deployment_target(ios) == coremltools.target[name] or ios == 99


@pytest.mark.parametrize("exporter", [VulkanExporter(), CoreMLDelegateExporter()], ids=["vulkan", "coreml"])
def test_a_scheme_that_they_do_not_have_is_refused(exporter: VulkanExporter, tmp_path: Path) -> None:
    file = tmp_path / "model_fp32.pte"
    file.write_bytes(b"x")
    twin = make_artifact(
        file, format_="executorch", precision="fp32", signature=Signature((), ()), history=(), tools=()
    )
    request = QuantizationRequest(Scheme("w8", "none", npu=Vulkan()), None)
    with pytest.raises(ConversionError, match="fp16 or fp32"):
        exporter.export_quantized(model_of(nn.ReLU(), (1, 4)), twin, request, tmp_path)
    layers = LayerRules(keep_float=("head",))
    scheme = Scheme("fp16", "none", npu=NeuralEngine("A17 Pro", 16, 17))
    assert "one precision" in (exporter.unsupported(scheme, layers) or "")
