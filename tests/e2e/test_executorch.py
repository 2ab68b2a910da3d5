"""Real conversions to ExecuTorch, run in its own runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.formats import summarize
from edgeopt.formats.executorch_probe import add_probes
from edgeopt.runtimes.executorch import ExecuTorchRuntime
from edgeopt.types import Array, Artifact, Dim, EstimatorSpec, LayerRules, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e

STATIC = Scheme("w8a8", "static")
DYNAMIC = Scheme("w8a8", "dynamic")


class ConvNet(nn.Module):
    """Residual, squeeze-excite, hardswish, ReLU6, asymmetric padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.depthwise = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 16, 3, 2, groups=16), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.relu6(x + self.project(x * gate))
        return self.head(x.mean((2, 3)))


class Several(nn.Module):
    """Two inputs, one of them ids, and three outputs, one of them integer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embedding, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = F.relu(self.conv(x))
        return self.head(features.mean((2, 3)) + self.embedding(ids)), features, ids + 1


def make(module: nn.Module, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], example: dict) -> Model:
    return Model("net", module.eval(), None, inputs, outputs, example, None, (), (), "0" * 64)


def run_of(samples: list[dict[str, Array]]) -> CalibrationRun:
    return CalibrationRun(
        lambda: iter([Sample(s, None, "") for s in samples]), len(samples), EstimatorSpec(), lambda _: None
    )


def outputs_of(artifact: Artifact, samples: list[dict[str, Array]], name: str) -> Array:
    with ExecuTorchRuntime().open(artifact.path, artifact.signature) as session:
        return np.concatenate([session.run(s)[name] for s in samples])


def sqnr(reference: Array, values: Array) -> float:
    return 10 * float(np.log10((reference**2).sum() / max(((reference - values) ** 2).sum(), 1e-30)))


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    return [{"image": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(16)]


@pytest.fixture(scope="module")
def convnet(samples: list[dict[str, Array]]) -> Model:
    torch.manual_seed(0)
    image = TensorSpec("image", (1, 3, 32, 32), "float32", "NCHW")
    return make(ConvNet(), (image,), (TensorSpec("logits", (1, 10), "float32"),), samples[0])


@pytest.fixture(scope="module")
def convnet_float(convnet: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return ExecuTorchExporter().export_float(convnet, tmp_path_factory.mktemp("float"))


def test_float_equals_torch(convnet: Model, convnet_float: Artifact, samples: list[dict[str, Array]]) -> None:
    assert convnet.module is not None
    with torch.no_grad():
        expected = np.concatenate([convnet.module(torch.tensor(s["image"])).numpy() for s in samples])
    np.testing.assert_allclose(outputs_of(convnet_float, samples, "logits"), expected, atol=1e-5)
    assert all(op.delegate for op in summarize(convnet_float.path).ops if op.type.startswith("aten."))
    assert set(convnet_float.tools) == {"torch", "executorch", "torchao"}


@pytest.mark.parametrize(
    "scheme", [STATIC, Scheme("w8a8", "static", "per-tensor", True), Scheme("w8a8", "static", io="int8")], ids=str
)
def test_static(
    convnet: Model, convnet_float: Artifact, samples: list[dict[str, Array]], tmp_path: Path, scheme: Scheme
) -> None:
    request = QuantizationRequest(scheme, run_of(samples))
    artifact = ExecuTorchExporter().export_quantized(convnet, convnet_float, request, tmp_path)
    reference = outputs_of(convnet_float, samples, "logits")
    assert sqnr(reference, outputs_of(artifact, samples, "logits")) > 35
    ops = summarize(artifact.path).ops
    assert {op.dtype for op in ops if "Conv2d" in op.type or op.type == "FullyConnected"} == {"int8"}
    # Hardswish and the gate's hardsigmoid have no int8 kernel; nothing else computes in float, and they are reported.
    assert {op.name.split("/")[0] for op in artifact.unquantized_ops} == {
        "stem.3",
        "Add_0",
        "Clamp_0",
        "Clamp_1",
        "Div_0",
    }
    assert "no int8 kernel for Hardswish" in artifact.unquantized_ops[0].reason
    (image,), (logits,) = artifact.signature.inputs, artifact.signature.outputs
    assert image.dtype == ("int8" if scheme.io == "int8" else "float32")
    assert (logits.quantization is not None) == (scheme.io == "int8")


def test_bytes_are_reproducible_and_tell_no_paths(
    convnet: Model, convnet_float: Artifact, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    request = QuantizationRequest(STATIC, run_of(samples), rules=LayerRules(("stem",)))
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.append(ExecuTorchExporter().export_quantized(convnet, convnet_float, request, tmp_path / name))
    assert results[0].sha256 == results[1].sha256
    data = results[0].path.read_bytes()
    assert str(tmp_path).encode() not in data
    assert str(Path.cwd()).encode() not in data
    kept = [op for op in results[0].unquantized_ops if op.name.startswith("stem.1/")]
    assert [op.reason for op in kept] == ["kept in float as asked"]


def test_dynamic_quantizes_the_linear_layers(
    convnet: Model, convnet_float: Artifact, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    artifact = ExecuTorchExporter().export_quantized(
        convnet, convnet_float, QuantizationRequest(DYNAMIC, None), tmp_path
    )
    assert sqnr(outputs_of(convnet_float, samples, "logits"), outputs_of(artifact, samples, "logits")) > 35
    assert {op.dtype for op in summarize(artifact.path).ops if op.type == "FullyConnected"} == {"int8"}
    assert any(op.name.startswith("project/Conv2d") for op in artifact.unquantized_ops)


def test_session_keeps_results_and_profiles(convnet_float: Artifact, samples: list[dict[str, Array]]) -> None:
    with ExecuTorchRuntime().open(convnet_float.path, convnet_float.signature) as session:
        first = session.run(samples[0])["logits"]
        kept = first.copy()
        session.run(samples[1])
        np.testing.assert_array_equal(first, kept)
        timings = session.profile(samples[0], repetitions=3)
        assert any("Convolution" in t.type for t in timings)
        assert len({t.name for t in timings}) == len(timings)
        with pytest.raises(DataError, match="input 'image': has shape"):
            session.run({"image": np.zeros((1, 3, 16, 32), np.float32)})
    session.close()
    with pytest.raises(DataError, match="closed"):
        session.run(samples[0])


def test_several_inputs_outputs_and_a_dynamic_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    batch = Dim("batch", 1, 4)
    inputs = (TensorSpec("x", (batch, 3, 8, 8), "float32"), TensorSpec("ids", (batch,), "int64"))
    outputs = (
        TensorSpec("scores", (batch, 4), "float32"),
        TensorSpec("features", (batch, 8, 8, 8), "float32"),
        TensorSpec("next", (batch,), "int64"),
    )

    def sample(count: int) -> dict[str, Array]:
        return {"x": rng.standard_normal((count, 3, 8, 8)).astype(np.float32), "ids": np.arange(count)}

    module = Several().eval()
    model = make(module, inputs, outputs, sample(1))
    exporter = ExecuTorchExporter()
    twin = exporter.export_float(model, tmp_path)
    request = QuantizationRequest(STATIC, run_of([sample(1) for _ in range(8)]))
    artifact = exporter.export_quantized(model, twin, request, tmp_path)
    assert twin.signature.inputs[0].shape == ("batch", 3, 8, 8)
    for count in (1, 3):
        fed = sample(count)
        with torch.no_grad():
            expected = module(torch.tensor(fed["x"]), torch.tensor(fed["ids"]))
        with ExecuTorchRuntime().open(twin.path, twin.signature) as session:
            for result, wanted in zip(session.run(fed).values(), expected, strict=True):
                np.testing.assert_allclose(result, wanted.numpy(), atol=1e-5)
        with ExecuTorchRuntime().open(artifact.path, artifact.signature) as session:
            results = session.run(fed)
            assert sqnr(expected[1].numpy(), results["features"]) > 25
            np.testing.assert_array_equal(results["next"], expected[2].numpy())


@pytest.mark.parametrize(("scheme", "limit"), [(STATIC, 28.0), (DYNAMIC, 40.0)], ids=["static", "dynamic"])
def test_bert(tmp_path: Path, scheme: Scheme, limit: float) -> None:
    transformers = pytest.importorskip("transformers", reason="needs edgeopt[hf]")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.BertConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500,
                attn_implementation="eager",
            )  # fmt: skip
            self.edgeopt_model = transformers.BertModel(config)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.edgeopt_model(input_ids=ids, attention_mask=mask).last_hidden_state

    def sample() -> dict[str, Array]:
        mask = (np.arange(16) < rng.integers(4, 16)).astype(np.int64)[None]
        return {"input_ids": rng.integers(0, 500, (1, 16)), "attention_mask": mask}

    data = [sample() for _ in range(8)]
    inputs = tuple(TensorSpec(name, (1, 16), "int64") for name in data[0])
    model = make(Encoder(), inputs, (TensorSpec("hidden", (1, 16, 64), "float32"),), data[0])
    exporter = ExecuTorchExporter()
    twin = exporter.export_float(model, tmp_path)
    request = QuantizationRequest(scheme, run_of(data) if scheme is STATIC else None)
    artifact = exporter.export_quantized(model, twin, request, tmp_path)
    assert sqnr(outputs_of(twin, data, "hidden"), outputs_of(artifact, data, "hidden")) > limit
    reported = {op.name for op in artifact.unquantized_ops}
    assert "embeddings.LayerNorm/aten.native_layer_norm.out_0" in reported
    assert "encoder.layer.0.attention.self/Softmax_0" in reported
    assert not any("FullyConnected" in name for name in reported)


def test_softplus_between_int8_convolutions(tmp_path: Path) -> None:
    """It is taken apart after quantization: its parts share a dequantize, and only some of them are delegated."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3, 8, 8), np.float32)} for _ in range(4)]
    model = make(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Conv2d(8, 4, 3)),
        (TensorSpec("x", (1, 3, 8, 8), "float32"),),
        (TensorSpec("y", (1, 4, 4, 4), "float32"),),
        data[0],
    )
    twin = ExecuTorchExporter().export_float(model, tmp_path)
    artifact = ExecuTorchExporter().export_quantized(model, twin, QuantizationRequest(STATIC, run_of(data)), tmp_path)
    assert sqnr(outputs_of(twin, data, "y"), outputs_of(artifact, data, "y")) > 30
    assert {op.name.partition("/")[0] for op in artifact.unquantized_ops} == {"1"}


