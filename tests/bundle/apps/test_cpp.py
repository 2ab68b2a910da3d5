"""Generated C++ compiles for any manifest, and its arithmetic is edgeopt's own to the bit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle.apps import cpp
from edgeopt.bundle.manifest import Manifest, ModelFile, StoredArray, StoredVector
from edgeopt.native import RUNNER
from edgeopt.targets import load_target
from edgeopt.types import (
    ArrayPreprocessing,
    AudioPreprocessing,
    DType,
    ImagePreprocessing,
    Preprocessing,
    QuantParams,
    Signature,
    SignatureTensor,
    TextPreprocessing,
)

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
IMAGE = ImagePreprocessing(4, 6, crop_fraction=0.875, interpolation="bicubic", mean=(0.1, 0.2, 0.3), std=(0.5,))
PICTURE = SignatureTensor(
    "image", "serving:0", (1, 4, 6, 3), "int8", "float32", (0, 2, 3, 1), QuantParams((0.1,), (3,))
)
SCORES = SignatureTensor("scores", "out", (1, 3), "float32", "float32")
IDS = SignatureTensor("input_ids", "ids", ("n", "length"), "int32", "int64")
ODD_LABELS = ('quote "', "back\\slash", "two\nlines and ??/ trigraph", "öäü 日本", "nul\0 3", "")


def manifest(
    inputs: tuple[SignatureTensor, ...],
    outputs: tuple[SignatureTensor, ...],
    *,
    name: str = "net",
    target: str = "android-int8",
    preprocessing: Preprocessing | None = None,
    labels: tuple[str, ...] = (),
) -> Manifest:
    def stored(kind: str, tensors: tuple[SignatureTensor, ...]) -> dict[str, StoredArray]:
        shapes = {t.name: tuple(2 if isinstance(size, str) else size for size in t.shape) for t in tensors}
        return {t.name: StoredArray(f"golden/0/{kind}_{k}.bin", shapes[t.name], t.dtype) for k, t in enumerate(tensors)}

    loaded = load_target(target)
    vector = StoredVector(stored("input", inputs), stored("output", outputs), stored("reference", outputs), None)
    suffix = {"litert": "tflite", "onnx": "onnx", "executorch": "pte"}[loaded.format]
    return Manifest(
        schema_version=1,
        kind="edgeopt-bundle",
        name=name,
        target=target,
        device=loaded.device,
        status="passed",
        format=loaded.format,
        precision="w8a8",
        model=ModelFile(f"model.{suffix}", "w8a8", Signature(inputs, outputs)),
        float_twin=None,
        preprocessing=preprocessing,
        labels=labels,
        golden=(vector,),
        golden_tolerance=0.05,
        history=(),
        source_sha256="0" * 64,
        tools={"pillow": "13.0.0"},
        target_definition=loaded,
        files={},
    )


def odd_tensor(
    name: str, dtype: DType, model_dtype: DType, shape: tuple[int | str, ...] = ("batch", 2)
) -> SignatureTensor:
    return SignatureTensor(name, f"{name}:0", shape, dtype, model_dtype)


CASES = {
    "image": manifest((PICTURE,), (SCORES,), preprocessing=IMAGE, labels=("cat", "dog", "mouse")),
    "image_grey_uint8": manifest(
        (SignatureTensor("x", "x", (1, 1, 4, 6), "uint8", "uint8"),),
        (SCORES,),
        preprocessing=ImagePreprocessing(4, 6, channels=1, resize_shorter=9, rescale=1.0, interpolation="nearest"),
        target="android-onnx-int8",
    ),
    "text": manifest(
        (IDS, replace(IDS, name="attention_mask"), replace(IDS, name="token_type_ids", dtype="int64")),
        (replace(SCORES, shape=("n", 6)),),
        preprocessing=TextPreprocessing("tokenizer", 32, text_keys=("a", "b")),
        target="android-onnx-int8",
        labels=ODD_LABELS,
    ),
    "text_unpadded": manifest(
        (IDS,), (SCORES,), preprocessing=TextPreprocessing("tokenizer", padding="none"), target="android-onnx-fp16"
    ),
    "audio": manifest(
        (SignatureTensor("sound", "sound", (1, 1, 100), "float16", "float16"),),
        (replace(SCORES, dtype="uint8", quantization=QuantParams((0.5,), (128,))),),
        preprocessing=AudioPreprocessing(8000, 100, 0.1, 0.2),
        target="linux-arm64-fp16",
    ),
    "array": manifest(
        (odd_tensor("x", "float32", "float32", (1, 2, 5)), odd_tensor("n", "int64", "int64")),
        (SCORES,),
        preprocessing=ArrayPreprocessing(2.0, (1.0, 2.0), (3.0,), channel_axis=-2),
        target="android-executorch-int8",
    ),
    "array_of_whole_numbers": manifest(
        (odd_tensor("n", "int64", "int64"),), (SCORES,), preprocessing=ArrayPreprocessing(2.0)
    ),
    "odd names": manifest(
        (
            odd_tensor("class", "bool", "bool"),
            odd_tensor("class_", "int8", "int8"),
            odd_tensor('a"b\\\n*/', "int16", "int16", ()),
            odd_tensor("日本", "uint8", "uint8", ('d"?', "\\")),
            odd_tensor("", "int32", "int64"),
            odd_tensor("std", "float16", "float32"),
            odd_tensor("linux", "float32", "float16"),
        ),
        (odd_tensor("Output", "int64", "int64"), odd_tensor("input", "int32", "int32")),
        name='7 "net"\n??/ \\',
        target="android-executorch-int8",
    ),
    "none": manifest((), (SCORES,)),
}


def write(folder: Path, made: Manifest) -> str:
    """The app's folder; returns the stem of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in cpp.files(made).items():
        (folder / name).write_text(text, encoding="utf-8")
    stems = {path.stem for path in folder.glob("*.cpp")}
    return next(path.stem for path in folder.glob("*.hpp") if path.stem in stems)


