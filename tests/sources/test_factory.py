import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeopt.errors import UsageError
from edgeopt.sources import SourceOptions, load_model, parse_input
from edgeopt.types import WRAPPED_ATTRIBUTE, Dim, ImagePreprocessing

HEADER = """
import torch
from torch import nn
from torch.nn import functional as F
from edgeopt.sources import ModelSpec
"""

CNN = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, image):
        features = self.norm(self.conv(image))
        return self.head(features.mean((2, 3)))
"""


def write(folder: Path, code: str, name: str = "net.py") -> Path:
    path = folder / name
    path.write_text(HEADER + code)
    return path


def load(folder: Path, code: str, factory: str = "make", options: SourceOptions | None = None):
    return load_model(f"{write(folder, code)}:{factory}", options or SourceOptions())


def inputs(*texts: str) -> SourceOptions:
    return SourceOptions(inputs=tuple(parse_input(text) for text in texts))


def test_a_bare_module_stays_bare_and_is_ready_for_inference(tmp_path: Path) -> None:
    model = load(tmp_path, CNN, "Net", inputs("image=float32[1,3,8,8]"))
    assert type(model.module).__name__ == "Net"
    assert not any(part.training for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert model.name == "net-net"
    assert model.inputs[0].layout == "NCHW"
    assert [(spec.name, spec.shape, spec.layout) for spec in model.outputs] == [("output", (1, 2), None)]
    assert model.history[0].step == "load"
    assert str(tmp_path) not in str(model.history)


def test_a_module_without_inputs_says_how_to_declare_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--input NAME=DTYPE"):
        load(tmp_path, CNN, "Net")


def test_a_spec_brings_examples_preprocessing_and_labels(tmp_path: Path) -> None:
    code = (
        CNN
        + """
from edgeopt.types import ImagePreprocessing
def make():
    return ModelSpec(Net(), torch.zeros(1, 3, 8, 8), outputs=("scores",), labels=("cat", "dog"), name="My Net!",
                     preprocessing=ImagePreprocessing(8, 8))
"""
    )
    model = load(tmp_path, code)
    assert model.name == "my-net"
    assert model.inputs[0].name == "image"
    assert model.outputs[0].name == "scores"
    assert model.labels == ("cat", "dog")
    assert model.preprocessing == ImagePreprocessing(8, 8)


def test_the_users_flags_win(tmp_path: Path) -> None:
    code = CNN + "def make():\n    return ModelSpec(Net(), torch.zeros(1, 3, 8, 8), labels=('a', 'b'), name='n')\n"
    options = SourceOptions(inputs=(parse_input("image=float32[1,3,16,16]"),), labels=("x", "y"), name="other")
    model = load(tmp_path, code, options=options)
    assert (model.inputs[0].shape, model.labels, model.name) == ((1, 3, 16, 16), ("x", "y"), "other")
    assert model.example_inputs["image"].shape == (1, 3, 16, 16)


def test_keywords_and_dict_outputs_get_an_adapter(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def forward(self, ids, types=None, mask=None):
        return {"sum": (ids * mask).sum(1), "parts": (ids.float(), None, [mask])}
"""
    model = load(tmp_path, code, "Net", inputs("ids=int64[1,4]", "mask=int64[1,4]"))
    assert type(getattr(model.module, WRAPPED_ATTRIBUTE)).__name__ == "Net"
    assert [spec.name for spec in model.outputs] == ["sum", "parts_0", "parts_2_0"]
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 1, 0, 0]])
    assert model.module(ids, mask)[0].tolist() == [3]
    exported = torch.export.export(model.module, (ids, mask))
    assert [node.name for node in exported.graph.nodes if node.op == "placeholder"] == ["ids", "mask"]


def test_starred_arguments_become_named_ones(tmp_path: Path) -> None:
    code = "class Net(nn.Module):\n    def forward(self, *parts):\n        return torch.cat(parts, 1)\n"
    model = load(tmp_path, code, "Net", inputs("left=float32[batch:1..4,2]", "right=float32[batch:1..4,3]"))
    batch = torch.export.Dim("batch", max=4)
    exported = torch.export.export(
        model.module,
        tuple(torch.from_numpy(array) for array in model.example_inputs.values()),
        dynamic_shapes={"left": {0: batch}, "right": {0: batch}},
    )
    assert len(exported.range_constraints) == 1


