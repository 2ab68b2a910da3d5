"""The parts of the Arm exporter that need no compiler: refusals, ranges, look-up tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchao.quantization.pt2e import FixedQParamsObserver

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError, DataError
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.exporter.executorch_arm import ArmExporter
from edgeopt.exporter.executorch_arm_embedding import look_up_integers
from edgeopt.exporter.executorch_arm_observer import calibrate
from edgeopt.exporter.executorch_arm_quantizer import UNSET
from edgeopt.types import (
    Artifact,
    Dim,
    EstimatorSpec,
    EthosU,
    LayerRules,
    Model,
    Sample,
    Scheme,
    Signature,
    TensorSpec,
)

W8A8 = Scheme("w8a8", "static", io="int8")
U55 = EthosU("ethos-u55", 128, 500, "Ethos_U55_High_End_Embedded", "Shared_Sram", 1 << 20, 1 << 20)


@pytest.mark.parametrize("kind", ["ethos-u55", "ethos-u65", "ethos-u85", "vgf"])
def test_every_arm_accelerator_has_this_exporter(kind: str) -> None:
    assert isinstance(load_exporter("executorch", kind), ArmExporter)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        (Scheme("fp16", "none"), "fp16"),
        (Scheme("w8", "none"), "w8"),
        (Scheme("w8a8", "dynamic"), "dynamic w8a8"),
        (replace(W8A8, weight_symmetric=False), "symmetric weights"),
        (replace(W8A8, weight_granularity="per-group"), "per-channel"),
        (replace(W8A8, weight_values="k-means"), "k-means"),
    ],
)
def test_schemes_that_the_hardware_has_not_are_refused_by_name(scheme: Scheme, told: str) -> None:
    assert told in (ArmExporter().unsupported(scheme, LayerRules()) or "")


def test_a_mix_of_widths_is_refused() -> None:
    assert "w8a16" in (ArmExporter().unsupported(W8A8, LayerRules(int16_activations=("head",))) or "")


@pytest.mark.parametrize("scheme", [W8A8, Scheme("w8a16", "static"), replace(W8A8, activation_symmetric=True)])
def test_static_integer_schemes_are_taken(scheme: Scheme) -> None:
    assert ArmExporter().unsupported(scheme, LayerRules(keep_float=("head",))) is None


def test_a_free_dimension_is_refused_with_the_inputs_name(tmp_path: Path) -> None:
    spec = TensorSpec("tokens", (1, Dim("length", 1, 64)), "float32")
    example = {"tokens": np.zeros((1, 8), np.float32)}
    model = Model("net", nn.ReLU(), None, (spec,), (spec,), example, None, (), (), "0" * 64)
    run = CalibrationRun(lambda: iter(()), 1, EstimatorSpec(), lambda _: None)
    request = QuantizationRequest(replace(W8A8, npu=U55), run)
    twin = Artifact(tmp_path, "executorch", "fp32", Signature((), ()), 0, "", (), {}, ())
    with pytest.raises(ConversionError, match=r"input 'tokens'.*free dimension"):
        ArmExporter().export_quantized(model, twin, request, tmp_path)


# --- ranges ----------------------------------------------------------------------------------------------------------


class Observed(nn.Module):
    """x -> relu(x), as `prepare_pt2e` leaves it: `shared` puts one observer on both tensors."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.before = FixedQParamsObserver(scale=UNSET, zero_point=0)
        self.after = self.before if shared else FixedQParamsObserver(scale=UNSET, zero_point=0)
        self.fixed = FixedQParamsObserver(scale=0.5, zero_point=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fixed(self.after(torch.ops.aten.relu.default(self.before(x))))


SPEC = (TensorSpec("x", (1, 4), "float32"),)


def observed(*, shared: bool) -> torch.fx.GraphModule:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            del module_qualified_name
            return isinstance(m, FixedQParamsObserver)

    module = Observed(shared=shared)
    return torch.fx.GraphModule(module, Tracer().trace(module))


def run_of(values: list[list[float]], runs: list[int] | None = None) -> CalibrationRun:
    def samples():
        if runs is not None:
            runs.append(1)
        return iter([Sample({"x": np.float32([row])}, None, "") for row in values])

    return CalibrationRun(samples, len(values), EstimatorSpec(), lambda _: None)


def qparams(observer: FixedQParamsObserver) -> tuple[float, int]:
    return float(observer.scale), int(observer.zero_point)


def test_observers_get_affine_ranges_and_the_backends_own_stay() -> None:
    graph = observed(shared=False)
    calibrate(graph, run_of([[-1, 0, 1, 3]]), SPEC, W8A8, {})
    assert qparams(graph.before) == (pytest.approx(4 / 255), -64)
    assert qparams(graph.after) == (pytest.approx(3 / 255), -128)
    assert qparams(graph.fixed) == (0.5, 3)


def test_a_range_shared_with_a_clip_is_that_behind_it() -> None:
    graph = observed(shared=True)
    calibrate(graph, run_of([[-9, 0, 1, 3]]), SPEC, W8A8, {})
    assert qparams(graph.before) == (pytest.approx(3 / 255), -128)


def test_wide_activations_are_symmetric() -> None:
    graph = observed(shared=False)
    calibrate(graph, run_of([[-1, 0, 1, 3]]), SPEC, Scheme("w8a16", "static"), {})
    assert qparams(graph.before) == (pytest.approx(3 / 32767), 0)


def test_power_of_two_scales_are_rounded_up() -> None:
    graph = observed(shared=False)
    calibrate(graph, run_of([[-1, 0, 1, 3]]), SPEC, replace(W8A8, scale="power-of-two"), {})
    assert qparams(graph.after)[0] == 2.0**-6


def test_small_ranges_keep_their_resolution() -> None:
    """XNNPACK's floor of 2^-12 would make zero of the epsilon in a layer norm."""
    graph = observed(shared=False)
    calibrate(graph, run_of([[0, 0, 0, 0.01]]), SPEC, W8A8, {})
    assert qparams(graph.after)[0] == pytest.approx(0.01 / 255)


def test_known_ranges_run_no_sample_again() -> None:
    runs: list[int] = []
    run = run_of([[-1, 0, 1, 3]], runs)
    calibrate(observed(shared=False), run, SPEC, W8A8, {})
    again = observed(shared=False)
    calibrate(again, run, SPEC, W8A8, {})
    assert len(runs) == 1
    assert qparams(again.after) == (pytest.approx(3 / 255), -128)
    assert all(isinstance(found, Range) for found in run.known.values())


def test_a_sample_without_the_input_is_a_data_error() -> None:
    run = CalibrationRun(lambda: iter([Sample({}, None, "")]), 1, EstimatorSpec(), lambda _: None)
    with pytest.raises(DataError, match="'x'"):
        calibrate(observed(shared=False), run, SPEC, W8A8, {})


# --- look-up tables --------------------------------------------------------------------------------------------------


class LookUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(-8, 8, dtype=torch.int8).reshape(8, 2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        numbers = (0.5, 1, -128, 127, torch.int8)
        real = torch.ops.aten.index_select.default(ops.dequantize_per_tensor.default(self.table, *numbers), 0, ids)
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(real, *numbers), *numbers)


def test_rows_are_read_from_the_integer_table() -> None:
    ids = torch.tensor([3, 0, 7])
    graph = torch.export.export(LookUp(), (ids,)).module(check_guards=False)
    wanted = graph(ids)
    look_up_integers(graph)
    assert torch.equal(graph(ids), wanted)
    kinds = [str(node.target).rpartition(".")[0] for node in graph.graph.nodes if node.op == "call_function"]
    assert kinds == ["aten.index_select", "quantized_decomposed.dequantize_per_tensor"]
