"""A .tflite file whose weights were streamed holds the same as one that FlatBuffers' builder wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from edgeopt.errors import ConversionError
from edgeopt.formats import litert_write
from edgeopt.formats.litert import summarize
from edgeopt.formats.litert_write import write_model


def _adder(values: np.ndarray) -> schema.ModelT:
    """y = x + values, all of one shape."""
    shape = np.array(values.shape, np.int32)
    tensors = [
        schema.TensorT(name=name, shape=shape, type=schema.TensorType.FLOAT32, buffer=buffer)
        for name, buffer in ((b"x", 0), (b"values", 1), (b"y", 0))
    ]
    add = schema.OperatorT(
        opcodeIndex=0,
        inputs=np.array([0, 1], np.int32),
        outputs=np.array([2], np.int32),
        builtinOptionsType=schema.BuiltinOptions.AddOptions,
        builtinOptions=schema.AddOptionsT(),
    )
    graph = schema.SubGraphT(
        tensors=tensors, inputs=np.array([0], np.int32), outputs=np.array([2], np.int32), operators=[add]
    )
    code = schema.OperatorCodeT(builtinCode=schema.BuiltinOperator.ADD, version=1)
    buffers = [schema.BufferT(), schema.BufferT(data=values.view(np.uint8).reshape(-1))]
    return schema.ModelT(version=3, operatorCodes=[code], subgraphs=[graph], buffers=buffers)


def _values(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, count)).astype(np.float32)


@pytest.mark.parametrize("count", [7, 1021, 5000])
def test_the_runtime_reads_what_was_streamed(tmp_path: Path, count: int) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path, values = tmp_path / "model.tflite", _values(count)
    model = _adder(values)
    write_model(model, path)
    assert model.buffers[1].data.nbytes == values.nbytes  # the object is as it was
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, np.ones((1, count), np.float32))
    interpreter.invoke()
    np.testing.assert_array_equal(interpreter.get_tensor(2), values + 1)
    assert summarize(path).ops[0].weight_bytes == values.nbytes


def test_weights_are_aligned_and_read_back(tmp_path: Path) -> None:
    path, values = tmp_path / "model.tflite", _values(5003)
    write_model(_adder(values), path)
    data = path.read_bytes()
    assert data.index(values.tobytes()) % 16 == 0
    again = flatbuffer_utils.read_model(str(path))
    assert again.buffers[1].data.tobytes() == values.tobytes()
    assert len(data) < values.nbytes + 2048


def test_a_file_may_be_written_over_the_one_it_was_read_from(tmp_path: Path) -> None:
    path, values = tmp_path / "model.tflite", _values(5000)
    write_model(_adder(values), path)
    first = path.read_bytes()
    model = flatbuffer_utils.read_model(str(path))  # its weights are views of the file
    model.subgraphs[0].tensors[2].name = b"sum"
    write_model(model, path)
    assert summarize(path).ops[0].name == "sum"
    assert path.read_bytes() != first
    model.subgraphs[0].tensors[2].name = b"y"
    write_model(model, path)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["model.tflite"]


def test_what_fits_no_file_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert_write, "_LARGEST", 10_000)
    with pytest.raises(ConversionError, match="one LiteRT file holds less than 2 GiB"):
        write_model(_adder(_values(5000)), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.tflite"
    write_model(_adder(_values(5000)), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(litert_write, "_write", fail)
    with pytest.raises(OSError, match="no space"):
        write_model(_adder(_values(6000)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.tflite"]
