"""A .tflite file as `inspect` and the exporters see it."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import UsageError
from edgeopt.formats import summarize
from edgeopt.formats.litert import layer_of
from edgeopt.types import QuantParams

CORAL = Path(__file__).parents[2].parent / "shared" / "data" / "coral"


def _tensor(
    name: str,
    dtype: int,
    shape: list[int],
    buffer: int = 0,
    scale: tuple[float, ...] = (),
    zero_point: int = 0,
) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer = name.encode(), dtype, buffer
    tensor.shape = np.array(shape, np.int32)
    if scale:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = np.array(scale, np.float32)
        tensor.quantization.zeroPoint = np.full(len(scale), zero_point, np.int64)
    return tensor


def _write(path: Path, activations: int, name: str = "head", dynamic_batch: bool = False) -> Path:
    """One fully connected layer, 3 -> 2, with int8 weights per channel and the given type of input and output."""
    quantized = activations == schema.TensorType.INT8
    weights = schema.BufferT()
    weights.data = np.arange(6, dtype=np.uint8)
    graph = schema.SubGraphT()
    graph.tensors = [
        _tensor("x", activations, [1, 3], scale=(0.5,) if quantized else (), zero_point=3),
        _tensor(f"{name}/1", schema.TensorType.INT8, [2, 3], 1, scale=(0.1, 0.2)),
        _tensor(name, activations, [1, 2], scale=(0.25,) if quantized else (), zero_point=-5),
    ]
    if dynamic_batch:
        graph.tensors[0].shapeSignature = np.array([-1, 3], np.int32)
    operator = schema.OperatorT()
    operator.opcodeIndex = 0
    operator.inputs, operator.outputs = np.array([0, 1, -1], np.int32), np.array([2], np.int32)
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    graph.operators = [operator]
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([2], np.int32)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    model = schema.ModelT()
    model.version, model.description = 3, b"made by hand"
    model.buffers, model.subgraphs, model.operatorCodes = [schema.BufferT(), weights], [graph], [code]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    signature.inputs, signature.outputs = [schema.TensorMapT()], [schema.TensorMapT()]
    signature.inputs[0].name, signature.inputs[0].tensorIndex = b"features", 0
    signature.outputs[0].name, signature.outputs[0].tensorIndex = b"logits", 2
    model.signatureDefs = [signature]
    flatbuffer_utils.write_model(model, str(path))
    return path


def test_static_int8(tmp_path: Path) -> None:
    summary = summarize(_write(tmp_path / "m.tflite", schema.TensorType.INT8))
    (op,) = summary.ops
    assert (op.name, op.type, op.dtype, op.weight_bytes) == ("head", "FULLY_CONNECTED", "int8", 6)
    (given,), (made,) = summary.signature.inputs, summary.signature.outputs
    assert (given.name, given.shape, given.dtype, given.model_dtype) == ("features", (1, 3), "int8", "float32")
    assert given.quantization == QuantParams((0.5,), (3,))
    assert (made.name, made.quantization) == ("logits", QuantParams((0.25,), (-5,)))
    assert summary.metadata["description"] == "made by hand"
    assert summary.size_bytes == (tmp_path / "m.tflite").stat().st_size


def test_int8_weights_with_float_activations_are_dynamic(tmp_path: Path) -> None:
    (op,) = summarize(_write(tmp_path / "m.tflite", schema.TensorType.FLOAT32)).ops
    assert op.dtype == "int8-dynamic"


def test_dynamic_dimensions_have_names(tmp_path: Path) -> None:
    summary = summarize(_write(tmp_path / "m.tflite", schema.TensorType.FLOAT32, dynamic_batch=True))
    assert summary.signature.inputs[0].shape == ("features_dim0", 3)


@pytest.mark.parametrize(
    ("tensor", "shown"),
    [
        ("features.0.conv", "features.0.conv"),
        ("features.0.conv:1", "features.0.conv:1"),
        ("my.pkg.Net/torch.nn.modules.conv.Conv2d_stem;", "stem"),
        ("m.Net_model/m.Block_0/m.Conv__project_conv;;m.Net_model/m.Block_0/m.BN_bn;2", "model.0._project_conv:2"),
        ("m.Net;1", "(root):1"),
        (":3", "(root):3"),
        (
            "MobilenetV1/Conv2d_0/Relu6;MobilenetV1/Conv2d_0/bias",
            "MobilenetV1/Conv2d_0/Relu6;MobilenetV1/Conv2d_0/bias",
        ),
        ("", "FULLY_CONNECTED"),
    ],
)
def test_operator_names(tmp_path: Path, tensor: str, shown: str) -> None:
    (op,) = summarize(_write(tmp_path / "m.tflite", schema.TensorType.INT8, name=tensor)).ops
    assert op.name == shown


def test_layer_of() -> None:
    assert layer_of("features.0.conv:1") == layer_of("features.0.conv") == "features.0.conv"


def test_a_file_cut_short_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = _write(tmp_path / "m.tflite", schema.TensorType.INT8).read_bytes()
    cut = tmp_path / "cut.tflite"
    for length in range(0, len(whole) - 1, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="truncated"):
            summarize(cut)


def test_damage_never_crashes(tmp_path: Path) -> None:
    whole = _write(tmp_path / "m.tflite", schema.TensorType.INT8).read_bytes()
    broken, random_ = tmp_path / "broken.tflite", random.Random(0)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(random_.randint(1, 8)):
            data[random_.randrange(8, len(data))] = random_.randrange(256)
        broken.write_bytes(data)
        with suppress(UsageError):
            summarize(broken)


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"PK\x03\x04 this is a zip archive")
    with pytest.raises(UsageError, match="is not a LiteRT file"):
        summarize(tmp_path / "m.tflite")


@pytest.mark.skipif(not CORAL.is_dir(), reason=f"needs {CORAL}")
def test_files_of_others() -> None:
    summary = summarize(CORAL / "mobilenet_v1_0.25_128_quant.tflite")
    assert {op.dtype for op in summary.ops} == {"uint8"}
    assert summary.signature.inputs[0].quantization == QuantParams((0.0078125,), (128,))
    compiled = summarize(CORAL / "mobilenet_v1_0.25_128_quant_edgetpu.tflite")
    assert [op.type for op in compiled.ops] == ["edgetpu-custom-op"]
