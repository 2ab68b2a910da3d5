from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import ConversionError, UsageError
from edgeopt.sources import SourceOptions, as_torch, load_model
from edgeopt.types import Model, NativeGraph


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("net.py:make", "net.py: no such file"),
        ("net.py", "write net.py:FACTORY"),
        ("net.pt2", "net.pt2: no such file"),
        ("net.onnx", "net.onnx: no such file"),
        ("net.keras", "net.keras: no such file"),
        ("nothing_like_this.net:make", "no module named 'nothing_like_this'"),
        ("weights.safetensors", "file.py:factory --weights weights.safetensors"),
        ("net.txt", "no model source that edgeopt knows"),
        ("", "no model source that edgeopt knows"),
    ],
)
def test_a_wrong_source_is_one_clear_line(
    source: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_model(source, SourceOptions())
    assert problem in caught.value.line()


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a directory without a model"):
        load_model(str(tmp_path), SourceOptions())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=f"write hf:{tmp_path}"):
        load_model(str(tmp_path), SourceOptions())


def test_a_newline_in_the_path_changes_nothing_about_its_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_model(str(tmp_path / "my\nnet.onnx"), SourceOptions())


def test_task_goes_with_hugging_face_only() -> None:
    with pytest.raises(UsageError, match="--task goes with hf"):
        load_model("net.onnx", SourceOptions(task="fill-mask"))


def test_a_keras_model_has_no_torch_form() -> None:
    model = Model(
        "net", None, NativeGraph("keras", Path("net.keras")), (), (), {"x": np.zeros(1)}, None, (), (), "0" * 64
    )
    with pytest.raises(ConversionError, match="straight to TFLite targets only"):
        as_torch(model)
