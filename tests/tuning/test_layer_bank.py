"""Banks of layers, and which time of a profile belongs to which of them; nothing is converted here."""

from __future__ import annotations

import torch

from edgeopt.compression.cost import LayerShape
from edgeopt.tuning.layer_bank import LAYERS_PER_FILE, WEIGHTS_PER_FILE, attributed, bank_of, chunks
from edgeopt.types import OpTiming


def convolution(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> LayerShape:
    return LayerShape(
        "convolution", inputs, outputs, (kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1), groups, (8, 8),
        False, inputs // groups * outputs * kernel * kernel * (8 // stride) ** 2,
    )  # fmt: skip


def linear(inputs: int, outputs: int, rows: int = 1) -> LayerShape:
    return LayerShape("linear", inputs, outputs, (), (), (), (), 1, (rows,), True, inputs * outputs * rows)


BANK = [convolution(8, 16), convolution(16, 16, groups=16), convolution(16, 8, kernel=1), linear(8, 4, rows=3)]


def test_a_bank_computes_each_layer_on_its_own_input() -> None:
    model = bank_of([*BANK, convolution(8, 16, stride=2)])
    assert model.module is not None
    outputs = model.module(*(torch.from_numpy(array) for array in model.example_inputs.values()))
    shapes = [(1, 16, 8, 8), (1, 16, 8, 8), (1, 8, 8, 8), (3, 4), (1, 16, 4, 4)]
    assert [tuple(output.shape) for output in outputs] == shapes
    assert [spec.shape for spec in model.outputs] == shapes
    assert [spec.layout for spec in model.inputs] == ["NCHW", "NCHW", "NCHW", None, "NCHW"]


def test_every_kind_of_layer_can_be_built() -> None:
    volume = LayerShape("convolution", 2, 4, (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, 1, (4, 4, 4), True, 1)
    signal = LayerShape("convolution", 2, 4, (3,), (1,), (0,), (2,), 2, (16,), False, 1)
    upward = LayerShape("transposed convolution", 4, 2, (2, 2), (2, 2), (0, 0), (1, 1), 1, (4, 4), True, 1)
    model = bank_of([volume, signal, upward])
    assert [spec.shape for spec in model.outputs] == [(1, 4, 4, 4, 4), (1, 4, 12), (1, 2, 8, 8)]


def test_equal_shapes_are_measured_once_in_files_of_bounded_size() -> None:
    shapes = [linear(8, width) for width in range(1, 26)]
    lots = chunks([*shapes, *shapes], "litert")
    assert [shape for lot in lots for shape in lot] == shapes
    assert max(map(len, lots)) == LAYERS_PER_FILE["litert"]
    heavy = [linear(WEIGHTS_PER_FILE // 1000, 600 + extra) for extra in range(3)]
    assert [len(lot) for lot in chunks(heavy, "onnx")] == [1, 1, 1]
    assert chunks([], "litert") == []


def test_times_by_the_names_of_layers() -> None:
    timings = (
        OpTiming("layers.2/Conv", "QLinearConv", 0.3),
        OpTiming("layers.0/Conv", "QLinearConv", 0.1),
        OpTiming("in0/quantize", "QuantizeLinear", 9.0),
        OpTiming("layers.1/Conv", "QLinearConv", 0.2),
        OpTiming("layers.3/Gemm", "QGemm", 0.4),
        OpTiming("out3/dequantize", "DequantizeLinear", 9.0),
    )
    assert attributed(timings, BANK, "onnx") == [0.1, 0.2, 0.3, 0.4]


def test_times_by_the_order_of_execution() -> None:
    timings = (
        OpTiming("XNNPACK 11", "Fully Connected (NC, QS8, QC8W) GEMM", 0.4),
        OpTiming("XNNPACK 0", "Convert (NC)", 9.0),
        OpTiming("XNNPACK 1", "Convolution (NHWC, QC8) IGEMM", 0.1),
        OpTiming("XNNPACK 7", "Fully Connected (NC, QS8, QC8W) GEMM", 0.3),
        OpTiming("XNNPACK 4", "Convolution (NHWC, QC8) DWConv", 0.2),
    )
    assert attributed(timings, BANK, "litert") == [0.1, 0.2, 0.3, 0.4]


def test_times_by_the_order_within_a_kind() -> None:
    timings = (
        OpTiming("Convolution (NHWC, QC8) DWConv #1", "Convolution (NHWC, QC8) DWConv", 0.2),
        OpTiming("Fully Connected (NC, QS8, QC8W) GEMM #2", "Fully Connected (NC, QS8, QC8W) GEMM", 0.4),
        OpTiming("Fully Connected (NC, QS8, QC8W) GEMM #1", "Fully Connected (NC, QS8, QC8W) GEMM", 0.3),
        OpTiming("Convolution (NHWC, QC8) IGEMM #1", "Convolution (NHWC, QC8) IGEMM", 0.1),
        OpTiming("Transpose (ND, X8) #1", "Transpose (ND, X8)", 9.0),
    )
    assert attributed(timings, BANK, "executorch") == [0.1, 0.2, 0.3, 0.4]


def test_what_can_not_be_told_apart_is_shared_out_by_arithmetic() -> None:
    shapes = [linear(10, 30), linear(10, 10)]
    timings = (OpTiming("fused", "FUSED", 4.0), OpTiming("q", "QuantizeLinear", 9.0))
    assert attributed(timings, shapes, "onnx") == [3.0, 1.0]
