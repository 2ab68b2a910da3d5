"""The ExecuTorch exporter's graph work, without lowering anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.executorch_graph import (
    dynamic_shapes,
    example_inputs,
    operator_name,
    simplify,
    write_out_gelus,
)
from edgeopt.exporter.executorch_lowering import blame, capture, quiet_vendor
from edgeopt.exporter.executorch_observer import calibrate
from edgeopt.exporter.executorch_quantizer import XnnpackQuantizer
from edgeopt.exporter.executorch_weights import observe_weights
from edgeopt.types import (
    Array,
    Artifact,
    Dim,
    EstimatorSpec,
    LayerRules,
    Model,
    NativeGraph,
    Sample,
    Scheme,
    Signature,
    TensorSpec,
)

STATIC = Scheme("w8a8", "static")


def make(module: nn.Module | None, shape: tuple[int | Dim, ...] = (1, 3, 8, 8), **changes: object) -> Model:
    size = tuple(d if isinstance(d, int) else d.min for d in shape)
    fields = {
        "name": "net",
        "module": module.eval() if module is not None else None,
        "native": None,
        "inputs": (TensorSpec("image", shape, "float32"),),
        "outputs": (TensorSpec("logits", (1, 1), "float32"),),
        "example_inputs": {"image": np.ones(size, np.float32)},
        "preprocessing": None,
        "labels": (),
        "history": (),
        "source_sha256": "0" * 64,
    }
    return Model(**(fields | changes))  # type: ignore[arg-type]


def float_artifact(path: Path) -> Artifact:
    return Artifact(path, "executorch", "fp32", Signature((), ()), 1, "", (), {}, ())


def simplified(module: nn.Module, *shape: int) -> torch.export.ExportedProgram:
    program = capture(module.eval(), (torch.randn(shape),), None)
    simplify(program)
    return program


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [operator_name(n) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ([nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3)], []),
        ([nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(3, 4, 3, stride=2, padding=1)], []),
        ([nn.ZeroPad2d((1, 1, 2, 2)), nn.Conv2d(3, 3, (5, 3), dilation=(1, 2), groups=3, bias=False)], []),
        ([nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2)], ["aten.pad.default"]),
        ([nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3)], ["aten.pad.default"]),
        ([nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)], ["aten.pad.default"]),
    ],
)
def test_padding_is_folded_only_when_equal(layers: list[nn.Module], kept: list[str]) -> None:
    module = nn.Sequential(*layers)
    program = simplified(module, 2, 3, 9, 7)
    assert [op for op in operators(program) if "pad" in op] == kept
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(program.module(check_guards=False)(x), module(x))


def test_padding_that_something_else_reads_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            return self.conv(padded) + padded

    assert "aten.pad.default" in operators(simplified(Net(), 1, 3, 4, 4))


def test_clips_and_means_take_the_delegated_form() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.clamp(x, -1, 2) + nn.functional.relu6(x) + x.clamp(min=0) + x.clamp(min=0.5)
            return x.mean((-1, -2)) + x.mean((2, 3), keepdim=True).flatten(1)

    program = simplified(Net(), 2, 3, 4, 4)
    found = operators(program)
    assert found.count("aten.hardtanh.default") == 2
    assert found.count("aten.relu.default") == 1
    means = [n for n in program.graph.nodes if operator_name(n) == "aten.mean.dim"]
    assert all(list(n.args[1:]) == [[2, 3], True] for n in means)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(program.module(check_guards=False)(x), Net()(x))


def test_the_tanh_form_of_gelu_is_written_out_and_the_exact_one_is_not() -> None:
    # Regression: XNNPACK computes both as the exact one.
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return nn.functional.gelu(x, approximate="tanh"), nn.functional.gelu(x)

    program = capture(Net(), (torch.randn(4, 64),), None)
    write_out_gelus(program)
    gelus = [n for n in program.graph.nodes if operator_name(n) == "aten.gelu.default"]
    assert [dict(n.kwargs) for n in gelus] == [{}]
    x = 4 * torch.randn(4, 64)
    torch.testing.assert_close(program.module()(x), Net()(x))


def test_dynamic_dimensions_share_names_and_avoid_size_one() -> None:
    batch = Dim("batch", 1, 4)
    model = make(nn.Identity(), (batch, 3))
    assert example_inputs(model)[0].shape == (2, 3)
    shapes = dynamic_shapes((*model.inputs, TensorSpec("ids", (batch, Dim("fixed", 3, 3)), "int64")))
    assert shapes is not None
    assert shapes[0][0] is shapes[1][0]
    assert list(shapes[1]) == [0]


# --- quantizer -------------------------------------------------------------------------------------------------------


def prepared(module: nn.Module, *inputs: torch.Tensor, scheme: Scheme = STATIC, keep: tuple[str, ...] = ()) -> object:
    with quiet_vendor():
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        program = capture(module.eval(), inputs, None)
        simplify(program)
        return prepare_pt2e(program.module(check_guards=False), XnnpackQuantizer(scheme, keep))


def observed(graph: torch.fx.GraphModule) -> list[str]:
    return [n.args[0].name for n in graph.graph.nodes if n.op == "call_module" and n.args[0].op != "get_attr"]


def test_clip_is_observed_in_place_of_its_convolution() -> None:
    graph = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)), torch.randn(1, 3, 4, 4))
    assert observed(graph) == ["input_1", "hardtanh", "conv2d_1"]


def test_exempt_layers_and_lone_additions_stay_float() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.second(torch.sin(self.first(x)) + 1.0), -1) + 1.0

    assert observed(prepared(Net(), torch.randn(1, 4), keep=("sec*",))) == ["x", "linear"]


def test_a_shared_weight_is_quantized_at_every_use() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.head(x), self.head(torch.sin(x))

    assert sorted(observed(prepared(Net(), torch.randn(1, 3, 4, 4)))) == ["conv2d", "conv2d_1", "sin", "x"]


def test_integers_and_additive_masks_are_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            ids = mask * 2 + 1
            bias = torch.where(ids > 1, 0.0, torch.finfo(torch.float32).min)
            return self.out(torch.softmax(self.query(x) + bias[:, None, :], -1))

    graph = prepared(Net(), torch.randn(1, 4, 4), torch.ones(1, 4, dtype=torch.int64))
    assert observed(graph) == ["x", "linear", "softmax", "linear_1"]


# --- calibration -----------------------------------------------------------------------------------------------------


def run_of(arrays: list[Array]) -> CalibrationRun:
    def samples() -> object:
        return iter([Sample({"image": a}, None, "") for a in arrays])

    return CalibrationRun(samples, len(arrays), EstimatorSpec(), lambda _: None)  # type: ignore[arg-type]


def test_ranges_become_scales_of_the_shared_observers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.constant_(self.conv.weight, 2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.relu6(self.conv(x) + 1.0)

    graph = prepared(Net(), torch.zeros(1, 1, 2, 2))
    inputs = (TensorSpec("image", (1, 1, 2, 2), "float32"),)
    run = run_of([np.full((1, 1, 2, 2), v, np.float32) for v in (-1, 4)])
    calibrate(graph, run, inputs, STATIC)
    # The sum reaches 9, but what the clip lets through is what the integers have to hold.
    assert run.known["image"] == Range(-1.0, 4.0)
    assert run.known["conv/conv2d"] == Range(-2.0, 8.0)
    assert Range(0.0, 6.0) in run.known.values()
    scales = {float(m.scale): int(m.zero_point) for m in graph.modules() if hasattr(m, "zero_point")}
    assert scales[float(np.float32(6 / 255))] == -128


def test_a_sample_without_an_input_is_named() -> None:
    graph = prepared(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2))
    run = CalibrationRun(lambda: iter([Sample({}, None, "")]), 1, EstimatorSpec(), lambda _: None)
    with pytest.raises(DataError, match="lacks the input 'image'"):
        calibrate(graph, run, (TensorSpec("image", (1, 1, 2, 2), "float32"),), STATIC)


def scales(graph: torch.fx.GraphModule) -> dict[str, float]:
    """What feeds each activation observer -> its scale."""
    return {
        node.args[0].name: float(graph.get_submodule(node.target).scale)
        for node in graph.graph.nodes
        if node.op == "call_module" and hasattr(graph.get_submodule(node.target), "scale")
    }


def test_another_exemption_runs_no_sample_again() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    inputs = (TensorSpec("image", (1, 1, 2, 2), "float32"),)
    first = run_of([np.full((1, 1, 2, 2), v, np.float32) for v in (-1, 4)])
    calibrate(prepared(module, torch.zeros(1, 1, 2, 2), keep=("2", "3")), first, inputs, STATIC)

    def none() -> object:
        raise AssertionError("the samples ran again")

    again = CalibrationRun(none, 2, EstimatorSpec(), lambda _: None, first.known)  # type: ignore[arg-type]
    whole = prepared(module, torch.zeros(1, 1, 2, 2))
    calibrate(whole, again, inputs, STATIC)
    fresh = prepared(module, torch.zeros(1, 1, 2, 2))
    calibrate(fresh, run_of([np.full((1, 1, 2, 2), v, np.float32) for v in (-1, 4)]), inputs, STATIC)
    assert scales(whole) == scales(fresh)
    symmetric = Scheme("w8a8", "static", activation_symmetric=True)
    with pytest.raises(AssertionError, match="ran again"):
        calibrate(prepared(module, torch.zeros(1, 1, 2, 2), scheme=symmetric), again, inputs, symmetric)


def test_trained_input_ranges_win() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    graph = prepared(module, torch.zeros(1, 1, 2, 2))
    inputs = (TensorSpec("image", (1, 1, 2, 2), "float32"),)
    run = run_of([np.full((1, 1, 2, 2), v, np.float32) for v in (-1, 4)])
    calibrate(graph, run, inputs, STATIC, {"2": (0.5, 2.55)})
    found = scales(graph)
    assert found["hardtanh"] == pytest.approx(0.01)
    assert found["input_1"] == pytest.approx(5 / 255)


def test_scales_can_be_powers_of_two() -> None:
    scheme = Scheme("w8a8", "static", scale="power-of-two", weight_estimator="mse")
    graph = prepared(nn.Conv2d(1, 4, 1), torch.zeros(1, 1, 2, 2), scheme=scheme)
    inputs = (TensorSpec("image", (1, 1, 2, 2), "float32"),)
    calibrate(graph, run_of([np.full((1, 1, 2, 2), v, np.float32) for v in (-1, 4)]), inputs, scheme)
    observe_weights(graph, scheme)
    assert 2.0**-5 in scales(graph).values()
    weights = next(m for m in graph.modules() if hasattr(m, "min_val"))
    exponents = torch.log2(weights.calculate_qparams()[0])
    torch.testing.assert_close(exponents, exponents.round())


def test_small_weights_keep_their_resolution() -> None:
    """A floor of 2^-12, which the stock observers have, would round weights off that were put on their grid."""
    module = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(module.weight, 0.001)
    graph = prepared(module, torch.zeros(1, 1, 2, 2))
    inputs = (TensorSpec("image", (1, 1, 2, 2), "float32"),)
    calibrate(graph, run_of([np.full((1, 1, 2, 2), v, np.float32) for v in (-1, 4)]), inputs, STATIC)
    observe_weights(graph, STATIC)
    weights = next(m for m in graph.modules() if hasattr(m, "min_val"))
    assert float(weights.calculate_qparams()[0]) == pytest.approx(0.001 / 127)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme("fp16", "none"), "fp16"),
        (Scheme("w8a16", "static"), "no int16 kernels; take w8a8"),
        (Scheme("w8", "none"), "no weight-only int8 kernels; take w8a8"),
        (Scheme("w4", "none"), "no weight-only int4 kernels; take 8da4w"),
        (Scheme("8da4w", "static"), "dynamic activations only"),
        (Scheme("8da4w", "dynamic", "per-group", group_size=48), "multiple of 32 weights, not 48"),
        (Scheme("w8a8", "dynamic", "per-group"), "for 4-bit weights only"),
        (Scheme("w8a8", "static", weight_symmetric=False), "no zero point; take symmetric"),
        (Scheme("w8a8", "static", weight_values="k-means"), "no k-means weights"),
        (Scheme("w8a8", "dynamic", activation_symmetric=True), "dynamic zero points itself"),
        (Scheme("w8a8", "dynamic", "per-tensor"), "per-channel or per-group weights only"),
        (Scheme("w8a8", "dynamic", io="int8"), "no fixed scale"),
    ],
)
def test_schemes_without_kernels_are_refused(tmp_path: Path, scheme: Scheme, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        ExecuTorchExporter().export_quantized(
            make(nn.Identity()), float_artifact(tmp_path), QuantizationRequest(scheme, None), tmp_path
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("fp32", "none"),
        STATIC,
        Scheme("w8a8", "static", "per-tensor", True, "int8", scale="power-of-two"),
        Scheme("w8a8", "dynamic", weight_estimator="hqq"),
        Scheme("8da4w", "dynamic", "per-group", group_size=128),
        Scheme("8da4w", "dynamic"),
    ],
    ids=str,
)
def test_schemes_with_kernels_are_taken(scheme: Scheme) -> None:
    assert ExecuTorchExporter().unsupported(scheme, LayerRules(keep_float=("head",))) is None


def test_int16_layers_are_refused() -> None:
    reason = ExecuTorchExporter().unsupported(STATIC, LayerRules(int16_activations=("head",)))
    assert reason is not None
    assert "no int16 activations" in reason


def test_a_model_without_a_module_is_refused(tmp_path: Path) -> None:
    model = make(None, native=NativeGraph("onnx", tmp_path / "model.onnx"))
    with pytest.raises(ConversionError, match="made from a PyTorch module"):
        ExecuTorchExporter().export_float(model, tmp_path)


def test_data_dependent_control_flow_names_the_layer(tmp_path: Path) -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = make(nn.Sequential(nn.Linear(3, 3), Gate()), (1, 3))
    with pytest.raises(ConversionError, match=r"layer '1': .*depends on the values of its input"):
        ExecuTorchExporter().export_float(model, tmp_path)


def test_blame_falls_on_the_operator_that_a_failing_pass_was_looking_at() -> None:
    program = simplified(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 1, 3, 8, 8)

    def visit(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if "relu" in str(node.target):
                node.meta["no such key"]

    try:
        visit(program.graph)
    except KeyError as error:
        wrapped = RuntimeError("a pass failed")
        wrapped.__cause__ = error
    assert blame(program, wrapped) == ("aten.relu", "1")


def test_blame_falls_on_the_operator_that_a_message_of_the_chain_names() -> None:
    program = simplified(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 1, 3, 8, 8)
    wrapped = RuntimeError("a pass failed")
    wrapped.__cause__ = ValueError("no rule for aten.conv2d.default")
    assert blame(program, wrapped) == ("aten.conv2d", "0")
    assert blame(program, RuntimeError("a pass failed")) == (None, "")
