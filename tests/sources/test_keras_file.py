from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import MissingError, UsageError
from edgeopt.sources import SourceOptions, load_model
from edgeopt.types import Dim


def test_without_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.sources.keras_file.find_spec", lambda _: None)
    (tmp_path / "net.keras").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    for source in (tmp_path / "net.keras", tmp_path / "saved"):
        with pytest.raises(MissingError, match=r"pip install 'edgeopt\[tensorflow\]'"):
            load_model(str(source), SourceOptions())


def test_files_and_directories(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras", reason="the extra [tensorflow] is not installed")
    picture, extra = keras.Input((16, 16, 3), name="picture"), keras.Input((4,), name="extra")
    features = keras.layers.Conv2D(4, 3)(picture)
    pooled = keras.layers.Concatenate()([keras.layers.GlobalAveragePooling2D()(features), extra])
    net = keras.Model([picture, extra], [keras.layers.Dense(2)(pooled), features])
    net.save(tmp_path / "net.keras")
    net.save(tmp_path / "net.h5")
    net.export(tmp_path / "saved", verbose=False)
    for name, kind in (("net.keras", "keras"), ("net.h5", "keras"), ("saved", "savedmodel")):
        model = load_model(str(tmp_path / name), SourceOptions())
        assert model.native is not None
        assert model.native.kind == kind
        specs = {spec.name: spec for spec in model.inputs}
        assert specs["picture"].shape == (Dim("batch"), 16, 16, 3)
        assert specs["picture"].layout == "NHWC"
        assert specs["extra"].layout is None
        assert [spec.shape for spec in model.outputs] == [(Dim("batch"), 2), (Dim("batch"), 14, 14, 4)]


def test_lambda_layers_are_not_run(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras", reason="the extra [tensorflow] is not installed")
    net = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * np.float32(2))])
    for name in ("net.keras", "net.h5"):
        net.save(tmp_path / name)
        with pytest.raises(UsageError, match="Keras can't load it"):
            load_model(str(tmp_path / name), SourceOptions())
