"""Two real files, layer by layer."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.bundle import BundleContents, GoldenVector, write_bundle
from edgeopt.cli.debug import debug as command
from edgeopt.debugging import Divergence, debug
from edgeopt.device_profiles import load_device
from edgeopt.errors import DataError, UsageError
from edgeopt.formats import summarize
from edgeopt.targets import load_target
from edgeopt.types import Artifact, Model, Report, TensorSpec

LAYERS = ("stem", "body.0", "body.1", "head")
INPUTS = np.random.default_rng(1).standard_normal((12, 1, 8)).astype(np.float32)


def net(path: Path, *, wrong: str = "", named: bool = True, layers: tuple[str, ...] = LAYERS, width: int = 8) -> Path:
    """A chain of matrix products with Relu between; `wrong` is the layer whose weights are another network's."""
    random, nodes, weights, tensor = np.random.default_rng(0), [], [], "x"
    for i, layer in enumerate(layers):
        weight = random.standard_normal((width, width)).astype(np.float32)
        weight = -weight if layer == wrong else weight + 1e-3 * (bool(wrong) or not named)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        name = f"{layer}/MatMul" if named else f"MatMul_{i}"
        nodes.append(helper.make_node("MatMul", [tensor, f"w{i}"], [f"m{i}"], name=name))
        tensor = "y" if i == len(layers) - 1 else f"r{i}"
        if tensor != "y":
            nodes.append(helper.make_node("Relu", [f"m{i}"], [tensor], name=f"{layer}.act/Relu" if named else f"R{i}"))
        else:
            nodes[-1].output[0] = "y"
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, width]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> str:
    np.savez(tmp_path / "d.npz", x=INPUTS[:, 0])
    return str(tmp_path / "d.npz")


def test_a_file_is_its_own_equal(tmp_path: Path) -> None:
    result = debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx"))
    assert [layer.layer for layer in result.layers] == list(LAYERS)
    assert {layer.sqnr_db for layer in result.layers} == {200.0}
    assert (result.first_divergence, result.samples, result.matched_by) == (None, 8, "layer")
    assert (result.unmatched_a, result.unmatched_b) == ((), ())


def test_the_first_wrong_layer_is_named(tmp_path: Path, data: str) -> None:
    result = debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx", wrong="body.1"), data=data)
    assert result.first_divergence == Divergence(2, "low")
    wrong = result.layers[2]
    assert (wrong.layer, wrong.type_a, wrong.inputs) == ("body.1", "MatMul", (1,))
    assert wrong.introduced > 0.99
    assert result.layers[1].sqnr_db > 40
    assert result.samples == 12


def test_only_so_many_samples_are_run(tmp_path: Path, data: str) -> None:
    assert debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx"), data=data, num_samples=5).samples == 5


def test_files_without_names_are_matched_by_order(tmp_path: Path) -> None:
    result = debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx", named=False))
    assert result.matched_by == "order"
    assert [layer.layer for layer in result.layers] == list(LAYERS)
    assert min(layer.sqnr_db for layer in result.layers) > 30


def test_layers_that_one_file_lacks_are_named(tmp_path: Path) -> None:
    result = debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx", layers=("stem", "body.0", "extra", "head")))
    assert (result.unmatched_a, result.unmatched_b) == (("body.1",), ("extra",))
    assert result.layers[2].inputs == (1,)  # past body.1, which has no counterpart


def test_the_file_is_compared_with_itself_untouched(tmp_path: Path) -> None:
    result = debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx"))
    assert (result.instrumented_db_a, result.instrumented_db_b) == (200.0, 200.0)


def test_one_file_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to hold it against; give a second file"):
        debug(net(tmp_path / "a.onnx"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.onnx: no such file"):
        debug(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match=r"none\.onnx: no such file"):
        debug(net(tmp_path / "a.onnx"), tmp_path / "none.onnx")


def test_files_of_different_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"b\.onnx: the tensor 'x' has the shape \[1, 4\]"):
        debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx", width=4))


def test_empty_data_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", x=INPUTS[:0, 0])
    with pytest.raises(DataError):
        debug(net(tmp_path / "a.onnx"), net(tmp_path / "b.onnx"), data=str(tmp_path / "none.npz"))


def test_a_file_without_layers_is_refused(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(UsageError, match="has no layers to look at"):
        debug(path, net(tmp_path / "b.onnx"))


def bundle(folder: Path, *, twin: bool) -> Path:
    def artifact(path: Path) -> Artifact:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return Artifact(path, "onnx", "w8a8", summarize(path).signature, len(content), digest, (), {}, ())

    (folder / "work").mkdir()
    shipped = artifact(net(folder / "work" / "q.onnx", wrong="head"))
    float_ = replace(artifact(net(folder / "work" / "f.onnx")), precision="fp32")
    spec = TensorSpec("x", (1, 8), "float32"), TensorSpec("y", (1, 8), "float32")
    model = Model("net", None, None, spec[:1], spec[1:], {}, None, (), (), "0" * 64)
    golden = tuple(GoldenVector({"x": x}, {"y": x}, {"y": x}, None) for x in INPUTS[:3])
    report = Report("passed", "net", "android-onnx-int8", "onnxruntime", (), (), (), (), (), {})
    target, device = load_target("android-onnx-int8"), load_device("pixel-6")
    contents = BundleContents(target, device, model, shipped, float_ if twin else None, report, golden)
    write_bundle(folder / "made", contents)
    return folder / "made"


def test_a_bundle_is_held_against_its_float_twin(tmp_path: Path) -> None:
    result = debug(bundle(tmp_path, twin=True))
    assert (result.a, result.b) == (f"{tmp_path / 'made'} (float twin)", str(tmp_path / "made"))
    assert result.first_divergence == Divergence(3, "low")
    assert result.samples == 3  # its golden vectors


def test_a_bundle_without_its_twin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no float twin .* or export it with --float-twin"):
        debug(bundle(tmp_path, twin=False))


def test_the_command_has_the_defaults_of_the_function() -> None:
    ours, theirs = inspect.signature(command).parameters, inspect.signature(debug).parameters
    assert [ours[n].default for n in ("num_samples", "threshold", "max_drop")] == [
        theirs[n].default for n in ("num_samples", "threshold_db", "max_drop_db")
    ]
