"""Instrumented .tflite files: the same answers, and inner tensors beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import UsageError
from edgeopt.formats import summarize
from edgeopt.formats.probe import Probed, add_probes
from edgeopt.runtimes.litert import LiteRTRuntime
from edgeopt.types import Array, QuantParams

X = np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)
FLOAT, INT8 = schema.TensorType.FLOAT32, schema.TensorType.INT8


class Builder:
    """A model of one subgraph, one call per operator."""

    def __init__(self) -> None:
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers, self.model.subgraphs, self.model.operatorCodes = [schema.BufferT()], [self.graph], []

    def tensor(
        self, name: str, kind: int, shape: list[int], data: Array | None = None, scale: float = 0.0, zero: int = 0
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.shape, tensor.buffer = name.encode(), kind, np.array(shape, np.int32), 0
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        if scale:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.array([scale], np.float32)
            tensor.quantization.zeroPoint = np.array([zero], np.int64)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, kind: str, inputs: list[int], output: int) -> int:
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, kind)
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), 1
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        if kind == "FULLY_CONNECTED":
            operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
            operator.builtinOptions = schema.FullyConnectedOptionsT()
        self.graph.operators.append(operator)
        return output

    def write(self, path: Path, source: int, result: int, *, signature: bool) -> Path:
        self.graph.inputs, self.graph.outputs = np.array([source], np.int32), np.array([result], np.int32)
        if signature:
            definition = schema.SignatureDefT()
            definition.signatureKey, definition.subgraphIndex = b"serving_default", 0
            definition.inputs, definition.outputs = [schema.TensorMapT()], [schema.TensorMapT()]
            definition.inputs[0].name, definition.inputs[0].tensorIndex = b"x", source
            definition.outputs[0].name, definition.outputs[0].tensorIndex = b"y", result
            self.model.signatureDefs = [definition]
        flatbuffer_utils.write_model(self.model, str(path))
        return path


def float_net(path: Path, *, signature: bool = True, names: tuple[str, ...] = ("body.0", "body.1", "head")) -> Path:
    """fully connected -> relu -> fully connected."""
    build, random = Builder(), np.random.default_rng(1)
    x = build.tensor("x", FLOAT, [1, 4])
    w1 = build.tensor("w1", FLOAT, [5, 4], random.standard_normal((5, 4)).astype(np.float32))
    w2 = build.tensor("w2", FLOAT, [3, 5], random.standard_normal((3, 5)).astype(np.float32))
    a = build.operator("FULLY_CONNECTED", [x, w1, -1], build.tensor(names[0], FLOAT, [1, 5]))
    r = build.operator("RELU", [a], build.tensor(names[1], FLOAT, [1, 5]))
    y = build.operator("FULLY_CONNECTED", [r, w2, -1], build.tensor(names[2], FLOAT, [1, 3]))
    return build.write(path, x, y, signature=signature)


def int8_net(path: Path) -> Path:
    """quantize -> fully connected -> dequantize."""
    build, random = Builder(), np.random.default_rng(1)
    x = build.tensor("x", FLOAT, [1, 4])
    weights = build.tensor("w", INT8, [3, 4], random.integers(-127, 127, (3, 4)).astype(np.int8), 0.01)
    q = build.operator("QUANTIZE", [x], build.tensor("x_quantized", INT8, [1, 4], scale=0.02, zero=3))
    a = build.operator("FULLY_CONNECTED", [q, weights, -1], build.tensor("head", INT8, [1, 3], scale=0.03, zero=-5))
    y = build.operator("DEQUANTIZE", [a], build.tensor("head_dequant", FLOAT, [1, 3]))
    return build.write(path, x, y, signature=True)


def probe(path: Path) -> Probed:
    return add_probes(path, summarize(path).signature, path.with_name("probed.tflite"))


def run(path: Path, probed: Probed | None = None) -> dict[str, Array]:
    signature = probed.signature if probed else summarize(path).signature
    with LiteRTRuntime().open(probed.path if probed else path, signature) as session:
        return session.run({signature.inputs[0].name: X})


@pytest.mark.parametrize("signature", [True, False])
def test_float_layers_are_seen_after_their_activation(tmp_path: Path, signature: bool) -> None:
    path = float_net(tmp_path / "m.tflite", signature=signature)
    probed = probe(path)
    assert [(p.layer, p.type, p.inputs) for p in probed.points] == [
        ("body.0", "FULLY_CONNECTED", ()),
        ("head", "FULLY_CONNECTED", (0,)),
    ]
    outputs = run(path, probed)
    (own,) = run(path).items()
    np.testing.assert_array_equal(outputs[own[0]], own[1])
    np.testing.assert_array_equal(outputs["probe:1"], own[1])
    assert outputs["probe:0"].shape == (1, 5)
    assert outputs["probe:0"].min() == 0


def test_int8_layers_are_seen_as_integers_with_their_scale(tmp_path: Path) -> None:
    path = int8_net(tmp_path / "m.tflite")
    probed = probe(path)
    (point,) = probed.points
    assert (point.layer, point.tensor.dtype, point.inputs) == ("head", "int8", ())
    assert point.tensor.quantization == QuantParams((float(np.float32(0.03)),), (-5,))
    outputs = run(path, probed)
    np.testing.assert_array_equal(outputs["y"], run(path)["y"])
    np.testing.assert_array_equal(outputs["probe:0"], outputs["y"])


def test_the_outermost_module_has_no_layer(tmp_path: Path) -> None:
    path = float_net(tmp_path / "m.tflite", names=(":1", ":2", "m.Net;1"))
    assert [p.layer for p in probe(path).points] == ["", ""]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = float_net(tmp_path / "m.tflite")
    signature = summarize(path).signature
    path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(UsageError, match="is corrupt or truncated"):
        add_probes(path, signature, tmp_path / "p.tflite")
