from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeopt.errors import ConversionError, UsageError
from edgeopt.sources import SourceOptions, load_model, parse_input
from edgeopt.types import Dim


def write(path: Path, shape: list[int | str | None], op: str = "Conv", list_weights: bool = False) -> Path:
    weight = numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")
    graph_inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if list_weights:
        graph_inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3, 3, 3]))
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="first")],
        "g",
        graph_inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_signature_comes_from_the_graph(tmp_path: Path) -> None:
    path = write(tmp_path / "My Net.onnx", ["batch", 3, 8, 8], list_weights=True)
    model = load_model(str(path), SourceOptions())
    assert model.name == "my-net"
    assert model.module is None
    assert model.native is not None
    assert model.native.path == path
    assert [(spec.name, spec.shape, spec.layout) for spec in model.inputs] == [("x", (Dim("batch"), 3, 8, 8), "NCHW")]
    assert [(spec.name, spec.shape, spec.layout) for spec in model.outputs] == [("y", (Dim("batch"), 2, 6, 6), "NCHW")]


def test_declared_sizes_decide(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", ["batch", 3, "height", None])
    options = SourceOptions(inputs=(parse_input("x=float32[1,3,8,width:4..32]"),))
    model = load_model(str(path), options)
    assert model.outputs[0].shape[:3] == (1, 2, 6)
    assert model.outputs[0].shape[3] == Dim("y_3", 2, 30)
    with pytest.raises(UsageError, match="its inputs are x float32"):
        load_model(str(path), SourceOptions(inputs=(parse_input("x=int64[1,3,8,8]"),)))


def test_a_size_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dimension of size 0"):
        load_model(str(write(tmp_path / "net.onnx", [1, 3, 8, 0])), SourceOptions())


def test_wrong_sizes_name_input_and_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", [1, "channels", 8, 8])
    with pytest.raises(UsageError, match=r"failed on the inputs x float32\[1, 16, 8, 8\]"):
        load_model(str(path), SourceOptions())


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x08"])
def test_a_corrupt_file_is_a_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(UsageError, match=r"net\.onnx: (is no ONNX file|holds no operators)"):
        load_model(str(tmp_path / "net.onnx"), SourceOptions())


def test_the_checker_speaks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not valid ONNX") as caught:
        load_model(str(write(tmp_path / "net.onnx", [1, 3, 8, 8], op="Relu")), SourceOptions())
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize("domain", ["", "acme.ops", "com.microsoft"])
def test_an_operator_that_nothing_can_run_is_named_with_its_node(tmp_path: Path, domain: str) -> None:
    path = write(tmp_path / "net.onnx", [1, 3, 8, 8], op="NoSuchOperator")
    model = onnx.load(path)
    (node,) = [n for n in model.graph.node if n.op_type == "NoSuchOperator"]
    node.name, node.domain = "odd", domain
    if domain:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    path.write_bytes(model.SerializeToString())
    operator = f"{domain}.NoSuchOperator" if domain else "NoSuchOperator"
    with pytest.raises(ConversionError, match=f"node 'odd': the operator {operator} is neither standard"):
        load_model(str(path), SourceOptions())


def external(path: Path, location: str) -> Path:
    model = onnx.load(write(path, [1, 3, 8, 8]))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    return path


def test_external_weights_count_and_stay_inside(tmp_path: Path) -> None:
    path = external(tmp_path / "net.onnx", "weights.bin")
    first = load_model(str(path), SourceOptions())
    weights = tmp_path / "weights.bin"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    assert load_model(str(path), SourceOptions()).source_sha256 != first.source_sha256
    for location in ("../weights.bin", "/etc/passwd"):
        with pytest.raises(UsageError, match="outside the model's folder"):
            load_model(str(external(tmp_path / "net.onnx", location)), SourceOptions())
    with pytest.raises(UsageError, match=r"'absent.bin' is not beside it"):
        load_model(str(external(tmp_path / "net.onnx", "absent.bin")), SourceOptions())
