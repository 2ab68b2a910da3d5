"""The generated Python module prepares, encodes and ranks as edgeopt does, whatever the manifest says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeopt.bundle.apps import python
from edgeopt.bundle.manifest import Manifest, ModelFile, StoredArray, StoredVector
from edgeopt.datasets.array import ArrayTransform
from edgeopt.datasets.image import ImageTransform
from edgeopt.datasets.text import TextTransform
from edgeopt.runtimes.base import decode, encode
from edgeopt.targets import load_target
from edgeopt.types import (
    Array,
    ArrayPreprocessing,
    AudioPreprocessing,
    Dim,
    DType,
    ImagePreprocessing,
    Preprocessing,
    QuantParams,
    Signature,
    SignatureTensor,
    TensorSpec,
    TextPreprocessing,
)

#: The generator needs no runtime; ONNX Runtime is the quickest to import for what is made.
TARGET = load_target("android-onnx-int8")
SCORES = SignatureTensor("scores", "out", ("n", 3), "float32", "float32")
LABELS = ('quote "', "back\\slash\n", "öäü 日本\0")


def manifest(
    inputs: tuple[SignatureTensor, ...],
    outputs: tuple[SignatureTensor, ...] = (SCORES,),
    *,
    name: str = "net",
    preprocessing: Preprocessing | None = None,
    labels: tuple[str, ...] = (),
) -> Manifest:
    vector = StoredVector(
        {t.name: _stored(f"in_{k}", t) for k, t in enumerate(inputs)},
        {t.name: _stored(f"out_{k}", t) for k, t in enumerate(outputs)},
        {},
        None,
    )
    return Manifest(
        schema_version=1,
        kind="edgeopt-bundle",
        name=name,
        target=TARGET.name,
        device=TARGET.device,
        status="passed",
        format=TARGET.format,
        precision="w8a8",
        model=ModelFile("model.onnx", "w8a8", Signature(inputs, outputs)),
        float_twin=None,
        preprocessing=preprocessing,
        labels=labels,
        golden=(vector,),
        golden_tolerance=0.05,
        history=(),
        source_sha256="0" * 64,
        tools={"pillow": "13.0.0"},
        target_definition=TARGET,
        files={},
    )


def _stored(name: str, tensor: SignatureTensor) -> StoredArray:
    shape = tuple(1 if isinstance(size, str) else size for size in tensor.shape)
    return StoredArray(f"golden/0/{name}.bin", shape, tensor.dtype)


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    """Generated modules must be found by their dataclasses, and forgotten."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.startswith("generated_"):
            del sys.modules[name]


