"""Real torch models through the ONNX exporter and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.onnx import OnnxExporter
from edgeopt.formats import summarize
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.types import Array, Dim, EstimatorSpec, Finding, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

BATCH = Dim("batch", 1, 8)


class Wrapper(nn.Module):
    """As the sources hand models on: positional inputs, the user's module under one attribute."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.edgeopt_model = module

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.edgeopt_model(*inputs)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1), nn.Hardsigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.block = nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU6(), SqueezeExcite(16),
            nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor] | tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        x = x + self.block(x)
        features = x.mean((2, 3))
        return self.head(features), features


def make(
    name: str, module: nn.Module, inputs: dict[str, Array], dynamic: dict[str, dict[int, Dim]], outputs: list[str]
) -> Model:
    def spec(key: str, value: Array) -> TensorSpec:
        shape = tuple(dynamic.get(key, {}).get(i, n) for i, n in enumerate(value.shape))
        return TensorSpec(key, shape, value.dtype.name)

    return Model(
        name=name,
        module=Wrapper(module).eval(),
        native=None,
        inputs=tuple(spec(k, v) for k, v in inputs.items()),
        outputs=tuple(TensorSpec(o, (BATCH,), "float32") for o in outputs),
        example_inputs=inputs,
        preprocessing=None,
        labels=(),
        history=(),
        source_sha256="0" * 64,
    )


def mobilenet() -> Model:
    torch.manual_seed(0)
    module = MobileNet()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    image = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    return make("mobile", module, {"image": image}, {"image": {0: BATCH}}, ["logits", "features"])


class BertOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=64,
        )  # fmt: skip
        self.bert = transformers.BertModel(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask)
        return out.last_hidden_state, out.pooler_output


def bert() -> Model:
    torch.manual_seed(0)
    module = BertOutputs()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    ids = np.random.default_rng(0).integers(0, 500, (1, 12))
    axes = {0: BATCH, 1: Dim("sequence", 1, 64)}
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return make("bert", module, inputs, {"input_ids": axes, "attention_mask": axes}, ["hidden", "pooled"])


def request(model: Model, scheme: Scheme, keep: tuple[str, ...] = ()) -> QuantizationRequest:
    def stream() -> Iterator[Sample]:
        rng = np.random.default_rng(1)
        for i in range(4):
            yield Sample({k: fresh(v, rng) for k, v in model.example_inputs.items()}, None, f"row {i}")

    def ignore(finding: Finding) -> None:
        del finding

    run = CalibrationRun(stream, 4, EstimatorSpec(), ignore) if scheme.needs_calibration else None
    return QuantizationRequest(scheme, run, LayerRules(keep))


def fresh(value: Array, rng: np.random.Generator) -> Array:
    if value.dtype == np.float32:
        return rng.standard_normal(value.shape).astype(np.float32)
    return np.ones_like(value) if (value == 1).all() else rng.integers(0, 500, value.shape)


def sqnr(reference: Array, other: Array) -> float:
    noise = ((reference.astype(np.float64) - other) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(float(noise), 1e-30)))


def torch_outputs(model: Model, inputs: Mapping[str, Array]) -> list[Array]:
    assert model.module is not None
    with torch.no_grad():
        return [o.numpy() for o in model.module(*(torch.from_numpy(inputs[t.name]) for t in model.inputs))]


@pytest.mark.parametrize("build", [mobilenet, bert])
def test_float_and_every_scheme(tmp_path: Path, build: object) -> None:
    model = build()
    exporter, runtime = OnnxExporter(), OnnxRuntime()
    twin = exporter.export_float(model, tmp_path)
    # Three of everything that is dynamic; the example had one.
    inputs = {k: np.repeat(v, 3, axis=0) for k, v in model.example_inputs.items()}
    expected = torch_outputs(model, inputs)
    with runtime.open(twin.path, twin.signature) as session:
        got = session.run(inputs)
        assert [o.name for o in model.outputs] == list(got)
        for want, have in zip(expected, got.values(), strict=True):
            assert sqnr(want, have) > 90
    for scheme, floor in (
        (Scheme("w8a8", "static"), 25),
        (Scheme("w8a8", "static", io="int8"), 20),
        (Scheme("w8a8", "dynamic"), 25),
        (Scheme("fp16", "none"), 45),
        (Scheme("w8a16", "static"), 30),
        (Scheme("w8a8", "static", weight_symmetric=False), 25),
        (Scheme("w8a8", "static", scale="power-of-two"), 20),
        (Scheme("w8", "none"), 35),
        (Scheme("w8", "none", "per-tensor", weight_values="k-means"), 30),
        (Scheme("w4", "none", "per-group", weight_symmetric=False, weight_estimator="hqq"), 15),
        (Scheme("8da4w", "dynamic", "per-group"), 15),
        (Scheme("w8a8", "dynamic", "per-group", weight_estimator="mse"), 25),
    ):
        if scheme.io == "int8" and model.name == "bert":
            continue
        artifact = exporter.export_quantized(model, twin, request(model, scheme), tmp_path)
        with runtime.open(artifact.path, artifact.signature) as session:
            for want, have in zip(expected, session.run(inputs).values(), strict=True):
                assert sqnr(want, have) > floor, (scheme, want.shape)


