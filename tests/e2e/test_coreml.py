"""Real conversions to Core ML, run by the reference interpreter on the written package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.accelerators.neural_engine import CoreMLAccelerator
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.coreml import CoreMLExporter
from edgeopt.formats.coreml import operators, summarize
from edgeopt.formats.coreml_program import MANIFEST, SPEC, WEIGHTS, read_program
from edgeopt.formats.files import sha256_of
from edgeopt.runtimes.coreml_reference import CoreMLReference
from edgeopt.types import (
    Array,
    Artifact,
    EstimatorSpec,
    Finding,
    LayerRules,
    Model,
    NeuralEngine,
    Sample,
    Scheme,
    TensorSpec,
)

pytest.importorskip("coremltools", reason="needs the extra 'apple'")

pytestmark = pytest.mark.e2e

FP16 = Scheme("fp16", "none")
W8A8 = Scheme("w8a8", "static", activation_symmetric=True)
PALETTE = Scheme("w4", "none", weight_values="k-means")
A15, A18 = NeuralEngine("A15 Bionic", 16, 15), NeuralEngine("A18", 16, 18)
OLD_PALETTE = replace(PALETTE, npu=A15)


class Network(nn.Module):
    """Batch norm, ReLU6, a depthwise and a transposed convolution, a residual sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6())
        self.project = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(x))
        return self.head(self.up(x).mean((2, 3)))