def test_dynamic_dimensions_reach_the_outputs(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def forward(self, x):
        return x * 2, x[:, ::2], x.sum()
"""
    model = load(tmp_path, code, "Net", inputs("x=float32[batch:1..4,time:8..32]"))
    whole, half, total = model.outputs
    assert whole.shape == (Dim("batch", 1, 4), Dim("time", 8, 32))
    assert half.shape[0] == Dim("batch", 1, 4)
    assert isinstance(half.shape[1], Dim)
    assert total.shape == ()


def test_a_dimension_that_is_not_free_is_found_out(tmp_path: Path) -> None:
    code = "class Net(nn.Module):\n    def forward(self, x):\n        return x.reshape(2, 3)\n"
    with pytest.raises(UsageError, match=r"Net: failed on the inputs x float32\[3, 3\]"):
        load(tmp_path, code, "Net", inputs("x=float32[batch:1..4,3]"))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def make():\n    return 3\n", "returned a int"),
        ("def make():\n    return ModelSpec(3)\n", "returned a int"),
        ("def make():\n    raise ValueError('no disk')\n", r"net.py:\d+: ValueError: no disk"),
        ("make = 3\n", "is a int, not a function"),
        ("def other():\n    pass\n", "has no factory 'make'; it has other"),
        ("def make(:\n", "SyntaxError"),
        ("import nothing_like_this\n", "No module named 'nothing_like_this'"),
        (
            "def make():\n    return ModelSpec(nn.Linear(2, 2), torch.zeros(1, 3))\n",
            r"failed on the inputs input float32\[1, 3\]",
        ),
        ("def make():\n    return ModelSpec(nn.Linear(2, 2).double(), torch.zeros(1, 2))\n", "is float64"),
        ("def make():\n    return ModelSpec(nn.Linear(2, 2, device='meta'), torch.zeros(1, 2))\n", "meta device"),
        ("def make():\n    return ModelSpec(nn.Linear(2, 2), torch.zeros(1, 2).double())\n", "is float64"),
        ("def make():\n    return ModelSpec(nn.Linear(2, 2), 'text')\n", "is a str"),
        (
            "def make():\n    return ModelSpec(nn.Linear(2, 2), torch.zeros(1, 2), outputs=('a', 'b'))\n",
            "2 names are given",
        ),
    ],
)
def test_a_wrong_factory_is_one_clear_line(tmp_path: Path, code: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        load(tmp_path, code)
    assert "\n" not in caught.value.line()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return F.dropout(x)", "differs between two runs"),
        ("return 'text'", "returns a str"),
        ("return {}", "returns no tensor"),
        ("return x.double()", "has the type float64"),
        ("return {'a': {'b': x}, 'a_b': x}", "two outputs of one name"),
    ],
)
def test_a_module_that_no_runtime_can_mimic_is_refused(tmp_path: Path, body: str, problem: str) -> None:
    code = f"class Net(nn.Module):\n    def forward(self, x):\n        {body}\n"
    with pytest.raises(UsageError, match=problem):
        load(tmp_path, code, "Net", inputs("x=float32[1,64]"))


def test_forward_may_need_more_than_is_declared(tmp_path: Path) -> None:
    code = "class Net(nn.Module):\n    def forward(self, a, *, b):\n        return a + b\n"
    with pytest.raises(UsageError, match="failed on the inputs"):
        load(tmp_path, code, "Net", inputs("a=float32[1]"))
    with pytest.raises(UsageError, match="also needs 'a'"):
        load(tmp_path, code, "Net", inputs("b=float32[1]"))


def test_the_files_folder_is_importable_only_while_loading(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 5\n", "sizes_for_test.py")
    code = "from sizes_for_test import WIDTH\n"
    code += "def make():\n    return ModelSpec(nn.Linear(WIDTH, 1), torch.zeros(1, WIDTH))\n"
    before = list(sys.path)
    assert load(tmp_path, code).inputs[0].shape == (1, 5)
    assert sys.path == before


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for width in (2, 3):
        folder = tmp_path / str(width)
        folder.mkdir()
        code = f"def make():\n    return ModelSpec(nn.Linear({width}, 1), torch.zeros(1, {width}))\n"
        assert load(folder, code).inputs[0].shape == (1, width)


def test_a_package_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pack_for_test").mkdir()
    write(tmp_path / "pack_for_test", "def make():\n    return ModelSpec(nn.Linear(2, 1), torch.zeros(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    assert load_model("pack_for_test.net:make", SourceOptions()).name == "net-make"
    with pytest.raises(UsageError, match=r"no module named 'pack_for_test\.absent'"):
        load_model("pack_for_test.absent:make", SourceOptions())


def test_the_digest_is_of_code_and_weights(tmp_path: Path) -> None:
    code = "def make():\n    return ModelSpec(nn.Linear(2, 1), {'input': torch.zeros(1, 2)})\n"
    seeded = code.replace("    return", "    torch.manual_seed(0)\n    return")
    first, second = load(tmp_path, seeded), load(tmp_path, seeded)
    assert first.source_sha256 == second.source_sha256
    assert load(tmp_path, code).source_sha256 != first.source_sha256
    np.testing.assert_array_equal(first.example_inputs["input"], np.zeros((1, 2), np.float32))
