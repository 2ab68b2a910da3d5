from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt.errors import ConversionError, DataError
from edgeopt.formats.onnx import summarize
from edgeopt.runtimes.onnxruntime import OnnxRuntime


def save(path: Path, nodes: list[onnx.NodeProto], inputs: object, outputs: object) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def add(path: Path, elem: int = TensorProto.FLOAT) -> Path:
    node = helper.make_node("Add", ["a", "b"], ["c"], name="layer/Add")
    return save(path, [node], [("a", elem, ["n", 3]), ("b", elem, ["n", 3])], [("c", elem, ["n", 3])])


@pytest.mark.parametrize(
    ("elem", "dtype"), [(TensorProto.FLOAT, "float32"), (TensorProto.INT64, "int64"), (TensorProto.FLOAT16, "float16")]
)
def test_runs_each_type_with_dynamic_batch(tmp_path: Path, elem: int, dtype: str) -> None:
    path = add(tmp_path / "m.onnx", elem)
    with OnnxRuntime().open(path, summarize(path).signature) as session:
        for batch in (0, 1, 4):
            x = np.ones((batch, 3), dtype)
            result = session.run({"a": x, "b": x})["c"]
            assert result.shape == (batch, 3)
            assert result.dtype == dtype
            assert (result == 2).all()


def test_bool_output(tmp_path: Path) -> None:
    node = helper.make_node("Not", ["a"], ["b"], name="Not")
    path = save(tmp_path / "m.onnx", [node], [("a", TensorProto.BOOL, [2])], [("b", TensorProto.BOOL, [2])])
    with OnnxRuntime().open(path, summarize(path).signature) as session:
        assert session.run({"a": np.array([True, False])})["b"].tolist() == [False, True]


def test_wrong_shape_names_input_expected_and_given(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    good, bad = np.ones((1, 3), np.float32), np.ones((1, 4), np.float32)
    with (
        OnnxRuntime().open(path, summarize(path).signature) as session,
        pytest.raises(DataError, match=r"input 'b': has the shape \(1, 4\), the model takes \(n, 3\)"),
    ):
        session.run({"a": good, "b": bad})


def test_sizes_that_contradict_each_other_are_a_data_error(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    with OnnxRuntime().open(path, summarize(path).signature) as session, pytest.raises(DataError, match=r"m\.onnx"):
        session.run({"a": np.ones((2, 3), np.float32), "b": np.ones((5, 3), np.float32)})


def test_missing_input(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    with OnnxRuntime().open(path, summarize(path).signature) as session, pytest.raises(DataError, match="'b'"):
        session.run({"a": np.ones((1, 3), np.float32)})


def test_profile_names_operators_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add(tmp_path / "m.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(scratch)
    x = np.ones((1, 3), np.float32)
    with OnnxRuntime().open(path, summarize(path).signature) as session:
        timings = session.profile({"a": x, "b": x}, repetitions=3)
    assert [(t.name, t.type) for t in timings] == [("layer/Add", "Add")]
    assert timings[0].ms >= 0
    assert list(scratch.iterdir()) == []


def test_refused_file_is_a_conversion_error(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    signature = summarize(path).signature
    path.write_bytes(b"junk")
    with pytest.raises(ConversionError, match="refuses the file"):
        OnnxRuntime().open(path, signature)


def test_close_twice(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    session = OnnxRuntime().open(path, summarize(path).signature)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run({"a": np.ones((1, 3), np.float32), "b": np.ones((1, 3), np.float32)})