def load(folder: Path, made: Manifest) -> ModuleType:
    (folder / "python").mkdir(parents=True)
    texts = python.files(made)
    assert texts == python.files(made)
    for name, text in texts.items():
        assert text.isascii()
        compile(text, name, "exec")
        (folder / "python" / name).write_text(text)
    file = next(name for name in texts if name != "golden_test.py")
    spec = spec_from_file_location(f"generated_{folder.name}", folder / "python" / file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("filter_", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pictures(tmp_path: Path, filter_: str, layout: str) -> None:
    random = np.random.default_rng(0)
    for k, (channels, fraction, shorter, mean) in enumerate(
        ((3, 0.875, None, (0.1, 0.2, 0.3)), (1, None, 31, (0.5,)), (3, 0.6, 40, (127.0,)), (1, None, None, (0.0,)))
    ):
        p = ImagePreprocessing(20, 30, channels, fraction, shorter, filter_, 255.0, mean, (0.3,), layout)
        shape = (1, channels, 20, 30) if layout == "NCHW" else (1, 20, 30, channels)
        module = load(tmp_path / str(k), manifest((tensor("x", shape),), preprocessing=p))
        for size, mode in (((57, 81), "RGB"), ((90, 33), "L"), ((40, 40), "RGBA"), ((31, 64), "I;16")):
            pixels = random.integers(0, 256, (*size[::-1], 4)).astype(np.uint8)
            wide = pixels[..., 0].astype(np.uint16) * 257
            picture = Image.fromarray(wide) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
            wanted = ImageTransform(p, (TensorSpec("x", shape, "float32"),))(picture, "x")
            assert wanted is not None
            assert np.array_equal(module.preprocess(picture).x, wanted["x"]), (size, mode)


def test_a_picture_on_its_side(tmp_path: Path) -> None:
    p = ImagePreprocessing(8, 12)
    module = load(tmp_path, manifest((tensor("x", (1, 3, 8, 12)),), preprocessing=p))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png", exif=exif)
    wanted = ImageTransform(p, (TensorSpec("x", (1, 3, 8, 12), "float32"),))(tmp_path / "p.png", "x")
    assert wanted is not None
    assert np.array_equal(module.preprocess(tmp_path / "p.png").x, wanted["x"])


def test_uint8_pixels_stay_as_they_are(tmp_path: Path) -> None:
    p = ImagePreprocessing(2, 2, rescale=1.0)
    module = load(tmp_path, manifest((tensor("x", (1, 3, 2, 2), "uint8"),), preprocessing=p))
    assert module.preprocess(Image.new("RGB", (4, 4), (1, 2, 255))).x.dtype == np.uint8


def tensor(name: str, shape: tuple[int | str, ...], dtype: DType = "float32") -> SignatureTensor:
    return SignatureTensor(name, f"{name}:0", shape, dtype, dtype)


def test_arrays(tmp_path: Path) -> None:
    p = ArrayPreprocessing(2.0, (1.0, 2.0, 3.0), (0.5,), channel_axis=-1)
    inputs = (tensor("x", ("n", 4, 3)), tensor("kind", (1,), "int64"))
    module = load(tmp_path, manifest(inputs, preprocessing=p))
    x, kind = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32), np.array([7])
    made = module.preprocess(module.Input(x=x, kind=kind))
    specs = (TensorSpec("x", (1, 4, 3), "float32"), TensorSpec("kind", (1,), "int64"))
    wanted = ArrayTransform(p, specs)({"x": x, "kind": kind}, "x")
    assert np.array_equal(made.x, wanted["x"])
    assert np.array_equal(made.kind, kind)
    with pytest.raises(ValueError, match="axis 2 is 2 long"):
        module.preprocess(module.Input(x=x[..., :2], kind=kind))


def test_sound(tmp_path: Path) -> None:
    p = AudioPreprocessing(8000, 6, mean=0.5, std=2.0, channel_axis=True)
    module = load(tmp_path, manifest((tensor("x", (1, 1, 6)),), preprocessing=p))
    made = module.preprocess(np.array([0.5, 1.5], np.float32)).x
    assert made.tolist() == [[[0.0, 0.5, -0.25, -0.25, -0.25, -0.25]]]
    assert module.preprocess(np.zeros(100)).x.shape == (1, 1, 6)


@pytest.mark.parametrize("sequence", [6, "length"])
@pytest.mark.parametrize("padding", ["max_length", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_text(tmp_path: Path, sequence: int | str, padding: str, side: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "<pad>": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    config = {"pad_token": {"content": "<pad>"}, "padding_side": side}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    p = TextPreprocessing("tokenizer", 8, padding, ("a", "b"))
    names = ("ids", "segment_ids", "mask")
    made = manifest(tuple(tensor(name, (1, sequence), "int64") for name in names), preprocessing=p)
    module = load(tmp_path, made)
    size = sequence if isinstance(sequence, int) else Dim("length")
    specs = tuple(TensorSpec(name, (1, size), "int64") for name in names)
    transform = TextTransform(replace(p, tokenizer=str(tmp_path / "tokenizer")), specs)
    for texts in (("one",), ("one two", "two three four"), ("one " * 9, "two"), ("",)):
        wanted = transform(texts, "x")
        assert wanted is not None
        got = module.preprocess(*texts)
        for name in names:
            assert np.array_equal(getattr(got, name), wanted[name]), (texts, name)


def test_mappings(tmp_path: Path) -> None:
    """Every kind of tensor is encoded and decoded as by edgeopt's runtimes."""
    random = np.random.default_rng(0)
    quantized = QuantParams((0.037,), (-5,))
    inputs = (
        SignatureTensor("image", "image", (1, 4, 5, 3), "int8", "float32", (0, 2, 3, 1), quantized),
        SignatureTensor("half", "half", ("n", 2), "float16", "float32"),
        SignatureTensor("ids", "ids", (1, 2), "int32", "int64"),
        SignatureTensor("wide", "wide", (2, 1), "int16", "float32", (1, 0), quantized),
        SignatureTensor("flag", "flag", (), "bool", "bool"),
    )
    module = load(tmp_path, manifest(inputs))
    values: dict[str, Array] = {
        "image": random.normal(scale=4, size=(1, 3, 4, 5)).astype(np.float32),
        "half": random.normal(size=(3, 2)).astype(np.float32),
        "ids": np.array([[5, 2**31 - 1]]),
        "wide": random.normal(size=(1, 2)).astype(np.float32),
        "flag": np.array(True),
    }
    for described in inputs:
        mapping = module.INPUTS[described.name]
        wanted = encode(values[described.name], described)
        stored = mapping.encode(values[described.name])
        assert stored.dtype == wanted.dtype
        assert np.array_equal(stored, wanted)
        back = mapping.decode(stored)
        assert back.dtype == np.dtype(described.model_dtype)
        assert np.array_equal(back, decode(wanted, described))
    with pytest.raises(ValueError, match=r"image: has the shape \(3, 4, 5\), the model takes \(1, 3, 4, 5\)"):
        module.INPUTS["image"].encode(values["image"][0])
    with pytest.raises(TypeError, match="same_kind"):
        module.INPUTS["ids"].encode(np.array([[0.5, 1.5]]))


def test_odd_names(tmp_path: Path) -> None:
    """Keywords, collisions and names without a letter; a model called as a module that it needs."""
    inputs = tuple(tensor(name, (1,)) for name in ("class", "class_", "a b", "a-b", "日本", '"\n\\', "None"))
    module = load(tmp_path, manifest(inputs, name='numpy "\n\\', labels=LABELS))
    assert list(module.INPUTS) == ["class_", "class_2", "a_b", "a_b_2", "input", "input_2", "none"]
    assert module.INPUTS["input_2"].name == '"\n\\:0'
    assert module.LABELS == LABELS
    assert {path.name for path in (tmp_path / "python").iterdir()} == {"numpy_.py", "golden_test.py"}


@pytest.mark.parametrize(
    "target", ["android-int8", "android-executorch-int8", "ios-coreml-fp16", "openvino-int8", "linux-arm64-onnx-w8"]
)
def test_every_runtime_is_python(target: str) -> None:
    loaded = load_target(target)
    made = replace(manifest((tensor("x", (1,)),)), target_definition=loaded, format=loaded.format)
    for name, text in python.files(made).items():
        compile(text, name, "exec")


def test_top(tmp_path: Path) -> None:
    module = load(tmp_path, manifest((tensor("x", (1,)),), labels=LABELS))
    output = module.Output(scores=np.array([[1.0, 3.0, 3.0]], np.float32))
    assert module.top(output, 2) == [(LABELS[1], 3.0), (LABELS[2], 3.0)]
    assert [score for _, score in module.top(output)] == [3.0, 3.0, 1.0]


@pytest.mark.parametrize(("target", "option"), [("android-onnx-int8", {"threads": 1}), ("openvino-int8", {})])
def test_runs(tmp_path: Path, target: str, option: dict[str, int]) -> None:
    """With a real file."""
    if target == "openvino-int8":
        pytest.importorskip("openvino")
    x = helper.make_tensor_value_info("x:0", TensorProto.FLOAT, [1, 3, 2, 2])
    y = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3])
    nodes = [
        helper.make_node("GlobalAveragePool", ["x:0"], ["p"]),
        helper.make_node("Flatten", ["p"], ["out"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx"
    )
    p = ImagePreprocessing(2, 2, rescale=1.0)
    made = manifest((tensor("x", (1, 3, 2, 2)),), preprocessing=p, labels=("red", "green", "blue"))
    module = load(tmp_path, replace(made, target_definition=load_target(target)))
    output = module.Net(**option).run(module.preprocess(Image.new("RGB", (9, 5), (10, 30, 20))))
    assert module.top(output) == [("green", 30.0), ("blue", 20.0), ("red", 10.0)]


def test_an_import_leaves_nothing_in_a_bundle(tmp_path: Path) -> None:
    """A bundle with more files than its manifest lists is refused; elsewhere Python may cache what it likes."""
    (tmp_path / "python").mkdir()
    for name, text in python.files(manifest((tensor("x", (1,)),))).items():
        (tmp_path / "python" / name).write_text(text.replace("import onnxruntime\n", "import no_such_runtime\n"))

    def left_by_an_import() -> bool:
        environment = {"PYTHONPATH": str(tmp_path / "python")}
        done = subprocess.run([sys.executable, "-c", "import net"], capture_output=True, env=environment, check=False)
        assert b"no_such_runtime" in done.stderr  # not even where the import fails
        return (tmp_path / "python" / "__pycache__").exists()

    assert left_by_an_import()
    (tmp_path / "manifest.json").write_text("{}")
    assert not left_by_an_import()


def test_onnxruntime_is_kept_from_reporting() -> None:
    made = manifest((tensor("x", (1,)),))
    module = python.files(made)["net.py"]
    assert module.index('os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")') < module.index("import onnxruntime")
    other = replace(made, target_definition=load_target("android-int8"), format="litert")
    assert "ORT_" not in python.files(other)["net.py"]
