"""The reference kernels on a file whose result depends on the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import ConversionError, MissingError
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.litert_reference import LiteRTReference
from edgeopt.types import QuantParams, Signature, SignatureTensor

SCALE = 0.1
PARAMS = QuantParams((SCALE,), (0,))
SIGNATURE = Signature(
    (SignatureTensor("x", "x", (1, 4), "int8", "float32", quantization=PARAMS),),
    (SignatureTensor("y", "y", (1, 4), "int8", "float32", quantization=PARAMS),),
)


def _tensor(name: str) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.shape = name.encode(), schema.TensorType.INT8, [1, 4]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale, tensor.quantization.zeroPoint = [SCALE], [0]
    return tensor


def _write(path: Path) -> Path:
    """y = relu(x) in int8."""
    model, graph, code, operator = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RELU
    code.version = 2
    operator.inputs, operator.outputs = [0], [1]
    graph.tensors, graph.operators, graph.inputs, graph.outputs = [_tensor("x"), _tensor("y")], [operator], [0], [1]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT()]
    flatbuffer_utils.write_model(model, str(path))
    return path


def test_runs_a_file_and_says_that_it_stands_in(tmp_path: Path) -> None:
    runtime = load_runtime("litert-reference")
    assert isinstance(runtime, LiteRTReference)
    assert runtime.formats == ("litert",)
    assert runtime.emulates is not None
    assert "may differ" in runtime.emulates
    with runtime.open(_write(tmp_path / "m.tflite"), SIGNATURE) as session:
        result = session.run({"x": np.array([[-1.0, 0.0, 0.55, 2.0]], np.float32)})
    np.testing.assert_allclose(result["y"], [[0, 0, 0.6, 2.0]], atol=1e-6)


def test_its_times_are_never_shown(tmp_path: Path) -> None:
    with LiteRTReference().open(_write(tmp_path / "m.tflite"), SIGNATURE) as session:
        assert session.profile({"x": np.zeros((1, 4), np.float32)}) == ()


def test_no_operator_goes_to_a_delegate(tmp_path: Path) -> None:
    from ai_edge_litert import interpreter as litert

    kinds = litert.OpResolverType
    path = str(_write(tmp_path / "m.tflite"))
    interpreter = litert.Interpreter(path, experimental_op_resolver_type=kinds.BUILTIN_REF)
    interpreter.allocate_tensors()
    assert [op["op_name"] for op in interpreter._get_ops_details()] == ["RELU"]


def test_a_file_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(b"not a model")
    with pytest.raises(ConversionError, match="LiteRT refuses the file"):
        LiteRTReference().open(path, SIGNATURE)


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgeopt.runtimes.litert.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="pip install ai-edge-litert"):
        LiteRTReference().open(tmp_path / "m.tflite", SIGNATURE)