def test_an_operator_that_executorch_lacks_is_named_with_its_layer(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x)

    model = make(
        nn.Sequential(nn.Linear(3, 3), Spectrum()),
        (TensorSpec("x", (2, 3), "float32"),),
        (TensorSpec("y", (2,), "float32"),),
        {"x": np.ones((2, 3), np.float32)},
    )
    with pytest.raises(ConversionError, match=r"layer '1': .*aten\._linalg_svd"):
        ExecuTorchExporter().export_float(model, tmp_path)


# --- 4-bit weights, embeddings, probes -------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding large enough to be stored as int8, and linear layers of which one fits no group of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(300, 64), nn.LayerNorm(64)
        self.wide, self.narrow, self.head = nn.Linear(64, 40), nn.Linear(40, 32), nn.Linear(32, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.narrow(F.relu(self.wide(self.norm(self.embed(ids)))))))


@pytest.fixture(scope="module")
def words() -> tuple[Model, list[dict[str, Array]]]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = [{"ids": rng.integers(0, 300, (1, 12))} for _ in range(8)]
    inputs, outputs = (TensorSpec("ids", (1, 12), "int64"),), (TensorSpec("y", (1, 12, 8), "float32"),)
    return make(Words(), inputs, outputs, data[0]), data


@pytest.mark.parametrize("granularity", ["per-group", "per-channel"])
def test_4_bit_weights(words: tuple[Model, list[dict[str, Array]]], tmp_path: Path, granularity: str) -> None:
    model, data = words
    exporter = ExecuTorchExporter()
    twin = exporter.export_float(model, tmp_path)
    scheme = Scheme("8da4w", "dynamic", granularity, weight_estimator="mse")  # type: ignore[arg-type]
    artifact = exporter.export_quantized(model, twin, QuantizationRequest(scheme, None), tmp_path)
    assert sqnr(outputs_of(twin, data, "y"), outputs_of(artifact, data, "y")) > 12
    linear = [op for op in summarize(artifact.path).ops if op.type == "FullyConnected"]
    sizes = {op.name.split("/")[0]: op.weight_bytes for op in linear}
    assert sizes["wide"] < 64 * 40  # 4 bits; 40 inputs make no groups of 32, so `narrow` has int8 there
    assert (sizes["narrow"] >= 40 * 32) == (granularity == "per-group")
    assert not any(op.name.startswith(("embed", "wide", "narrow", "head")) for op in artifact.unquantized_ops)
    assert artifact.size_bytes < twin.size_bytes / 2


