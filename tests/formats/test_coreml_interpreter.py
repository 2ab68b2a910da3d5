"""The reference's own arithmetic, on programs written by hand; whole models are in tests/e2e."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgeopt.errors import ConversionError
from edgeopt.formats.coreml_interpreter import OPERATORS, Interpreter
from edgeopt.formats.coreml_program import Block, Constant, Feature, Operation, Program, ValueType, Variable
from edgeopt.types import Array

IMAGE = np.random.default_rng(1).standard_normal((1, 2, 6, 7)).astype(np.float32)
_NAMES = {"float32": "fp32", "float16": "fp16"}


def constant(value: Any, dtype: str | None = None) -> Constant:
    if isinstance(value, str):
        return Constant(ValueType("string", ()), value, None, None)
    array = np.asarray(value)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    kind = dtype or _NAMES.get(array.dtype.name, "int32" if array.dtype.kind == "i" else array.dtype.name)
    return Constant(ValueType(kind, array.shape), array, None, None)


def operation(kind: str, outputs: dict[str, str], /, **parameters: Any) -> Operation:
    """`outputs`: name -> type. A parameter that is a `str` names a variable, unless it is a constant already."""
    inputs: dict[str, tuple[str | Constant, ...]] = {}
    for key, value in parameters.items():
        given = value if isinstance(value, (str, Constant, list)) else constant(value)
        inputs[key] = tuple(given) if isinstance(given, list) else (given,)
    return Operation(kind, inputs, tuple(Variable(n, ValueType(t, ())) for n, t in outputs.items()), ())


def program(*operations: Operation, outputs: dict[str, str], inputs: dict[str, Array]) -> Program:
    return Program(
        version=8,
        opset="CoreML7",
        inputs=tuple(Feature(n, v.dtype.name, v.shape) for n, v in inputs.items()),
        outputs=tuple(Feature(n, t, ()) for n, t in outputs.items()),
        main=Block((), operations, tuple(outputs)),
        layers={"y": "features.0"},
        metadata={},
    )


def run(kind: str, given: Array, dtype: str = "fp32", /, **parameters: Any) -> Array:
    out = {"fp32": "float32", "fp16": "float32", "int32": "int32", "int8": "int8"}[dtype]
    made = program(operation(kind, {"y": dtype}, **parameters), outputs={"y": out}, inputs={"x": given})
    return Interpreter(made).run({"x": given})["y"]


def test_covers_what_torch_models_become() -> None:
    assert len(OPERATORS) > 130


@pytest.mark.parametrize(
    ("mode", "before", "after"), [("same", (0, 0), (1, 1)), ("same_lower", (1, 1), (0, 0)), ("valid", (0, 0), (0, 0))]
)
def test_padding_of_a_convolution(mode: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    weight = np.random.default_rng(2).standard_normal((3, 2, 2, 2)).astype(np.float32)
    found = run("conv", IMAGE, x="x", weight=weight, pad_type=constant(mode))
    padded = functional.pad(torch.from_numpy(IMAGE), (before[1], after[1], before[0], after[0]))
    np.testing.assert_allclose(found, functional.conv2d(padded, torch.from_numpy(weight)), rtol=1e-5, atol=1e-5)


def test_a_transposed_convolution_longer_than_its_windows_is_bias_there() -> None:
    weight = np.ones((2, 1, 2, 2), np.float32)
    found = run(
        "conv_transpose", IMAGE, x="x", weight=weight, bias=[constant([0.5])], strides=[constant([2, 2])],
        output_shape=[constant([1, 1, 13, 15])],
    )  # fmt: skip
    assert found.shape == (1, 1, 13, 15)
    assert (found[0, 0, 12] == 0.5).all()
    assert (found[0, 0, :, 14] == 0.5).all()


def test_average_pooling_counts_or_skips_the_padding() -> None:
    shared = {"kernel_sizes": [constant([3, 3])], "strides": [constant([2, 2])], "pad": [constant([1, 1, 1, 1])]}
    for skipped in (True, False):
        found = run(
            "avg_pool", IMAGE, x="x", pad_type=constant("custom"),
            exclude_padding_from_average=constant(np.bool_(skipped)), **shared,
        )  # fmt: skip
        wanted = functional.avg_pool2d(torch.from_numpy(IMAGE), 3, 2, 1, count_include_pad=not skipped)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_fp16_results_are_rounded_and_overflow() -> None:
    x = np.array([1.0, 2049.0, 60000.0], np.float32)
    np.testing.assert_array_equal(run("add", x, "fp16", x="x", y=np.float32(0.0)), [1.0, 2048.0, 60000.0])
    assert np.isinf(run("add", x, "fp16", x="x", y="x")[2])


def test_calibration_sees_values_before_rounding() -> None:
    x = np.array([2049.0], np.float32)
    made = program(operation("relu", {"y": "fp16"}, x="x"), outputs={"y": "float32"}, inputs={"x": x})
    seen: dict[str, Array] = {}
    Interpreter(made, rounding=False).run({"x": x}, lambda name, values: seen.update({name: values.copy()}))
    np.testing.assert_array_equal(seen["y"], x)
    np.testing.assert_array_equal(seen["x"], x)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = np.array([0.25, 0.75, -100.0, 100.0], np.float32)
    scale, zero = np.float32(0.5), constant(np.int8(-1))
    np.testing.assert_array_equal(
        run("quantize", x, "int8", input="x", scale=scale, zero_point=zero, output_dtype=constant("int8")),
        [-1, 1, -128, 127],
    )


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"begin": [1, 0], "end": [3, 4], "stride": [1, 2]}, np.s_[1:3, 0:4:2]),
        ({"begin": [3, 0], "end": [0, 4], "stride": [-1, 1]}, np.s_[3:0:-1, 0:4]),
        ({"begin": [-1, 0], "end": [0, -1], "end_mask": [True, False]}, np.s_[-1:, 0:-1]),
        ({"begin": [2, 0], "end": [3, 4], "squeeze_mask": [True, False]}, np.s_[2, 0:4]),
    ],
)
def test_slices(parameters: dict[str, list[Any]], wanted: Any) -> None:
    x = np.arange(20, dtype=np.float32).reshape(4, 5)
    found = run("slice_by_index", x, x="x", **{key: [constant(value)] for key, value in parameters.items()})
    np.testing.assert_array_equal(found, x[wanted])


@pytest.mark.parametrize(("mode", "wanted"), [("add", [3.0, 0.0, 5.0]), ("update", [2.0, 0.0, 5.0])])
def test_scatter_into_a_place_twice(mode: str, wanted: list[float]) -> None:
    x = np.zeros(3, np.float32)
    found = run(
        "scatter", x, data="x", indices=[constant([0, 2, 0])], updates=[constant([1.0, 5.0, 2.0])],
        mode=constant(mode), axis=0,
    )  # fmt: skip
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["STRICT_ALIGN_CORNERS", "DEFAULT", "UNALIGN_CORNERS", "OFFSET_CORNERS"])
def test_resizing_keeps_a_constant_picture(mode: str) -> None:
    x = np.full((1, 1, 3, 4), 2.5, np.float32)
    found = run("resize_bilinear", x, x="x", target_size_height=5, target_size_width=9, sampling_mode=constant(mode))
    np.testing.assert_array_equal(found, np.full((1, 1, 5, 9), 2.5, np.float32))


def expanded(op: Operation) -> Array:
    x = np.zeros((), np.float32)
    add = operation("add", {"y": "fp32"}, x="x", y=op.name)
    return Interpreter(program(op, add, outputs={"y": "float32"}, inputs={"x": x})).run({"x": x})["y"]


def weight_of(kind: str, shape: tuple[int, ...], **parameters: Any) -> Operation:
    op = operation(kind, {"w": "fp32"}, **parameters)
    return Operation(op.type, op.inputs, (Variable("w", ValueType("fp32", shape)),), ())


def test_weights_of_ios_16() -> None:
    data = np.arange(-4, 4, dtype=np.int8).reshape(2, 4)
    affine = weight_of(
        "constexpr_affine_dequantize", (2, 4), quantized_data=constant(data, "int8"), axis=0,
        scale=[constant([0.5, 2.0])], zero_point=[constant(np.array([1, -1], np.int8), "int8")],
    )  # fmt: skip
    np.testing.assert_array_equal(expanded(affine), (data - [[1.0], [-1.0]]) * [[0.5], [2.0]])
    codes = np.array([0b10_01_00_11, 0b00_00_00_01], np.uint8)  # from the lowest bits on
    table = weight_of(
        "constexpr_lut_to_dense", (5,), indices=constant(codes, "uint8"), lut=[constant([0.0, 1.0, 2.0, 3.0])]
    )
    np.testing.assert_array_equal(expanded(table), [3.0, 0.0, 1.0, 2.0, 1.0])


def test_weights_of_ios_18() -> None:
    data = np.arange(8, dtype=np.int8).reshape(2, 4)
    scale = np.array([[1.0, 10.0], [100.0, 1000.0]], np.float32)
    blocks = weight_of("constexpr_blockwise_shift_scale", (2, 4), data=constant(data, "int8"), scale=constant(scale))
    np.testing.assert_array_equal(expanded(blocks), data * np.repeat(scale, 2, axis=1))
    tables = np.array([[0.0, 1.0], [5.0, 7.0]], np.float32).reshape(2, 1, 2, 1)
    codes = np.array([[0, 1], [1, 0]], np.uint8)
    grouped = weight_of("constexpr_lut_to_dense", (2, 2), indices=constant(codes, "uint8"), lut=constant(tables))
    np.testing.assert_array_equal(expanded(grouped), [[0.0, 1.0], [7.0, 5.0]])


def test_a_loop_runs_until_its_condition_fails() -> None:
    x = np.array(0.0, np.float32)
    condition = Block(
        (Variable("a", ValueType("fp32", ())),), (operation("less", {"go": "bool"}, x="a", y=np.float32(4.0)),), ("go",)
    )
    body = Block(
        (Variable("b", ValueType("fp32", ())),),
        (operation("add", {"next": "fp32"}, x="b", y=np.float32(1.5)),),
        ("next",),
    )
    loop = Operation("while_loop", {"loop_vars": ("x",)}, (Variable("y", ValueType("fp32", ())),), (condition, body))
    assert Interpreter(program(loop, outputs={"y": "float32"}, inputs={"x": x})).run({"x": x})["y"] == 4.5


def test_an_unknown_operator_is_named_with_its_layer() -> None:
    made = program(operation("frobnicate", {"y": "fp32"}, x="x"), outputs={"y": "float32"}, inputs={"x": IMAGE})
    with pytest.raises(ConversionError, match=r"operator 'y' of layer 'features\.0': .* the operator frobnicate"):
        Interpreter(made)


def test_an_operator_that_fails_is_named() -> None:
    made = program(
        operation("reshape", {"y": "fp32"}, x="x", shape=[constant([5, 5])]),
        outputs={"y": "float32"}, inputs={"x": IMAGE},
    )  # fmt: skip
    with pytest.raises(ConversionError, match=r"layer 'features\.0': the Core ML reference can't run reshape"):
        Interpreter(made).run({"x": IMAGE})