class Encoder(nn.Module):
    """Embedding, attention with a padding mask, GELU, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=mask == 0).mean(1))


@pytest.fixture(scope="module")
def network() -> Model:
    torch.manual_seed(0)
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    return model_of(Network(), {"image": image})


def model_of(module: nn.Module, example: dict[str, Array], output: str = "scores") -> Model:
    with torch.no_grad():
        result = module.eval()(*[torch.from_numpy(value) for value in example.values()])
    inputs = tuple(TensorSpec(name, value.shape, value.dtype.name) for name, value in example.items())  # type: ignore[arg-type]
    outputs = (TensorSpec(output, tuple(result.shape), "float32"),)
    return Model("net", module, None, inputs, outputs, example, None, (), (), "0" * 64)


def pictures(count: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"image": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def request(scheme: Scheme, keep: tuple[str, ...] = (), found: list[Finding] | None = None) -> QuantizationRequest:
    calibration = None
    if scheme.needs_calibration:
        samples = [Sample(values, None, "") for values in pictures(8)]
        tell = (lambda _: None) if found is None else found.append
        calibration = CalibrationRun(lambda: iter(samples), len(samples), EstimatorSpec(), tell)
    return QuantizationRequest(scheme, calibration, LayerRules(keep_float=keep))


def export(model: Model, scheme: Scheme, directory: Path, keep: tuple[str, ...] = ()) -> Artifact:
    directory.mkdir(exist_ok=True)
    twin = CoreMLExporter().export_float(model, directory)
    return CoreMLExporter().export_quantized(model, twin, request(scheme, keep), directory)


class Exports:
    """Files of one network, each converted when it is first asked for."""

    def __init__(self, model: Model, directory: Path) -> None:
        self.model = model
        self.twin = CoreMLExporter().export_float(model, directory)
        self._directory = directory
        self._made: dict[tuple[Scheme, tuple[str, ...]], Artifact] = {}

    def get(self, scheme: Scheme, keep: tuple[str, ...] = ()) -> Artifact:
        key = (scheme, keep)
        if key not in self._made:
            directory = self._directory / str(len(self._made))
            directory.mkdir()
            self._made[key] = CoreMLExporter().export_quantized(self.model, self.twin, request(scheme, keep), directory)
        return self._made[key]


@pytest.fixture(scope="module")
def exports(network: Model, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(network, tmp_path_factory.mktemp("exports"))


def sqnr(model: Model, artifact: Artifact, samples: list[dict[str, Array]]) -> float:
    signal = noise = 0.0
    with CoreMLReference().open(artifact.path, artifact.signature) as session:
        for sample in samples:
            with torch.no_grad():
                wanted = model.module(*[torch.from_numpy(v) for v in sample.values()]).numpy()  # type: ignore[misc]
            found = session.run(sample)[model.outputs[0].name]
            signal, noise = signal + float((wanted**2).sum()), noise + float(((wanted - found) ** 2).sum())
    return 10 * np.log10(signal / max(noise, 1e-30))


@pytest.mark.parametrize(
    ("scheme", "least", "ios"),
    [(FP16, 55, 15), (Scheme("w8", "none"), 35, 16), (W8A8, 20, 17),
     (replace(W8A8, activation_symmetric=False), 20, 17), (PALETTE, 15, 18), (OLD_PALETTE, 8, 16),
     (Scheme("w4", "none"), 8, 18),
     (Scheme("w4", "none", weight_granularity="per-group", group_size=4), 8, 18)],
    ids=["fp16", "w8", "w8a8", "w8a8-asymmetric", "palette", "palette-ios16", "w4", "w4-grouped"],
)  # fmt: skip
def test_schemes(exports: Exports, scheme: Scheme, least: float, ios: int) -> None:
    artifact = exports.get(scheme)
    assert sqnr(exports.model, artifact, pictures(4)) > least
    assert read_program(artifact.path).minimum_ios == ios
    assert artifact.history[-1].config["minimum_ios"] == ios


def test_only_large_weights_are_coded(exports: Exports) -> None:
    """Depthwise convolutions and those of few inputs get 8-bit integers, which cost next to nothing."""
    for scheme, integers in (
        (PALETTE, "constexpr_blockwise_shift_scale"),
        (OLD_PALETTE, "constexpr_affine_dequantize"),
    ):
        program = read_program(exports.get(scheme).path)
        made = {name: op.type for op in program.main.operations for name in (v.name for v in op.outputs)}
        coded = {op.name for op in program.main.operations if op.type == "constexpr_lut_to_dense"}
        assert len(coded) == 1, "the transposed convolution, 64 weights per channel"
        weights = {
            program.layers.get(op.name, ""): made.get(str(op.inputs["weight"][0]))
            for op in program.main.operations
            if op.type == "conv"
        }
        assert weights == dict.fromkeys(("stem.0", "depthwise.0", "project"), integers)


def test_float_twin_is_the_model(exports: Exports) -> None:
    assert sqnr(exports.model, exports.twin, pictures(2)) > 100


def test_the_same_model_gives_the_same_bytes(exports: Exports, tmp_path: Path) -> None:
    first, second = exports.get(W8A8), export(exports.model, W8A8, tmp_path)
    assert exports.twin.sha256 == sha256_of(tmp_path / exports.twin.path.name)
    assert first.sha256 == second.sha256
    assert sorted(p.relative_to(first.path) for p in first.path.rglob("*") if p.is_file()) == sorted(
        [MANIFEST, SPEC, WEIGHTS]
    )
    assert not [key for key in summarize(first.path).metadata if "date" in key]


def test_int8_operators_carry_their_layers(exports: Exports) -> None:
    artifact = exports.get(W8A8)
    ops = {op.layer: op for op in operators(read_program(artifact.path)) if op.info.type in ("conv", "linear", "relu6")}
    assert {"stem.0", "depthwise.0", "project", "head"} <= ops.keys()
    assert ops["stem.0"].info.dtype == ops["depthwise.1"].info.dtype == "int8"
    assert {op.type for op in artifact.unquantized_ops} == {"reduce_mean", "conv_transpose"}


def test_kept_layers_compute_in_float(exports: Exports) -> None:
    artifact = exports.get(W8A8, keep=("project",))
    kept = [op for op in artifact.unquantized_ops if op.reason == "kept in float as asked"]
    assert [op.name for op in kept] == ["project"]
    by_layer = {op.layer: op.info for op in operators(read_program(artifact.path)) if op.info.type == "conv"}
    assert (by_layer["project"].dtype, by_layer["depthwise.0"].dtype) == ("fp16", "int8")


def test_kept_layers_of_an_fp16_file_are_fp32(exports: Exports) -> None:
    artifact = exports.get(FP16, keep=("depthwise",))
    by_layer = {op.layer: op.info.dtype for op in operators(read_program(artifact.path)) if op.info.type == "conv"}
    assert by_layer == {"stem.0": "fp16", "depthwise.0": "fp32", "project": "fp16"}


def test_trained_ranges_win_over_calibration(exports: Exports, tmp_path: Path) -> None:
    trained = replace(exports.model, input_ranges={"depthwise.0": (0.0, 3.0)})
    artifact = CoreMLExporter().export_quantized(trained, exports.twin, request(W8A8), tmp_path)
    assert artifact.sha256 != exports.get(W8A8).sha256


def test_known_ranges_need_no_second_pass(exports: Exports, tmp_path: Path) -> None:
    network, twin, first = exports.model, exports.twin, request(W8A8)
    assert first.calibration is not None
    made = CoreMLExporter().export_quantized(network, twin, first, tmp_path).sha256
    again = replace(first, calibration=replace(first.calibration, samples=lambda: iter(())))
    assert CoreMLExporter().export_quantized(network, twin, again, tmp_path).sha256 == made
    empty = replace(first, calibration=replace(first.calibration, samples=lambda: iter(()), known={}))
    with pytest.raises(DataError, match="holds no samples"):
        CoreMLExporter().export_quantized(network, twin, empty, tmp_path)


def test_a_padding_mask_masks(tmp_path: Path) -> None:
    """Regression: coremltools gives `zeros_like(mask, dtype=float)` the type of the mask, and the mask is inverted."""
    torch.manual_seed(0)
    ids = np.arange(12, dtype=np.int64).reshape(1, 12)
    mask = np.array([[1] * 7 + [0] * 5], np.int64)
    model = model_of(Encoder(), {"ids": ids, "mask": mask})
    assert sqnr(model, CoreMLExporter().export_float(model, tmp_path), [{"ids": ids, "mask": mask}]) > 60
    artifact = export(model, FP16, tmp_path)
    assert sqnr(model, artifact, [{"ids": ids, "mask": mask}]) > 40
    told = CoreMLAccelerator().compile(artifact, A18, tmp_path)
    assert ("gather", "gather reads by index") in told.placement.fallbacks
    assert {"not-executed", "compute-units", "transformer-layout"} <= {finding.code for finding in told.findings}


def test_placement_names_what_falls_back(exports: Exports, tmp_path: Path) -> None:
    artifact = exports.get(FP16, keep=("depthwise",))
    told = CoreMLAccelerator().compile(artifact, A18, tmp_path)
    assert told.placement.predicted
    assert {(op.layer, op.reason) for op in told.placement.on_cpu} >= {("depthwise.0", "it computes in fp32")}
    assert all((op.layer or "").startswith("depthwise") for op in told.placement.on_cpu)
    assert told.artifact is artifact


def test_an_old_phone_is_told_of(exports: Exports, tmp_path: Path) -> None:
    told = CoreMLAccelerator().compile(exports.get(W8A8), A15, tmp_path)
    assert {"system-version", "int8-rate"} <= {finding.code for finding in told.findings}


def test_an_operator_without_a_form_is_named_with_its_layer(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(x) + 1

    model = model_of(Net(), {"x": np.ones((1, 4), np.float32)})
    with pytest.raises(ConversionError, match=r"layer 'odd': coremltools can't convert the operator .*bessel_j0"):
        CoreMLExporter().export_float(model, tmp_path)


@pytest.mark.parametrize("part", [SPEC, WEIGHTS, MANIFEST])
def test_a_damaged_package_is_refused(exports: Exports, part: Path, tmp_path: Path) -> None:
    damaged = tmp_path / exports.twin.path.name
    shutil.copytree(exports.twin.path, damaged)
    path = damaged / part
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    if part == MANIFEST:
        path.unlink()
    with pytest.raises(ConversionError, match=r"model_fp32\.mlpackage: is"):
        CoreMLReference().open(damaged, exports.twin.signature)


def test_a_session_checks_shapes(exports: Exports) -> None:
    session = CoreMLReference().open(exports.twin.path, exports.twin.signature)
    with pytest.raises(DataError, match="input 'image': has shape"):
        session.run({"image": np.zeros((1, 3, 8, 8), np.float32)})
    session.close()
    with pytest.raises(DataError, match="closed"):
        session.run(pictures(1)[0])


def test_manifest_names_both_parts(exports: Exports) -> None:
    path = exports.twin.path
    manifest: Mapping[str, Mapping[str, Mapping[str, str]]] = json.loads((path / MANIFEST).read_text())
    assert manifest["rootModelIdentifier"] in manifest["itemInfoEntries"]
    for entry in manifest["itemInfoEntries"].values():
        assert (path / "Data" / entry["path"]).exists()