def test_probes_tell_every_layer(words: tuple[Model, list[dict[str, Array]]], tmp_path: Path) -> None:
    model, data = words
    exporter = ExecuTorchExporter()
    twin = exporter.export_float(model, tmp_path)
    artifact = exporter.export_quantized(model, twin, QuantizationRequest(STATIC, run_of(data)), tmp_path)
    expected = layer_outputs(model, data[0]["ids"])
    for made, limit in ((twin, 90.0), (artifact, 25.0)):
        probed = add_probes(made.path, made.signature, tmp_path / f"probed_{made.precision}.pte")
        with ExecuTorchRuntime().open(probed.path, probed.signature) as session:
            found = session.run(data[0])
        np.testing.assert_array_equal(found["y"], outputs_of(made, data[:1], "y"))
        assert [point.layer for point in probed.points] == ["embed", "norm", "wide", "narrow", "head"]
        for point in probed.points:
            assert sqnr(expected[point.layer], found[point.tensor.name]) > limit


def test_probes_of_images_are_in_the_models_layout(
    convnet: Model, convnet_float: Artifact, samples: list[dict[str, Array]], tmp_path: Path
) -> None:
    probed = add_probes(convnet_float.path, convnet_float.signature, tmp_path / "probed.pte")
    with ExecuTorchRuntime().open(probed.path, probed.signature) as session:
        found = session.run(samples[0])
    expected = layer_outputs(convnet, samples[0]["image"])
    layers = {point.layer: found[point.tensor.name] for point in probed.points}
    assert {"stem.1", "squeeze", "excite", "project", "head"} <= set(layers)
    assert layers["project"].shape == expected["project"].shape
    assert sqnr(expected["project"], layers["project"]) > 90


