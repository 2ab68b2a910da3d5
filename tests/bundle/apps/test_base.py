"""Which apps a bundle gets, and what their writers share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow

from edgeopt.bundle.apps import APPS, apps_for, write_apps
from edgeopt.bundle.apps.base import (
    float32_text,
    identifier,
    identifiers,
    image_preprocessing,
    padded_length,
    resizes_columns_first,
    scores_output,
    tensors,
    text_fields,
    text_preprocessing,
)
from edgeopt.bundle.manifest import Manifest, ModelFile, StoredArray, StoredVector
from edgeopt.targets import load_target
from edgeopt.types import (
    ImagePreprocessing,
    Preprocessing,
    QuantParams,
    Signature,
    SignatureTensor,
    TextPreprocessing,
)

X = SignatureTensor("x", "x:0", (1, 4), "float32", "float32")


def manifest(
    *inputs: SignatureTensor,
    target: str = "android-int8",
    preprocessing: Preprocessing | None = None,
    outputs: tuple[SignatureTensor, ...] = (X,),
    labels: tuple[str, ...] = (),
) -> Manifest:
    loaded = load_target(target)
    stored = {name: StoredArray(f"golden/0/{name}.bin", (1, 4), "float32") for name in ("x", "y")}
    return Manifest(
        schema_version=1,
        kind="edgeopt-bundle",
        name="net",
        target=target,
        device=loaded.device,
        status="passed",
        format=loaded.format,
        precision="w8a8",
        model=ModelFile("model.tflite", "w8a8", Signature(inputs or (X,), outputs)),
        float_twin=None,
        preprocessing=preprocessing,
        labels=labels,
        golden=(StoredVector({"x": stored["x"]}, {"x": stored["y"]}, {}, None),),
        golden_tolerance=0.05,
        history=(),
        source_sha256="0" * 64,
        tools={"pillow": "13.0.0"},
        target_definition=loaded,
        files={},
    )


@pytest.mark.parametrize(
    ("target", "apps"),
    [
        ("android-int8", {"android", "ios", "cpp", "python"}),
        ("android-executorch-int8", {"android", "ios", "cpp", "python"}),
        ("android-vulkan-fp16", {"android"}),
        ("linux-arm64-onnx-int8", {"cpp", "python"}),
        ("ios-coreml-fp16", {"ios", "python"}),
        ("ios-executorch-coreml", {"ios"}),
        ("openvino-int8", {"python"}),
        ("qualcomm-int8", {"android"}),
        ("ethosu55-int8", set()),
        ("edgetpu-int8", set()),
        ("vgf-executorch-int8", set()),
    ],
)
def test_apps_that_fit(target: str, apps: set[str]) -> None:
    assert set(apps_for(manifest(target=target))) == apps
    assert apps <= APPS.keys()


def test_apps_are_written_into_their_folders(tmp_path: Path) -> None:
    write_apps(manifest(target="linux-arm64-int8"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cpp", "python"}
    assert (tmp_path / "cpp" / "CMakeLists.txt").is_file()
    assert (tmp_path / "python" / "net.py").is_file()


@pytest.mark.parametrize(
    ("name", "snake", "camel", "pascal"),
    [
        ("serving_default_x:0", "serving_default_x_0", "servingDefaultX0", "ServingDefaultX0"),
        ("HTTPServer", "http_server", "httpServer", "HttpServer"),
        ("efficientnet-lite0", "efficientnet_lite0", "efficientnetLite0", "EfficientnetLite0"),
        ("3d", "model_3_d", "model3D", "Model3D"),
        ("日本", "model", "model", "Model"),
        ("", "model", "model", "Model"),
        ("é-a", "e_a", "eA", "EA"),
        ("größe", "grosse", "grosse", "Grosse"),
        ("class", "class_", "class_", "Class"),
    ],
)
def test_identifiers(name: str, snake: str, camel: str, pascal: str) -> None:
    reserved = {"class"}
    assert (identifier(name, "snake", reserved), identifier(name, "camel", reserved), identifier(name, "pascal")) == (
        snake,
        camel,
        pascal,
    )


def test_identifiers_are_unique_and_no_keywords() -> None:
    names = identifiers(["a b", "a-b", "a_b_2", "class", "class_", "a b"], "snake", {"class", "a_b_3"}, "x")
    assert names == ("a_b", "a_b_2", "a_b_2_2", "class_", "class_2", "a_b_4")


def test_floats_read_back_as_float32() -> None:
    assert [float32_text(v) for v in (1, 127.0, 1 / 255, 1e-8, 1e20)] == [
        "1.0",
        "127.0",
        "0.003921569",
        "1e-08",
        "1e+20",
    ]


def test_tensors_in_the_models_order() -> None:
    quantized = SignatureTensor("a", "b", (1, "high", 6, 3), "int8", "float32", (0, 2, 3, 1), QuantParams((0.1,), (3,)))
    (tensor,) = tensors((quantized,), "snake", (), "input")
    assert tensor.model_shape == (1, 3, "high", 6)
    assert tensor.is_dynamic
    assert (tensor.scale, tensor.zero_point) == (pytest.approx(0.1), 3)


def test_pictures_need_the_one_input_that_they_are_for() -> None:
    p, picture = ImagePreprocessing(2, 2), replace(X, shape=(1, 3, 2, 2))
    assert image_preprocessing(manifest(picture, preprocessing=p)) == p
    assert image_preprocessing(manifest(picture, X, preprocessing=p)) is None
    assert image_preprocessing(manifest(X, preprocessing=p)) is None


def test_tokens_go_to_inputs_by_name_or_order() -> None:
    p = TextPreprocessing("tokenizer", 16)

    def fields(*names: str, shape: tuple[int | str, ...] = (1, "n")) -> list[str] | None:
        made = manifest(*(replace(X, name=name, shape=shape) for name in names), preprocessing=p)
        if text_preprocessing(made) is None:
            return None
        return [f.field for f in text_fields(made, tensors(made.model.signature.inputs, "snake", (), "x"))]

    assert fields("Mask", "ids") == ["attention_mask", "input_ids"]
    assert fields("a", "b") == ["input_ids", "attention_mask"]
    assert fields("a", "ids") is None
    assert fields("ids", shape=(1, 2, 3)) is None


@pytest.mark.parametrize(
    ("length", "padding", "expected"),
    [("n", "max_length", (16, 16)), ("n", "none", (16, 0)), (8, "none", (8, 8)), (32, "max_length", (16, 32))],
)
def test_padded_length(length: int | str, padding: str, expected: tuple[int, int]) -> None:
    p = TextPreprocessing("tokenizer", 16, "none" if padding == "none" else "max_length")
    made = manifest(replace(X, name="ids", shape=(1, length)), preprocessing=p)
    assert padded_length(p, text_fields(made, tensors(made.model.signature.inputs, "snake", (), "x"))) == expected


def test_which_output_has_the_scores() -> None:
    maps, scores = replace(X, shape=(1, 8, 8)), replace(X, name="scores", shape=("batch", 1, 4))
    for labels, expected in ((("a", "b", "c", "d"), 1), (("a",), None), ((), None)):
        made = manifest(outputs=(maps, scores), labels=labels)
        found = scores_output(made, tensors(made.model.signature.outputs, "snake", (), "output"))
        assert (found.position if found else None) == expected


def test_the_order_of_pillows_two_passes_is_the_installed_ones() -> None:
    """Either order can be had from Pillow itself by resizing twice. Near the limit of the rule, and far from it."""
    assert resizes_columns_first(replace(manifest(), tools={"pillow": "13.0.0"}))
    assert not resizes_columns_first(replace(manifest(), tools={"pillow": "12.1.0"}))
    may_change = resizes_columns_first(replace(manifest(), tools={"pillow": pillow}))
    random = np.random.default_rng(0)
    for k in range(300):
        width, height, new_width, new_height = (int(n) for n in random.integers(2, 120, 4))
        if k % 2:
            new_width = max(1, width - int(random.integers(-15, 25)))
            new_height = max(1, height - 2 * (width - new_width) + int(random.integers(-1, 2)))
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))
        kernel = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)[k % 3]
        columns_first = may_change and height - new_height > max(0, 2 * (width - new_width))
        first = (width, new_height) if columns_first else (new_width, height)
        twice = picture.resize(first, kernel).resize((new_width, new_height), kernel)
        assert picture.resize((new_width, new_height), kernel).tobytes() == twice.tobytes(), (picture.size, twice.size)