def compile_(*arguments: str | Path) -> None:
    done = subprocess.run([COMPILER or "", *FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_is_deterministic_and_plain(name: str) -> None:
    first = cpp.files(CASES[name])
    assert first == cpp.files(CASES[name])
    generated = [text for file, text in first.items() if not (RUNNER / file).exists()]
    assert all(text.isascii() and text.endswith("\n") for text in generated)


@pytest.mark.e2e
@needs_compiler
def test_models_compile(tmp_path: Path) -> None:
    """All in one unit, which also proves that one program can have several models of one runtime."""
    stems = []
    models = [replace(made, name=f"{made.name} {case}") for case, made in CASES.items()]
    # `time` is a function of C, and edgeopt_model.hpp is guarded by EDGEOPT_MODEL_HPP_.
    models += [replace(CASES["none"], name=name) for name in ("time", "model")]
    for k, made in enumerate(models):
        stems.append((k, write(tmp_path / str(k), made)))
    everything = tmp_path / "everything.cpp"
    everything.write_text("#include <ctime>\n" + "".join(f'#include "{k}/{stem}.cpp"\n' for k, stem in stems))
    compile_("-fsyntax-only", everything)


@pytest.mark.e2e
@needs_compiler
def test_golden_test_compiles_for_odd_names(tmp_path: Path) -> None:
    write(tmp_path, CASES["odd names"])
    compile_("-fsyntax-only", tmp_path / "golden_test.cpp")


def test_the_runner_comes_along() -> None:
    names = cpp.files(CASES["image"])
    assert {"litert.cpp", "litert_c_api.hpp", "edgeopt_model.hpp", "checks.hpp", "edgeopt_image.hpp"} <= names.keys()
    assert "main.cpp" not in names
    assert "edgeopt_image.hpp" not in cpp.files(CASES["audio"])


def test_string_literals() -> None:
    assert cpp.string_literal('a"\\?\n') == '"a\\042\\134\\077\\012"'
    assert cpp.string_literal("ö1") == '"\\303\\2661"'  # three digits end an octal escape


ECHO = """
// A runtime whose outputs are its inputs.
#include "edgeopt_model.hpp"
namespace edgeopt {
namespace {
class Echo : public Model {
 public:
  const std::vector<TensorInfo>& inputs() const override { return infos_; }
  const std::vector<TensorInfo>& outputs() const override { return infos_; }
  std::vector<Tensor> run(const std::vector<Tensor>& inputs) override { return inputs; }
 private:
  std::vector<TensorInfo> infos_{{"second", DType::kInt16, {2, kFree}}, {"first", DType::kInt8, {1, 4, 6, 3}}};
};
}  // namespace
std::unique_ptr<Model> Model::open(const std::string& path, int) {
  if (path.find("model.tflite") == std::string::npos) throw Error("no such file");
  return std::make_unique<Echo>();
}
}  // namespace edgeopt
"""


@pytest.mark.e2e
@needs_compiler
def test_golden_test_runs(tmp_path: Path) -> None:
    """Found by name in whatever order the file has them, through permutation and quantization and back."""
    first = replace(PICTURE, name="first", native_name="first")
    second = SignatureTensor("second", "second", (2, "n"), "int16", "float32", (1, 0), QuantParams((0.25,), (-7,)))
    made = manifest((first, second), (second, first), preprocessing=IMAGE)
    stem = write(tmp_path / "cpp", made)
    (tmp_path / "all.cpp").write_text(f'#include "{stem}.cpp"\n#include "golden_test.cpp"\n{ECHO}')
    program = tmp_path / "golden_test"
    compile_("-I", tmp_path / "cpp", tmp_path / "all.cpp", "-o", program)

    random = np.random.default_rng(0)
    vector = made.golden[0]
    (tmp_path / "golden" / "0").mkdir(parents=True)
    for name in ("first", "second"):
        stored = vector.inputs[name]
        info = np.iinfo(stored.dtype)
        data = random.integers(info.min, info.max, stored.shape, dtype=stored.dtype).tobytes()
        (tmp_path / stored.file).write_bytes(data)
        (tmp_path / vector.outputs[name].file).write_bytes(data)

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run(str(tmp_path))
    assert code == 0
    assert text.splitlines() == [
        "golden 0, second: 0.00% of the range off, ok",
        "golden 0, first: 0.00% of the range off, ok",
        "all outputs agree",
    ]
    output = tmp_path / vector.outputs["first"].file
    output.write_bytes(output.read_bytes()[::-1])
    code, text = run(str(tmp_path))
    assert (code, text.splitlines()[-1]) == (1, "1 outputs do not agree")
    output.write_bytes(b"short")
    code, text = run(str(tmp_path))
    assert code == 2
    assert "is missing or has another size" in text
    assert run(str(tmp_path), "0")[0] == 2


PREPARE = """
#include <cstdio>
#include "text/text.cpp"
#include "sound/sound.cpp"
#include "numbers/numbers.cpp"
using namespace edgeopt;
template <typename T> void print(const Array<T>& array) {
  for (auto size : array.shape) std::printf("%d ", static_cast<int>(size));
  for (auto value : array.values) std::printf("| %g ", static_cast<double>(value));
  std::puts("");
}
int main() {
  auto text_input = text::preprocess({7, 8}, {9, 3, true}, {0, 1});
  print(text_input.input_ids);
  print(text_input.attention_mask);
  print(text_input.token_type_ids);
  try {
    text::preprocess(std::vector<std::int64_t>(5), {0});
  } catch (const Error& error) {
    std::puts(error.what());
  }
  const float samples[] = {0.5f, 1.5f, 9.0f};
  print(sound::preprocess(samples, 1).sound);
  print(sound::preprocess(samples, 3).sound);
  numbers::Input raw;
  raw.x.values = {2, 4, 6, 8};
  raw.n = Array<std::int64_t>({1, 1}, {5});
  raw = numbers::preprocess(raw);
  print(raw.x);
  print(raw.n);
  text::Output output;
  output.scores = Array<float>({1, 3}, {1.0f, std::nanf(""), 3.0f});
  for (const auto& guess : text::top(output, 9)) {
    std::printf("%zu %s %g\\n", guess.index, std::string(guess.label).c_str(), static_cast<double>(guess.score));
  }
}
"""


@pytest.mark.e2e
@needs_compiler
def test_texts_sounds_and_arrays_are_prepared(tmp_path: Path) -> None:
    ids = tuple(replace(IDS, name=name) for name in ("input_ids", "attention_mask", "token_type_ids"))
    sound = SignatureTensor("sound", "sound", (1, 1, 2), "float32", "float32")
    x, n = odd_tensor("x", "float32", "float32", (1, 2, 2)), odd_tensor("n", "int64", "int64")
    text = TextPreprocessing("tokenizer", 4)
    array = ArrayPreprocessing(2.0, (1.0, 2.0), (0.5,), channel_axis=-2)
    for made in (
        manifest(ids, (replace(SCORES, shape=("n", 3)),), name="text", preprocessing=text, labels=("a", 'b"', "c")),
        manifest((sound,), (SCORES,), name="sound", preprocessing=AudioPreprocessing(8000, 2, 0.5, 2.0)),
        manifest((x, n), (SCORES,), name="numbers", preprocessing=array),
    ):
        write(tmp_path / made.name, made)
    (tmp_path / "main.cpp").write_text(PREPARE + ECHO)
    compile_("-I", tmp_path, "-I", tmp_path / "text", tmp_path / "main.cpp", "-o", tmp_path / "main")
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert [line.strip() for line in done.stdout.splitlines()] == [
        "1 4 | 9 | 9 | 7 | 8",
        "1 4 | 0 | 0 | 1 | 1",
        "1 4 | 3 | 3 | 0 | 1",
        "the text has 5 tokens, the model takes 4",
        "1 1 2 | 0 | -0.25",
        "1 1 2 | 0 | 0.5",
        "1 2 2 | 0 | 2 | 2 | 4",
        "1 1 | 5",
        "2 c 3",
        "0 a 1",
        '1 b" nan',
    ]