def layer_outputs(model: Model, value: Array) -> dict[str, Array]:
    """What each layer gives in torch, after the ReLU that runtimes fuse into it."""
    assert model.module is not None
    found: dict[str, Array] = {}
    fused = ("wide", "narrow", "squeeze")
    hooks = [
        layer.register_forward_hook(
            lambda _, __, result, name=name: found.__setitem__(
                name, (F.relu(result) if name in fused else result).detach().numpy().copy()
            )
        )
        for name, layer in model.module.named_modules()
        if name
    ]
    with torch.no_grad():
        model.module(torch.tensor(value))
    for hook in hooks:
        hook.remove()
    return found


# --- what XNNPACK computes otherwise than torch ----------------------------------------------------------------------


class Otherwise(nn.Module):
    """Each output by an operator that XNNPACK's partitioner takes, and whose arguments it or its kernel overlooks."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.gelu(x, approximate="tanh"),
            F.avg_pool2d(x, 3, 2, 1, count_include_pad=False, divisor_override=9),
            F.interpolate(x, scale_factor=1.5, mode="bilinear"),
            torch.max(x, 1)[0],
        )


def test_operators_that_the_delegate_computes_otherwise(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 9, 9)).astype(np.float32) * 2
    expected = [result.numpy() for result in Otherwise()(torch.tensor(x))]
    outputs = tuple(TensorSpec(f"y{i}", result.shape, "float32") for i, result in enumerate(expected))
    model = make(Otherwise(), (TensorSpec("x", x.shape, "float32"),), outputs, {"x": x})
    made = ExecuTorchExporter().export_float(model, tmp_path)
    with ExecuTorchRuntime().open(made.path, made.signature) as session:
        for result, wanted in zip(session.run({"x": x}).values(), expected, strict=True):
            np.testing.assert_allclose(result, wanted, atol=1e-5)


def test_a_gelu_among_int8_layers_is_computed_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 32), np.float32)} for _ in range(8)]
    model = make(
        nn.Sequential(nn.Linear(32, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 8)),
        (TensorSpec("x", (1, 32), "float32"),),
        (TensorSpec("y", (1, 8), "float32"),),
        data[0],
    )
    twin = ExecuTorchExporter().export_float(model, tmp_path)
    artifact = ExecuTorchExporter().export_quantized(model, twin, QuantizationRequest(STATIC, run_of(data)), tmp_path)
    assert sqnr(outputs_of(twin, data, "y"), outputs_of(artifact, data, "y")) > 30
    assert {op.name.partition("/")[0] for op in artifact.unquantized_ops} == {"1"}
    assert all(op.delegate for op in summarize(artifact.path).ops if "gelu" in op.type.lower())
