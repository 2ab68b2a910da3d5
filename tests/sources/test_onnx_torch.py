"""`as_torch` compares every rebuilt module with ONNX Runtime itself, so most tests here only ask it to succeed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import ConversionError
from edgeopt.sources import SourceOptions, as_torch, load_model
from edgeopt.types import Dim, Model

RNG = np.random.default_rng(0)
Attributes = Mapping[str, object]


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def build(
    path: Path,
    nodes: Sequence[tuple[str, Sequence[str], Sequence[str], Attributes]],
    inputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, np.ndarray],
    opset: int = 18,
    input_type: int = TensorProto.FLOAT,
) -> Model:
    graph = helper.make_graph(
        [helper.make_node(op, i, o, name=f"{op}_{index}", **a) for index, (op, i, o, a) in enumerate(nodes)],
        "g",
        [helper.make_tensor_value_info(name, input_type, list(shape)) for name, shape in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in nodes[-1][2]],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    for value in model.graph.output:
        if not value.type.HasField("tensor_type"):
            # Shape inference doesn't look into operators that are functions.
            rank = len(next(iter(inputs.values())))
            value.CopyFrom(helper.make_tensor_value_info(value.name, input_type, [f"d{axis}" for axis in range(rank)]))
    onnx.save(model, path)
    return load_model(str(path), SourceOptions())


# op, shape of x, further constant inputs, attributes, opset
SINGLE: list[tuple[str, tuple[int, ...], list[np.ndarray | None], Attributes, int]] = [
    *(
        (op, (2, 3, 4), [], {}, 18)
        for op in (
            "Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg",
            "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "Celu", "IsNaN",
            "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2",
            "ReduceLogSumExp", "ReduceSumSquare", "Softmax", "LogSoftmax", "ArgMax", "ArgMin", "Flatten", "Transpose",
            "Identity", "Dropout", "LpNormalization", "Trilu", "Atan",
        )
    ),
    ("Gelu", (2, 3), [], {"approximate": "tanh"}, 20),
    ("HardSigmoid", (2, 3), [], {"alpha": 1 / 6, "beta": 0.5}, 18),
    ("Clip", (2, 3), [np.float32(0), np.float32(6)], {}, 18),
    ("Clip", (2, 3), [None, np.float32(0.5)], {}, 18),
    ("Clip", (2, 3), [], {"min": -0.5, "max": 0.5}, 9),
    ("Softmax", (2, 3, 4), [], {"axis": 1}, 11),
    ("ReduceMean", (2, 3, 4), [], {"axes": [1], "keepdims": 0}, 13),
    ("ReduceSum", (2, 3, 4), [ints(-1)], {"keepdims": 0}, 18),
    ("ReduceProd", (2, 3, 4), [ints(0, 2)], {"keepdims": 0}, 18),
    ("Div", (2, 3), [f32(3)], {}, 18),
    ("Pow", (2, 3), [np.float32(2)], {}, 18),
    ("Sub", (3,), [f32(1, 1)], {}, 18),
    ("Mod", (4,), [f32(4)], {"fmod": 1}, 18),
    ("Max", (4,), [f32(4), f32(1)], {}, 18),
    ("Mean", (4,), [f32(2, 4)], {}, 18),
    ("PRelu", (2, 3, 4), [f32(3, 1)], {}, 18),
    ("MatMul", (2, 5, 3), [f32(3, 4)], {}, 18),
    ("MatMul", (2, 5, 3), [f32(2, 3, 4)], {}, 18),
    ("Gemm", (2, 3), [f32(3, 4), f32(4)], {"alpha": 0.5, "beta": 2.0}, 18),
    ("Gemm", (2, 3), [f32(4, 3), f32(1, 1)], {"transB": 1}, 18),
    ("Gemm", (3, 2), [f32(3, 4), f32(2, 4)], {"transA": 1}, 18),
    ("Einsum", (2, 3, 4), [f32(2, 4, 5)], {"equation": "bij,bjk->bik"}, 18),
    ("CumSum", (2, 3), [np.array(1, np.int64)], {}, 18),
    ("Cast", (2, 3), [], {"to": TensorProto.INT32}, 18),
    ("Conv", (1, 4, 9, 9), [f32(6, 2, 3, 3), f32(6)], {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]}, 18),
    ("Conv", (1, 4, 9, 9), [f32(6, 4, 3, 3)], {"pads": [0, 1, 2, 1], "dilations": [2, 1]}, 18),
    ("Conv", (1, 4, 9, 8), [f32(6, 4, 3, 2)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 18),
    ("Conv", (1, 4, 9, 8), [f32(6, 4, 3, 2)], {"auto_pad": "SAME_LOWER"}, 18),
    ("Conv", (1, 4, 9), [f32(6, 4, 3), f32(6)], {"pads": [1, 1]}, 18),
    ("Conv", (1, 2, 5, 5, 5), [f32(3, 2, 3, 3, 3)], {}, 18),
    ("ConvTranspose", (1, 4, 5, 5), [f32(4, 3, 3, 3), f32(6)], {"group": 2, "strides": [2, 2], "pads": [1] * 4}, 18),
    ("ConvTranspose", (1, 4, 5, 5), [f32(4, 3, 3, 3)], {"strides": [2, 2], "pads": [1, 1, 0, 0]}, 18),
    ("ConvTranspose", (1, 4, 5), [f32(4, 3, 3)], {"strides": [2], "output_padding": [1]}, 18),
    ("BatchNormalization", (2, 3, 4, 4), [f32(3), f32(3), f32(3), np.abs(f32(3))], {"epsilon": 1e-3}, 18),
    ("BatchNormalization", (2, 3), [f32(3), f32(3), f32(3), np.abs(f32(3))], {}, 18),
    ("LayerNormalization", (2, 3, 4), [f32(4), f32(4)], {"epsilon": 1e-3}, 18),
    ("LayerNormalization", (2, 3, 4), [f32(3, 4)], {"axis": 1}, 18),
    ("InstanceNormalization", (2, 3, 4, 4), [f32(3), f32(3)], {}, 18),
    ("GroupNormalization", (2, 4, 3, 3), [f32(4), f32(4)], {"num_groups": 2}, 21),
    ("LRN", (1, 5, 4, 4), [], {"size": 3, "alpha": 0.5}, 18),
    ("GlobalAveragePool", (1, 3, 4, 4), [], {}, 18),
    ("GlobalMaxPool", (1, 3, 4, 5), [], {}, 18),
    ("AveragePool", (1, 3, 7, 7), [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 18),
    ("AveragePool", (1, 3, 7, 7), [], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 1}, 18),
    ("AveragePool", (1, 3, 7, 7), [], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, 18),
    ("MaxPool", (1, 3, 7, 7), [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}, 18),
    ("MaxPool", (1, 3, 7), [], {"kernel_shape": [3], "dilations": [2], "ceil_mode": 1, "strides": [2]}, 18),
    ("Resize", (1, 2, 4, 4), [None, np.array([1, 1, 2, 2], np.float32)], {}, 18),
    ("Resize", (1, 2, 4, 4), [None, None, ints(1, 2, 7, 6)], {"nearest_mode": "ceil"}, 18),
    ("Resize", (1, 2, 4, 4), [None, None, ints(1, 2, 3, 9)], {"coordinate_transformation_mode": "align_corners"}, 18),
    ("Resize", (1, 2, 4, 5), [None, None, ints(1, 2, 7, 3)], {"mode": "linear"}, 18),
    ("Resize", (1, 2, 5, 5), [None, np.array([1, 1, 1.7, 0.5], np.float32)], {"mode": "linear"}, 18),
    ("Resize", (1, 2, 4, 5), [None, None, ints(7, 9)], {"mode": "cubic", "axes": [2, 3], "cubic_coeff_a": -0.75}, 18),
    ("Upsample", (1, 2, 4, 4), [np.array([1, 1, 2, 3], np.float32)], {}, 9),
    ("Pad", (2, 3), [ints(0, 1, 2, 0), np.float32(1.5)], {}, 18),
    ("Pad", (1, 2, 4, 4), [ints(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "reflect"}, 18),
    ("Pad", (1, 2, 4, 4), [ints(1, 1), None, ints(2)], {"mode": "edge"}, 18),
    ("Pad", (2, 3), [], {"pads": [1, 0, 0, 1]}, 9),
    ("Reshape", (2, 3, 4), [ints(0, -1)], {}, 18),
    ("Flatten", (2, 3, 4), [], {"axis": 2}, 18),
    ("Flatten", (2, 3, 4), [], {"axis": 0}, 18),
    ("Squeeze", (2, 1, 3, 1), [ints(1)], {}, 18),
    ("Squeeze", (2, 1, 3, 1), [], {"axes": [-1]}, 11),
    ("Unsqueeze", (2, 3), [ints(0, -1)], {}, 18),
    ("Transpose", (2, 3, 4), [], {"perm": [1, 2, 0]}, 18),
    ("Expand", (3, 1), [ints(2, 1, 4)], {}, 18),
    ("Tile", (2, 3), [ints(2, 1)], {}, 18),
    ("Concat", (2, 3), [f32(2, 1)], {"axis": -1}, 18),
    ("Slice", (5, 6), [ints(1, 2), ints(4, 2**63 - 1)], {}, 18),
    ("Slice", (5, 6), [ints(-1), ints(-(2**63)), ints(1), ints(-2)], {}, 18),
    ("Slice", (5, 6), [ints(3), ints(0), ints(0), ints(-1)], {}, 18),
    ("Slice", (5, 6), [], {"starts": [1], "ends": [-1], "axes": [1]}, 9),
    ("Gather", (4, 3), [np.array(-1, np.int64)], {"axis": 0}, 18),
    ("Gather", (4, 3), [np.array([[0, -1], [1, 1]], np.int64)], {"axis": 1}, 18),
    ("GatherElements", (2, 2), [np.array([[0, 0], [1, 0]], np.int64)], {"axis": 1}, 18),
    ("GatherND", (3, 4), [np.array([[0, 1], [2, 3]], np.int64)], {}, 18),
    ("ScatterND", (4, 2), [np.array([[1], [3]], np.int64), f32(2, 2)], {}, 18),
    ("DepthToSpace", (1, 8, 2, 3), [], {"blocksize": 2}, 18),
    ("DepthToSpace", (1, 8, 2, 3), [], {"blocksize": 2, "mode": "CRD"}, 18),
    ("SpaceToDepth", (1, 2, 4, 6), [], {"blocksize": 2}, 18),
]  # fmt: skip


@pytest.mark.parametrize(("op", "shape", "constants", "attributes", "opset"), SINGLE)
def test_one_operator_computes_what_onnx_runtime_computes(
    tmp_path: Path,
    op: str,
    shape: tuple[int, ...],
    constants: list[np.ndarray | None],
    attributes: Attributes,
    opset: int,
) -> None:
    names = ["x", *(f"c{index}" if value is not None else "" for index, value in enumerate(constants))]
    weights = {f"c{index}": np.asarray(value) for index, value in enumerate(constants) if value is not None}
    model = build(tmp_path / "net.onnx", [(op, names, ["y"], attributes)], {"x": shape}, weights, opset)
    rebuilt = as_torch(model)
    assert rebuilt.module is not None
    assert rebuilt.history[-1].step == "onnx-to-torch"
    torch.export.export(rebuilt.module, (torch.from_numpy(model.example_inputs["x"]),))


@pytest.mark.parametrize(
    ("op", "outputs", "constants", "attributes"),
    [
        ("Split", ["a", "b"], [ints(1, 6)], {"axis": 1}),
        ("Split", ["a", "b", "c", "d"], [], {"axis": 1, "num_outputs": 4}),
        ("TopK", ["a", "b"], [ints(2)], {}),
    ],
)
def test_several_outputs(
    tmp_path: Path, op: str, outputs: list[str], constants: list[np.ndarray], attributes: Attributes
) -> None:
    weights = {f"c{index}": value for index, value in enumerate(constants)}
    model = build(tmp_path / "net.onnx", [(op, ["x", *weights], outputs, attributes)], {"x": (2, 7)}, weights)
    assert [spec.name for spec in as_torch(model).outputs] == outputs


def test_weights_become_layers_named_after_their_nodes(tmp_path: Path) -> None:
    nodes = [
        ("Conv", ["x", "w"], ["a"], {}),
        ("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"], {}),
        ("Relu", ["n"], ["r"], {}),
        ("ReduceMean", ["r", "axes"], ["p"], {"keepdims": 0}),
        ("MatMul", ["p", "k"], ["q"], {}),
        ("Add", ["bias", "q"], ["y"], {}),
    ]
    weights = {
        "w": f32(4, 3, 3, 3), "s": f32(4), "b": f32(4), "m": f32(4), "v": np.abs(f32(4)),
        "axes": ints(2, 3), "k": f32(4, 2), "bias": f32(2),
    }  # fmt: skip
    module = as_torch(build(tmp_path / "net.onnx", nodes, {"x": (1, 3, 8, 8)}, weights)).module
    layers = {type(part).__name__: name for name, part in module.named_modules()}
    assert layers["Conv2d"] == "edgeopt_model.Conv_0"
    assert module.get_submodule(layers["Linear"]).bias is not None
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_arithmetic_on_sizes_stays_dynamic(tmp_path: Path) -> None:
    nodes = [
        ("Shape", ["x"], ["shape"], {}),
        ("Gather", ["shape", "zero"], ["batch"], {}),
        ("Gather", ["shape", "one"], ["length"], {}),
        ("Mul", ["length", "four"], ["flat"], {}),
        ("Unsqueeze", ["batch", "axis"], ["b"], {}),
        ("Unsqueeze", ["flat", "axis"], ["f"], {}),
        ("Concat", ["b", "f"], ["target"], {"axis": 0}),
        ("Reshape", ["x", "target"], ["y"], {}),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "four": np.array(4), "axis": ints(0)}
    model = as_torch(build(tmp_path / "net.onnx", nodes, {"x": ("n", "t", 4)}, weights))
    assert model.outputs[0].shape == (Dim("n"), Dim("y_1", 4, 2048))
    dims = {0: torch.export.Dim("n", max=512), 1: torch.export.Dim("t", max=512)}
    program = torch.export.export(
        model.module, (torch.from_numpy(model.example_inputs["x"]),), dynamic_shapes={"x": dims}
    )
    assert program.module(check_guards=False)(torch.zeros(3, 5, 4)).shape == (3, 20)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("Hardmax", ["x"], ["y"], {})], ["operator Hardmax", "'Hardmax_0'"]),
        ([("NonZero", ["x"], ["y"], {})], ["operator NonZero", "'NonZero_0'"]),
        (
            [("QuantizeLinear", ["x", "scale"], ["q"], {}), ("DequantizeLinear", ["q", "scale"], ["y"], {})],
            ["quantized already", "'QuantizeLinear_0'"],
        ),
        ([("MaxPool", ["x"], ["y", "indices"], {"kernel_shape": [2, 2]})], ["operator MaxPool", "'MaxPool_0'"]),
    ],
)
def test_an_operator_that_cannot_be_rebuilt_is_named(
    tmp_path: Path, nodes: list[tuple[str, list[str], list[str], Attributes]], words: list[str]
) -> None:
    model = build(tmp_path / "net.onnx", nodes, {"x": (1, 1, 4, 4)}, {"scale": np.float32(0.1)})
    with pytest.raises(ConversionError) as caught:
        as_torch(model)
    assert all(word in caught.value.line() for word in words)


def test_a_model_with_a_module_is_returned_as_it_is(tmp_path: Path) -> None:
    model = as_torch(build(tmp_path / "net.onnx", [("Relu", ["x"], ["y"], {})], {"x": (2,)}, {}))
    assert as_torch(model) is model
