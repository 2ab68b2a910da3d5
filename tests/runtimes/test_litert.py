"""Running .tflite files. The files are made by hand here; converted ones are in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.litert import LiteRTRuntime
from edgeopt.runtimes.litert_profile import _names, _Step
from edgeopt.types import Signature, SignatureTensor

WEIGHTS = np.array([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], np.float32)


def _tensor(name: str, shape: list[int], buffer: int = 0) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer = name.encode(), schema.TensorType.FLOAT32, buffer
    tensor.shape = np.array(shape, np.int32)
    return tensor


def _write(path: Path) -> Path:
    """y = x W^T for x of shape (batch, 3), declared as (1, 3)."""
    weights = schema.BufferT()
    weights.data = np.frombuffer(WEIGHTS.tobytes(), np.uint8)
    graph = schema.SubGraphT()
    graph.tensors = [_tensor("x", [1, 3]), _tensor("w", [2, 3], 1), _tensor("y", [1, 2])]
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
    model.version = 3
    model.buffers, model.subgraphs, model.operatorCodes = [schema.BufferT(), weights], [graph], [code]
    flatbuffer_utils.write_model(model, str(path))
    return path


def _signature(batch: int | str = 1) -> Signature:
    return Signature(
        (SignatureTensor("features", "x", (batch, 3), "float32", "float32"),),
        (SignatureTensor("scores", "y", (batch, 2), "float32", "float32"),),
    )


def test_runs_by_the_models_names_and_closes_twice(tmp_path: Path) -> None:
    x = np.array([[1.0, -2.0, 0.5]], np.float32)
    with load_runtime("litert").open(_write(tmp_path / "m.tflite"), _signature()) as session:
        first = session.run({"features": x})["scores"]
        session.run({"features": 2 * x})
        np.testing.assert_allclose(first, x @ WEIGHTS.T)  # A copy: the second run didn't change it.
        session.close()


def test_follows_dynamic_dimensions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with LiteRTRuntime().open(_write(tmp_path / "m.tflite"), _signature("batch")) as session:
        for batch in (1, 4, 4, 2):
            x = random.standard_normal((batch, 3)).astype(np.float32)
            np.testing.assert_allclose(session.run({"features": x})["scores"], x @ WEIGHTS.T, rtol=1e-6)


@pytest.mark.parametrize(("batch", "shape"), [(1, (2, 3)), ("batch", (1, 4))])
def test_names_the_input_with_a_wrong_shape(tmp_path: Path, batch: int | str, shape: tuple[int, int]) -> None:
    with (
        LiteRTRuntime().open(_write(tmp_path / "m.tflite"), _signature(batch)) as session,
        pytest.raises(DataError, match=r"input 'features': has the shape"),
    ):
        session.run({"features": np.zeros(shape, np.float32)})


def test_a_corrupt_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"\x1c\0\0\0TFL3" + bytes(64))
    with pytest.raises(ConversionError, match=r"m\.tflite: LiteRT refuses the file"):
        LiteRTRuntime().open(tmp_path / "m.tflite", _signature())


def test_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgeopt.runtimes.litert.find_spec", {}.get)
    assert "pip install ai-edge-litert" in (LiteRTRuntime().unavailable() or "")
    with pytest.raises(MissingError):
        LiteRTRuntime().open(tmp_path / "m.tflite", _signature())


def test_profile_times_every_operator(tmp_path: Path) -> None:
    with LiteRTRuntime().open(_write(tmp_path / "m.tflite"), _signature()) as session:
        timings = session.profile({"features": np.ones((1, 3), np.float32)}, repetitions=3)
    assert any("Fully Connected" in timing.type for timing in timings)
    assert list(timings) == sorted(timings, key=lambda timing: -timing.ms)


def test_profile_of_a_dynamic_file_is_empty(tmp_path: Path) -> None:
    with LiteRTRuntime().open(_write(tmp_path / "m.tflite"), _signature("batch")) as session:
        assert session.profile({"features": np.ones((1, 3), np.float32)}) == ()


def test_delegated_operators_are_only_named_when_their_order_is_the_files() -> None:
    def steps(*delegated: int) -> list[_Step]:
        return [_Step("RSQRT", 1, False, 5), *(_Step("Add", i, True, 5) for i in delegated)]

    assert _names(["a", "b", "c"], steps(0, 1)) == ["b", "a", "c"]
    assert _names(["a", "b", "c"], steps(0)) == ["b", "XNNPACK 0"]  # One was fused away.
    assert _names(["a", "b", "c"], steps(0, 0)) == ["b", "XNNPACK 0", "XNNPACK 1"]  # Two stretches of the graph.
