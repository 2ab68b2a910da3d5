import numpy as np
import pytest
import torch

from edgeopt.errors import DataError, UsageError
from edgeopt.runtimes.pytorch import open_source
from edgeopt.types import Dim, Model, NativeGraph, TensorSpec


def model(module, inputs, outputs, native=None):
    return Model("net", module, native, inputs, outputs, {}, None, (), (), "0" * 64)


class TwoInTwoOut(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.bias = torch.nn.Parameter(torch.ones(3))

    def forward(self, ids, scale):
        return self.embedding(ids) * scale, [ids + 1, (self.bias,)]


INPUTS = (TensorSpec("ids", (1, Dim("seq")), "int64"), TensorSpec("scale", (1,), "float32"))
OUTPUTS = (
    TensorSpec("hidden", (1, Dim("seq"), 4), "float32"),
    TensorSpec("next", (1, Dim("seq")), "int64"),
    TensorSpec("bias", (3,), "float32"),
)


def test_nested_outputs_come_back_by_name():
    module = TwoInTwoOut().eval()
    ids = np.array([[1, 2, 3]])
    ids.setflags(write=False)
    with open_source(model(module, INPUTS, OUTPUTS)) as session:
        assert session.signature.inputs[0].shape == (1, "seq")
        # int32 ids are cast to what the model takes.
        outputs = session.run({"scale": np.array([2.0]), "ids": ids.astype(np.int32)})
        again = session.run({"scale": np.array([2.0], dtype=np.float32), "ids": ids})
    expected = 2 * module.embedding.weight.detach().numpy()[ids]
    assert list(outputs) == ["hidden", "next", "bias"]
    assert np.array_equal(outputs["hidden"], expected)
    assert outputs["next"].tolist() == [[2, 3, 4]]
    assert outputs["bias"].tolist() == [1, 1, 1]
    assert np.array_equal(again["hidden"], outputs["hidden"])


def test_the_thread_count_holds_during_the_run_only():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
            return x

    before = torch.get_num_threads()
    spec = (TensorSpec("x", (1,), "float32"),)
    with open_source(model(Spy(), spec, spec), threads=before + 1) as session:
        session.run({"x": np.zeros(1)})
    assert seen == [(before + 1, False)]
    assert torch.get_num_threads() == before


def test_a_wrong_shape_is_one_line_that_names_the_model():
    spec = (TensorSpec("x", (1, 4), "float32"),)
    module = torch.nn.Linear(4, 2)
    with (
        open_source(model(module, spec, (TensorSpec("y", (1, 2), "float32"),))) as session,
        pytest.raises(DataError, match="model 'net': the module fails on this input: mat1 and mat2"),
    ):
        session.run({"x": np.zeros((1, 5))})


def test_another_number_of_outputs_than_declared():
    spec = (TensorSpec("x", (1, 4), "float32"),)
    outputs = (TensorSpec("a", (1, 4), "float32"), TensorSpec("b", (1, 4), "float32"))
    with (
        open_source(model(torch.nn.Identity(), spec, outputs)) as session,
        pytest.raises(UsageError, match=r"returns 1 tensors, not 2 \(a, b\)"),
    ):
        session.run({"x": np.zeros((1, 4))})


def test_a_native_graph_has_no_module(tmp_path):
    native = NativeGraph("onnx", tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="model 'net': holds no PyTorch module"):
        open_source(model(None, (), (), native))


def test_closing_twice_is_allowed():
    spec = (TensorSpec("x", (1,), "float32"),)
    session = open_source(model(torch.nn.Identity(), spec, spec))
    session.close()
    session.close()
