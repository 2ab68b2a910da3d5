"""OpenVINO as a runtime: types, shapes, threads, errors, a fresh process, no telemetry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import ConversionError, DataError
from edgeopt.formats.onnx import summarize
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes import openvino as runtime
from edgeopt.runtimes.onnxruntime import OnnxRuntime
from edgeopt.runtimes.openvino import OpenVinoRuntime, read
from edgeopt.validation.benchmark import TimedFile, benchmark_pair

pytest.importorskip("openvino", reason="needs openvino")


def save(path: Path, nodes: list[onnx.NodeProto], inputs: object, outputs: object, constants: object = ()) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def add(path: Path, elem: int = TensorProto.FLOAT) -> Path:
    node = helper.make_node("Add", ["a", "b"], ["c"], name="layer/Add")
    return save(path, [node], [("a", elem, ["n", 3]), ("b", elem, ["n", 3])], [("c", elem, ["n", 3])])


def dense(path: Path) -> Path:
    """A MatMul of 256 x 256 between Relus."""
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="fc/MatMul"), helper.make_node("Relu", ["h"], ["y"])]
    shape = [1, 256]
    return save(path, nodes, [("x", 1, shape)], [("y", 1, shape)], [("w", weight)])


@pytest.mark.parametrize(
    ("elem", "dtype"),
    [
        (TensorProto.FLOAT, "float32"),
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.INT32, "int32"),
        (TensorProto.INT64, "int64"),
    ],
)
def test_runs_each_type_with_dynamic_batch(tmp_path: Path, elem: int, dtype: str) -> None:
    path = add(tmp_path / "m.onnx", elem)
    with OpenVinoRuntime().open(path, summarize(path).signature) as session:
        for batch in (0, 1, 4):
            x = np.ones((batch, 3), dtype)
            result = session.run({"a": x, "b": x})["c"]
            assert result.shape == (batch, 3)
            assert result.dtype == dtype
            assert (result == 2).all()


def test_bool(tmp_path: Path) -> None:
    node = helper.make_node("Not", ["a"], ["b"], name="Not")
    path = save(tmp_path / "m.onnx", [node], [("a", TensorProto.BOOL, [2])], [("b", TensorProto.BOOL, [2])])
    with OpenVinoRuntime().open(path, summarize(path).signature) as session:
        assert session.run({"a": np.array([True, False])})["b"].tolist() == [False, True]


def test_results_outlive_the_next_run(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    with OpenVinoRuntime().open(path, summarize(path).signature) as session:
        one = np.ones((1, 3), np.float32)
        first = session.run_native({"a": one, "b": one})["c"]
        session.run_native({"a": 5 * one, "b": one})
    assert first.tolist() == [[2, 2, 2]]


def test_float_is_computed_in_float32(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx")
    signature = summarize(path).signature
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    with OpenVinoRuntime().open(path, signature, 2) as mine, OnnxRuntime().open(path, signature) as other:
        np.testing.assert_allclose(mine.run({"x": x})["y"], other.run({"x": x})["y"], rtol=1e-4, atol=1e-4)


def test_weights_in_another_file(tmp_path: Path) -> None:
    inside = dense(tmp_path / "inside.onnx")
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(inside), outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").stat().st_size > 1e5
    x = np.ones((1, 256), np.float32)
    results = []
    for path in (inside, outside):
        with OpenVinoRuntime().open(path, summarize(path).signature) as session:
            results.append(session.run({"x": x})["y"])
    assert (results[0] == results[1]).all()


def test_profile_names_the_file_s_nodes(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx")
    with OpenVinoRuntime().open(path, summarize(path).signature) as session:
        timings = session.profile({"x": np.ones((1, 256), np.float32)}, 3)
    assert timings
    assert all(t.ms >= 0 for t in timings)
    assert any(t.type == "FullyConnected" for t in timings)


def test_the_slow_first_run_is_not_in_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: OpenVINO tells the mean over all runs, and the first takes a hundred times as long."""
    key = ("dense", "FullyConnected")
    told = iter([{key: 20.0}, {key: (5 * 20.0 + 3 * 0.5) / 8}])
    monkeypatch.setattr(runtime, "_means", lambda _: next(told))
    path = dense(tmp_path / "m.onnx")
    with OpenVinoRuntime().open(path, summarize(path).signature) as session:
        (timing,) = session.profile({"x": np.ones((1, 256), np.float32)}, 3)
    assert (timing.name, timing.type) == key
    assert timing.ms == pytest.approx(0.5)


def test_operators_have_the_same_names_however_many_graphs_came_before(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx")
    names = [[op.get_friendly_name() for op in read(path).get_ordered_ops()] for _ in range(2)]
    assert names[0] == names[1]


def test_wrong_shape_names_input_expected_and_given(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    good, bad = np.ones((1, 3), np.float32), np.ones((1, 4), np.float32)
    with (
        OpenVinoRuntime().open(path, summarize(path).signature) as session,
        pytest.raises(DataError, match=r"input 'b': has the shape \(1, 4\), the model takes \(n, 3\)"),
    ):
        session.run({"a": good, "b": bad})


def test_sizes_of_one_name_must_be_equal(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    two, three = np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)
    with (
        OpenVinoRuntime().open(path, summarize(path).signature) as session,
        pytest.raises(DataError, match=r"input 'b': its dimension 'n' is 3, that of 'a' is 2"),
    ):
        session.run({"a": two, "b": three})


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Twist", ["a"], ["b"], name="layer.1/Twist", domain="com.example")
    path = save(tmp_path / "m.onnx", [node], [("a", 1, [2])], [("b", 1, [2])])
    with pytest.raises(ConversionError, match=r"OpenVINO refuses the file: No conversion rule .*com\.example\.Twist"):
        OpenVinoRuntime().open(path, summarize(path).signature)


def test_no_onnx_file(tmp_path: Path) -> None:
    signature = summarize(add(tmp_path / "m.onnx")).signature
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"hello" * 20)
    with pytest.raises(ConversionError, match="OpenVINO refuses the file"):
        OpenVinoRuntime().open(broken, signature)


def test_closed(tmp_path: Path) -> None:
    path = add(tmp_path / "m.onnx")
    session = OpenVinoRuntime().open(path, summarize(path).signature)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run_native({})


def test_it_is_found_by_name_and_is_no_emulator() -> None:
    runtime = load_runtime("openvino")
    assert (runtime.name, runtime.emulates, runtime.unavailable()) == ("openvino", None, None)


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    assert "pip install 'edgeopt[openvino]'" in (OpenVinoRuntime().unavailable() or "")


def test_timed_and_weighed_in_fresh_processes(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx")
    timed = TimedFile("quantized", path, summarize(path).signature, "openvino", {"x": np.ones((1, 256), np.float32)})
    measured = {m.name: m.value for m in benchmark_pair(timed, None, 1, budget_s=0.2)}
    assert measured["latency_ms"] > 0
    assert measured["peak_memory_bytes"] >= 0


@pytest.mark.parametrize("first", ["", "import openvino_telemetry; "])
def test_nothing_is_reported_to_anyone(tmp_path: Path, first: str) -> None:
    """OpenVINO's import looks for consent in the home directory and leaves an identifier there when it reports."""
    program = f"{first}import sys, edgeopt.runtimes.openvino_import; print('openvino_telemetry' in sys.modules)"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    if first:  # the user's own import of it stays as it was
        environment["CI"] = "true"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(bool(first))
    assert list(tmp_path.iterdir()) == []
