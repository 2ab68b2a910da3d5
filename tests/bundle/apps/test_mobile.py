"""The Kotlin and the Swift code: it parses for any bundle, and compiles.

Parsing needs tree-sitter and the grammars of both languages. Compiling needs kotlinc and java, or swiftc; those tests
are skipped where the compiler is not installed.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt.bundle.apps import android, ios
from edgeopt.bundle.apps.android import kotlin_string
from edgeopt.bundle.apps.ios import swift_string
from edgeopt.bundle.manifest import Manifest, ModelFile, StoredArray, StoredVector
from edgeopt.targets import load_target
from edgeopt.types import (
    ArrayPreprocessing,
    AudioPreprocessing,
    DType,
    Format,
    ImagePreprocessing,
    Preprocessing,
    QuantParams,
    Signature,
    SignatureTensor,
    TextPreprocessing,
)

HERE = Path(__file__).parent
TARGETS: dict[Format, str] = {
    "litert": "android-int8",
    "onnx": "android-onnx-int8",
    "executorch": "android-executorch-int8",
    "coreml": "ios-coreml-int8",
}
TOOLS = {
    "ai-edge-litert": "2.3.0",
    "onnxruntime": "1.31.1",
    "executorch": "1.5.1+cpu",
    "coremltools": "9.0",
    "pillow": "13.0.0",
}
SUFFIXES = {"litert": "tflite", "onnx": "onnx", "executorch": "pte", "coreml": "mlpackage"}
#: What breaks code that quotes or names things carelessly.
ODD_NAMES = (
    "class", "in", "x y", "x-y", "1st", "", "naïve", "日本", 'a"b', "back\\slash", "$dollar ${x}", "\\(x)", "*/ end",
    "/* open", "line\nbreak", "\u2028", "😀", "Inputs", "func", "self", "it", "x_y",
)  # fmt: skip
ODD_MODELS = ("net", "Tensor", "class", "2 fast", "Runner", "模型", 'quo"te $x', "import static", "Pixels*/", "LiteRT")


def make(
    format_: Format = "litert",
    inputs: tuple[SignatureTensor, ...] = (),
    outputs: tuple[SignatureTensor, ...] = (),
    preprocessing: Preprocessing | None = None,
    labels: tuple[str, ...] = (),
    name: str = "net",
    target: str | None = None,
) -> Manifest:
    """A manifest with one golden vector; nothing of it exists on disk."""

    def stored(tensor: SignatureTensor, kind: str) -> StoredArray:
        shape = tuple(size if isinstance(size, int) else 2 for size in tensor.shape)
        return StoredArray(f"golden/0/{kind}_{tensor.name[:8]}.bin", shape, tensor.dtype)

    signature = Signature(inputs, outputs or (tensor("logits", (1, 10)),))
    vector = StoredVector(
        {t.name: stored(t, "input") for t in signature.inputs},
        {t.name: stored(t, "output") for t in signature.outputs},
        {},
        None,
    )
    return Manifest(
        schema_version=1,
        kind="edgeopt-bundle",
        name=name,
        target=target or TARGETS[format_],
        device="pixel-4",
        status="passed",
        format=format_,
        precision="w8a8",
        model=ModelFile(f"model.{SUFFIXES[format_]}", "w8a8", signature),
        float_twin=None,
        preprocessing=preprocessing,
        labels=labels,
        golden=(vector,),
        golden_tolerance=0.05,
        history=(),
        source_sha256="0" * 64,
        tools={
            "ai-edge-litert": "2.3.0",
            "onnxruntime": "1.31.1",
            "executorch": "1.5.1+cpu",
            "coremltools": "9.0",
            "pillow": "13.0.0",
        },
        target_definition=load_target(target or TARGETS[format_]),
        files={},
    )


def tensor(
    name: str,
    shape: tuple[int | str, ...],
    dtype: DType = "float32",
    model_dtype: DType | None = None,
    permutation: tuple[int, ...] | None = None,
    scale: float | None = None,
    zero_point: int = 0,
) -> SignatureTensor:
    params = None if scale is None else QuantParams((scale,), (zero_point,))
    return SignatureTensor(name, f"{name}:0", shape, dtype, model_dtype or dtype, permutation, params)


KINDS = ("image", "grey bytes", "text", "audio", "array", "none", "several", "scalar")


def sample(format_: Format, kind: str, quantized: bool) -> Manifest:
    """One bundle of the matrix."""
    stored: DType = "int8" if quantized and format_ != "coreml" else "float32"
    scale = 0.05 if stored == "int8" else None
    labels = tuple(f'label {k} "quoted" $x' for k in range(10))

    def real(name: str, shape: tuple[int | str, ...], permutation: tuple[int, ...] | None = None) -> SignatureTensor:
        return tensor(name, shape, stored, "float32", permutation, scale, 3)

    logits = (real("logits", (1, 10)),)
    token: DType = "int32"
    match kind:
        case "image":
            preprocessing = ImagePreprocessing(24, 32, crop_fraction=0.875, interpolation="bicubic", mean=(0.5,))
            return make(format_, (real("image", (1, 24, 32, 3), (0, 2, 3, 1)),), logits, preprocessing, labels)
        case "grey bytes":
            dtype: DType = "float32" if format_ == "coreml" else "uint8"
            preprocessing = ImagePreprocessing(
                8, 8, channels=1, resize_shorter=10, rescale=1.0, interpolation="lanczos", layout="NHWC"
            )
            return make(format_, (tensor("pixels", (1, 8, 8, 1), dtype),), logits, preprocessing)
        case "text":
            fields = [tensor(n, ("batch", 16), token) for n in ("input_ids", "token_type_ids", "attention_mask")]
            return make(format_, tuple(fields), logits, TextPreprocessing("tokenizer", max_length=32), labels)
        case "audio":
            preprocessing_ = AudioPreprocessing(8000, 100, mean=-0.5, std=2.0, channel_axis=True)
            return make(format_, (real("wave", (1, 1, 100)),), logits, preprocessing_)
        case "array":
            given = (real("signal", ("n", 3, "t")), tensor("ids", (1, 4), token))
            return make(format_, given, logits, ArrayPreprocessing(2.0, (1.0, 2.0, -3.0), (1.0, 1.0, 4.0), -2))
        case "none":
            return replace(make(format_, (real("x", ("batch", 4)),), labels=labels), golden=(), tools={})
        case "scalar":
            return make(format_, (real("x", ()),), (real("y", ()),))
    every: list[DType] = ["float32", "int32"]
    every += [] if format_ == "coreml" else ["int8", "uint8", "int64"]
    every += ["bool", "int16"] if format_ == "litert" else ["float16"] if format_ == "executorch" else []
    given = tuple(tensor(name, (1, "n"), every[k % len(every)]) for k, name in enumerate(ODD_NAMES))
    model = ODD_MODELS[KINDS.index(kind)]
    return make(format_, given, given[::-1], None, ("only one",), model)


MATRIX = list(itertools.product(TARGETS, KINDS, (False, True)))


@functools.cache
def parse_errors(language: str, source: str) -> tuple[str, ...]:
    """Where a real parser of the language stumbles. Most files are the same in many bundles."""
    tree_sitter = pytest.importorskip("tree_sitter", reason="tree-sitter is not installed")
    grammar = pytest.importorskip(f"tree_sitter_{language}", reason=f"the grammar of {language} is not installed")
    tree = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(source.encode())
    wrong: list[str] = []
    nodes = [tree.root_node]
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            line = node.start_point.row
            wrong.append(f"{line + 1}: {source.splitlines()[line]}")
        nodes += node.children
    return tuple(wrong)


def check_text(files: Mapping[str, str], language: str, suffixes: tuple[str, ...]) -> None:
    for path, text in files.items():
        assert text.isascii(), path
        assert not re.search(r"\{\{|\}\}|\{%|\bNone\b|Undefined", text), path
        assert not re.search(r"\n\n\n|[ \t]\n", text), f"stray blanks in {path}"
        assert text.endswith("\n")
        if path.endswith(suffixes):
            assert not parse_errors(language, text), path


@pytest.mark.parametrize(("format_", "kind", "quantized"), MATRIX)
def test_kotlin_parses_for_every_kind_of_bundle(format_: Format, kind: str, quantized: bool) -> None:
    files = android.files(sample(format_, kind, quantized))
    assert bool(files) == (format_ != "coreml")
    check_text(files, "kotlin", (".kt", ".kts"))
    assert files == android.files(sample(format_, kind, quantized))


@pytest.mark.parametrize(("format_", "kind", "quantized"), MATRIX)
def test_swift_parses_for_every_kind_of_bundle(format_: Format, kind: str, quantized: bool) -> None:
    files = ios.files(sample(format_, kind, quantized))
    assert "Package.swift" in files
    check_text(files, "swift", (".swift",))
    assert files == ios.files(sample(format_, kind, quantized))


@pytest.mark.parametrize("name", ODD_MODELS)
def test_any_model_name_makes_a_class_of_its_own(name: str) -> None:
    manifest = make(inputs=(tensor("x", (1, 4)),), name=name)
    (kotlin,) = [t for t in android.files(manifest).values() if "AutoCloseable {\n    class Inputs" in t]
    made = re.search(r"^class (\w+)\(context", kotlin, re.MULTILINE)
    assert made is not None
    assert made[1] not in android.CLASS_NAMES
    assert re.match(r"package edgeopt\.[a-z][a-z0-9_]*\n", kotlin)
    (swift,) = [
        path
        for path in ios.files(manifest)
        if path.startswith("Sources/") and "Package/" in path and not path.endswith(("Tensors.swift", "Runner.swift"))
    ]
    assert Path(swift).stem not in ios.CLASS_NAMES
    check_text(android.files(manifest), "kotlin", (".kt", ".kts"))
    check_text(ios.files(manifest), "swift", (".swift",))


def test_field_names_stay_apart_and_native_names_are_kept() -> None:
    manifest = sample("litert", "several", quantized=False)
    kotlin = next(t for t in android.files(manifest).values() if "class Outputs(" in t)
    for part in re.split(r"class Outputs\(", kotlin):
        fields = re.findall(r"^        val (\w+): Tensor<", part, re.MULTILINE)
        assert len(fields) == len(set(fields)) == len(ODD_NAMES)
        assert not set(fields) & android.KEYWORDS
    for name in ODD_NAMES:
        assert f"TensorSpec({kotlin_string(f'{name}:0')}, " in kotlin


@pytest.mark.parametrize(
    ("text", "kotlin", "swift"),
    [
        ('a"b\\c', '"a\\"b\\\\c"', '"a\\"b\\\\c"'),
        ("${x}", '"\\${x}"', '"${x}"'),
        ("\\(x)", '"\\\\(x)"', '"\\\\(x)"'),
        ("é\n\x00", '"\\u00e9\\n\\u0000"', '"\\u{e9}\\n\\u{0}"'),
        ("😀", '"\\ud83d\\ude00"', '"\\u{1f600}"'),
        ("\ud800", '"\\ud800"', '"\\u{fffd}"'),
    ],
)
def test_string_literals(text: str, kotlin: str, swift: str) -> None:
    assert kotlin_string(text) == kotlin
    assert swift_string(text) == swift


def test_types_that_a_binding_lacks_give_no_app() -> None:
    short = (tensor("x", (1, 4), "int16"),)
    half = (tensor("x", (1, 4), "float16", "float32"),)
    assert not android.files(make("executorch", short))
    assert not android.files(make("litert", half))
    assert not ios.files(make("onnx", half))
    assert not ios.files(make("coreml", (tensor("x", (1, 4), "int64"),)))
    assert android.files(make("onnx", half))


def test_an_accelerator_gets_its_own_package() -> None:
    given = (tensor("x", (1, 4)),)
    hexagon = android.files(make("onnx", given, target="qualcomm-int8"))
    assert "onnxruntime-android-qnn:1.31.1" in hexagon["build.gradle.kts"]
    assert any("addQnn" in text for text in hexagon.values())
    vulkan = android.files(make("executorch", given, target="android-vulkan-fp16"))
    assert "executorch-android-vulkan:1.5.1" in vulkan["build.gradle.kts"]
    assert not android.files(make("litert", given, target="ethosu55-int8"))
    assert "backend_coreml" in ios.files(make("executorch", given, target="ios-executorch-coreml"))["Package.swift"]


def test_the_model_and_golden_files_are_taken_from_the_bundle() -> None:
    script = android.files(sample("onnx", "image", quantized=True))["build.gradle.kts"]
    assert 'from("../model.onnx", "../labels.txt")' in script
    assert 'from("../golden")' in script
    assert "noCompress" not in script  # the file is copied out of the package, so it may be deflated there
    assert 'noCompress += "tflite"' in android.files(sample("litert", "image", quantized=True))["build.gradle.kts"]
    assert 'implementation("com.microsoft.onnxruntime:onnxruntime-android:1.31.1")' in script


def model_class(files: Mapping[str, str]) -> str:
    return next(text for text in files.values() if re.search(r"class Outputs\(|struct Outputs", text))


def test_the_pillow_that_made_the_bundle_decides_the_order_of_passes() -> None:
    order = "resizeColumns(newHeight, kernel).resizeRows"
    for write_app in (android.files, ios.files):
        for version, changes in (("13.0.0", True), ("12.2.0", False)):
            files = write_app(replace(sample("litert", "image", quantized=True), tools={"pillow": version}))
            assert any(order in text for text in files.values()) == changes


def test_text_has_no_arguments_that_do_nothing() -> None:
    """Padding is asked for where there is some, since a wrong id goes unnoticed; type ids where an input takes them."""
    ids, types = (tensor(name, ("n", "length"), "int64") for name in ("input_ids", "token_type_ids"))
    for padding, given, wanted in (
        ("max_length", (ids, types), ("padId: Long,", "padID: Int64,", "typeIds:", "padLeft:")),
        ("max_length", (ids,), ("padId: Long,", "padID: Int64,", "padLeft:")),
        ("none", (ids, types), ("typeIds:",)),
        ("none", (ids,), ()),
    ):
        made = make("onnx", given, preprocessing=TextPreprocessing("tokenizer", 32, padding))
        text = model_class(android.files(made)) + model_class(ios.files(made))
        for argument in ("padId: Long,", "padID: Int64,", "typeIds:", "padLeft:"):
            assert (argument in text) == (argument in wanted), (padding, argument)
        check_text(android.files(made), "kotlin", (".kt",))
        check_text(ios.files(made), "swift", (".swift",))


# -- with compilers ---------------------------------------------------------------------------------------------------

kotlin_only = pytest.mark.skipif(
    shutil.which("kotlinc") is None or shutil.which("java") is None, reason="kotlinc and java are not installed"
)
swift_only = pytest.mark.skipif(shutil.which("swiftc") is None, reason="swiftc is not installed")


def write(files: Mapping[str, str], directory: Path) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def call(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.e2e
@kotlin_only
@pytest.mark.parametrize("format_", ["litert", "onnx", "executorch"])
def test_kotlin_compiles_against_the_runtimes_signatures(format_: Format, tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS):
        manifest = replace(sample(format_, kind, quantized=number % 2 == 0), name=f"net {number}")
        write(android.files(manifest), tmp_path / str(number))
    call("kotlinc", "-Werror", "-d", tmp_path / "out.jar", *tmp_path.glob("*/src"), HERE / "android_stubs")


@pytest.mark.e2e
@swift_only
@pytest.mark.parametrize("format_", list(TARGETS))
def test_swift_compiles_against_the_runtimes_signatures(format_: Format, tmp_path: Path) -> None:
    for stub in sorted((HERE / "ios_stubs").glob("*.swift")):
        call("swiftc", "-emit-module", "-parse-as-library", "-module-name", stub.stem, stub, cwd=tmp_path)
    for number, kind in enumerate(KINDS):
        package = tmp_path / str(number)
        write(ios.files(sample(format_, kind, quantized=number % 2 == 0)), package)
        (module,) = (package / "Sources").iterdir()
        flags = ["-warnings-as-errors", "-parse-as-library", "-I", "..", "-I", "."]
        sources = sorted(module.glob("*.swift"))
        call("swiftc", *flags, "-enable-testing", "-emit-module", "-module-name", module.name, *sources, cwd=package)
        if tests := sorted(package.glob("Tests/*/*.swift")):
            call("swiftc", *flags, "-typecheck", *tests, cwd=package)