def test_every_weight_of_a_language_model_is_small(tmp_path: Path) -> None:
    model = bert()
    twin = OnnxExporter().export_float(model, tmp_path)
    sizes = {}
    for precision, activations in (("w8", "none"), ("w4", "none"), ("8da4w", "dynamic")):
        wanted = request(model, Scheme(precision, activations, "per-group"))
        artifact = OnnxExporter().export_quantized(model, twin, wanted, tmp_path)
        sizes[precision] = artifact.size_bytes
        left = {op.name for op in artifact.unquantized_ops if op.type in ("MatMul", "Gemm", "Gather")}
        # Two products of attention have no weights; the table of two token types is too small.
        assert all("MatMul" in name or "token_type" in name for name in left), left
    assert sizes["w8"] < 0.4 * twin.size_bytes
    assert sizes["w4"] < 0.28 * twin.size_bytes
    assert sizes["8da4w"] < 0.28 * twin.size_bytes


def test_learned_ranges_reach_the_file(tmp_path: Path) -> None:
    model = mobilenet()
    learned = replace(model, input_ranges={"stem.0": (-4.0, 4.0), "head": (0.0, 2.0)})
    twin = OnnxExporter().export_float(model, tmp_path)
    plain = OnnxExporter().export_quantized(model, twin, request(model, Scheme("w8a8", "static")), tmp_path)
    other = OnnxExporter().export_quantized(learned, twin, request(model, Scheme("w8a8", "static")), tmp_path)
    assert plain.sha256 != other.sha256
    scales = [
        float(numpy_helper.to_array(i)) for i in onnx.load(other.path).graph.initializer if i.name[:6] == "scale_"
    ]
    assert any(np.isclose(scale, 8 / 255) for scale in scales)
    assert any(np.isclose(scale, 2 / 255) for scale in scales)


def test_mobile_network_is_int8_throughout_and_named_by_layer(tmp_path: Path) -> None:
    model = mobilenet()
    twin = OnnxExporter().export_float(model, tmp_path)
    artifact = OnnxExporter().export_quantized(model, twin, request(model, Scheme("w8a8", "static")), tmp_path)
    assert artifact.unquantized_ops == ()
    types = {op.name: op.type for op in summarize(twin.path).ops}
    # The batch-norm is folded, and the convolution keeps its own name rather than the batch-norm's.
    assert types["stem.0/Conv"] == "Conv"
    assert "BatchNormalization" not in types.values()
    assert "Pad" not in types.values()
    assert b"Traceback" not in twin.path.read_bytes()
    assert b".py" not in twin.path.read_bytes()


def test_keep_float_by_layer(tmp_path: Path) -> None:
    model = mobilenet()
    twin = OnnxExporter().export_float(model, tmp_path)
    wanted = request(model, Scheme("w8a8", "static"), ("stem.0", "head"))
    artifact = OnnxExporter().export_quantized(model, twin, wanted, tmp_path)
    kept = {op.name for op in artifact.unquantized_ops if op.reason == "exempted by --keep-float"}
    assert kept == {"stem.0/Conv", "head/Gemm"}


def test_same_bytes_twice(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        model = mobilenet()
        twin = OnnxExporter().export_float(model, directory)
        artifact = OnnxExporter().export_quantized(model, twin, request(model, Scheme("w8a8", "static")), directory)
        hashes.append((twin.sha256, artifact.sha256))
    assert hashes[0] == hashes[1]


class OddLayer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.edgeopt_test.odd(x)


def test_unknown_operator_is_named_with_its_layer(tmp_path: Path) -> None:
    with torch.library._scoped_library("edgeopt_test", "FRAGMENT") as library:
        library.define("odd(Tensor x) -> Tensor")
        library.impl("odd", lambda x: x.clone(), "CompositeExplicitAutograd")
        library.impl("odd", torch.empty_like, "Meta")
        net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(OddLayer()))
        model = make("odd", net, {"x": np.zeros((1, 4), np.float32)}, {}, ["y"])
        with pytest.raises(ConversionError, match=r"layer '1\.0'.*edgeopt_test\.odd can't be converted to ONNX"):
            OnnxExporter().export_float(model, tmp_path)
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_control_flow_on_data_is_a_conversion_error(tmp_path: Path) -> None:
    model = make("branching", Branching(), {"x": np.zeros((2, 4), np.float32)}, {}, ["y"])
    with pytest.raises(ConversionError, match="branching: torch\\.export can't trace it"):
        OnnxExporter().export_float(model, tmp_path)
