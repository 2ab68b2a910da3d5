"""Generated C++ compiles for any manifest, and its arithmetic is edgeopt's own to the bit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle.apps import cpp
from edgeopt.bundle.apps.base import TEMPLATES
from edgeopt.bundle.manifest import Manifest, ModelFile, StoredArray, StoredVector
from edgeopt.datasets.image import ImageTransform
from edgeopt.native import RUNNER
from edgeopt.runtimes.base import decode, encode
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
    TensorSpec,
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
        tools={},
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
    "time": manifest((), (SCORES,), name="time"),
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


@needs_compiler
def test_models_compile(tmp_path: Path) -> None:
    """All in one unit, which also proves that one program can have several models of one runtime."""
    stems = []
    for k, (case, made) in enumerate(CASES.items()):
        stems.append((k, write(tmp_path / str(k), replace(made, name=f"{made.name} {case}"))))
    everything = tmp_path / "everything.cpp"
    everything.write_text("".join(f'#include "{k}/{stem}.cpp"\n' for k, stem in stems))
    compile_("-fsyntax-only", everything)


@needs_compiler
@pytest.mark.parametrize("case", ["odd names", "text"])
def test_golden_tests_compile(tmp_path: Path, case: str) -> None:
    write(tmp_path, CASES[case])
    compile_("-fsyntax-only", tmp_path / "golden_test.cpp")


@needs_compiler
@pytest.mark.parametrize("name", ["time", "model"])
def test_names_that_are_taken_elsewhere(tmp_path: Path, name: str) -> None:
    """`time` is a function of C, and edgeopt_model.hpp is guarded by EDGEOPT_MODEL_HPP_."""
    stem = write(tmp_path, replace(CASES["time"], name=name))
    compile_("-fsyntax-only", "-include", "ctime", tmp_path / f"{stem}.cpp")


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


@needs_compiler
def test_golden_test_runs(tmp_path: Path) -> None:
    """Found by name in whatever order the file has them, through permutation and quantization and back."""
    first = replace(PICTURE, name="first", native_name="first")
    second = SignatureTensor("second", "second", (2, "n"), "int16", "float32", (1, 0), QuantParams((0.25,), (-7,)))
    made = manifest((first, second), (second, first), preprocessing=IMAGE)
    stem = write(tmp_path / "cpp", made)
    (tmp_path / "echo.cpp").write_text(ECHO)
    program = tmp_path / "golden_test"
    sources = (tmp_path / "cpp" / f"{stem}.cpp", tmp_path / "cpp" / "golden_test.cpp", tmp_path / "echo.cpp")
    compile_("-I", tmp_path / "cpp", *sources, "-o", program)

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
#include "text/text.hpp"
#include "sound/sound.hpp"
#include "numbers/numbers.hpp"
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
    (tmp_path / "main.cpp").write_text(PREPARE)
    (tmp_path / "echo.cpp").write_text(ECHO)
    models = [tmp_path / name / f"{name}.cpp" for name in ("text", "sound", "numbers")]
    sources = (tmp_path / "main.cpp", tmp_path / "echo.cpp", *models)
    compile_("-I", tmp_path, "-I", tmp_path / "text", *sources, "-o", tmp_path / "main")
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


HARNESS = """
// Encodes and decodes arrays, and prepares pictures, as the lines on stdin say.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include "edgeopt_image.hpp"
#include "edgeopt_values.hpp"
using namespace edgeopt;

template <typename T> void read(std::vector<T>& to) {
  std::cin.read(reinterpret_cast<char*>(to.data()), static_cast<std::streamsize>(to.size() * sizeof(T)));
}
template <typename T> void write(const T* from, std::size_t count) {
  std::cout.write(reinterpret_cast<const char*>(from), static_cast<std::streamsize>(count * sizeof(T)));
}

template <typename T> void convert(const Mapping& mapping, const Shape& shape) {
  Array<T> array(shape);
  read(array.values);
  const Tensor tensor = encode(array, mapping);
  write(tensor.data.data(), tensor.data.size());
  const Array<T> back = decode<T>(tensor, mapping);
  write(back.values.data(), back.values.size());
}

void array(std::istream& words) {
  int file, model, rank, quantized;
  Mapping m{"x", DType::kFloat32, DType::kFloat32, {}, {}, false, 1.0f, 0};
  Shape shape;
  words >> file >> model >> quantized >> m.scale >> m.zero_point >> rank;
  m.file_dtype = static_cast<DType>(file);
  m.model_dtype = static_cast<DType>(model);
  m.quantized = quantized != 0;
  for (int k = 0, size; k < rank; ++k) { words >> size; shape.push_back(size); }
  for (int k = 0, axis; k < rank; ++k) {
    words >> axis;
    m.permutation.push_back(axis);
    m.file_shape.push_back(k ? shape[static_cast<std::size_t>(axis)] : kFree);
  }
  switch (m.model_dtype) {
    case DType::kFloat32:
    case DType::kFloat16: return convert<float>(m, shape);
    case DType::kInt8: return convert<std::int8_t>(m, shape);
    case DType::kInt16: return convert<std::int16_t>(m, shape);
    case DType::kInt32: return convert<std::int32_t>(m, shape);
    case DType::kInt64: return convert<std::int64_t>(m, shape);
    default: return convert<std::uint8_t>(m, shape);
  }
}

void picture(std::istream& words) {
  int width, height, channels, filter, columns_first, last;
  ImageSteps s{0, 0, 0, 0, 0, Filter::kNearest, false, false, 1.0f, {0.485f}, {0.229f}};
  words >> width >> height >> channels >> s.width >> s.height >> s.channels >> s.crop_fraction >> s.resize_shorter >>
      filter >> columns_first >> last >> s.rescale;
  s.filter = static_cast<Filter>(filter);
  s.columns_first = columns_first != 0;
  s.channels_last = last != 0;
  if (s.channels == 3) s.std = {0.229f, 0.224f, 0.225f};
  // Rows with a gap between them, as bitmaps have them.
  const auto used = static_cast<std::size_t>(width * channels), rows = static_cast<std::size_t>(height);
  std::vector<std::uint8_t> packed(used * rows), padded((used + 5) * rows);
  read(packed);
  for (std::size_t y = 0; y < rows; ++y) std::memcpy(&padded[y * (used + 5)], &packed[y * used], used);
  const auto numbers = numbers_of(Picture{padded.data(), width, height, channels, used + 5}, s);
  write(numbers.data(), numbers.size());
}

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    kind == "array" ? array(words) : picture(words);
  }
}
"""
DTYPES: tuple[DType, ...] = ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Harness:
    program: Path

    def __call__(self, jobs: list[bytes]) -> bytes:
        return subprocess.run([self.program], input=b"".join(jobs), stdout=subprocess.PIPE, check=True).stdout


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    if COMPILER is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("harness")
    (folder / "harness.cpp").write_text(HARNESS)
    compile_("-O1", "-I", TEMPLATES / "cpp", "-I", RUNNER, folder / "harness.cpp", "-o", folder / "harness")
    return Harness(folder / "harness")


def test_arrays_are_encoded_and_decoded_as_by_edgeopt(harness: Harness) -> None:
    random = np.random.default_rng(0)
    quantized = QuantParams((0.037,), (5,))
    cases: list[tuple[DType, DType, QuantParams | None]] = [(dtype, dtype, None) for dtype in DTYPES]
    cases += [("float16", "float32", None), ("float32", "float16", None), ("int32", "int64", None)]
    cases += [(dtype, "float32", quantized) for dtype in ("int8", "uint8", "int16")]
    cases += [("int8", "float16", quantized)]
    jobs, expected = [], []
    for file_dtype, model_dtype, params in cases:
        shape, permutation = ((2, 3, 4, 5), (0, 2, 3, 1)) if model_dtype != "int8" else ((4, 3, 2), (2, 0, 1))
        sizes = tuple(shape[axis] for axis in permutation)
        tensor = SignatureTensor("x", "x", sizes, file_dtype, model_dtype, permutation, params)
        if model_dtype in ("float32", "float16"):
            array = random.normal(scale=3, size=shape).astype(np.float32)
            special = [0.0, -0.0, np.inf, -np.inf, 65519.0, 65520.0, 1e-8, 6e-8, 5.9e-5, 6.2e-5, 0.0185, 0.0555, -7e4]
            array.flat[: len(special)] = special
            with np.errstate(over="ignore"):
                given = array.astype(model_dtype)
        else:
            info = np.iinfo("uint8" if model_dtype == "bool" else file_dtype)
            array = random.integers(info.min, info.max, shape, endpoint=True)
            array = given = (array > 127 if model_dtype == "bool" else array).astype(model_dtype)
        with np.errstate(over="ignore"):
            stored = encode(given, tensor)
            back = decode(stored, tensor)
        expected.append((stored.tobytes(), back.astype(np.float32 if back.dtype.kind == "f" else back.dtype).tobytes()))
        scale, zero = (params.scale[0], params.zero_point[0]) if params else (1.0, 0)
        numbers = [
            DTYPES.index(file_dtype),
            DTYPES.index(model_dtype),
            int(params is not None),
            scale,
            zero,
            len(shape),
        ]
        words = " ".join(map(str, [*numbers, *shape, *permutation]))
        jobs.append(f"array {words}\n".encode() + array.tobytes())
    got = harness(jobs)
    for case, parts in zip(cases, expected, strict=True):
        for kind, part in zip(("encoded", "decoded"), parts, strict=True):
            assert got[: len(part)] == part, (case, kind)
            got = got[len(part) :]
    assert not got


def test_pictures_are_prepared_as_by_edgeopt(harness: Harness) -> None:
    """To the bit: every filter, up and down, crops, grey from RGB(A) and back, both layouts."""
    random = np.random.default_rng(1)
    jobs, expected = [], []
    for k in range(160):
        width, height = (int(n) for n in random.integers(1, (40, 200, 500)[k % 3], 2))
        channels = int(random.choice((1, 3, 4)))
        filter_ = FILTERS[k % 4]
        wide, high = (int(n) for n in random.integers(1, 120, 2))
        fraction = (None, 0.875, 1.0, float(random.uniform(0.05, 1)))[int(random.integers(4))]
        elongated = max(width, height) > 10 * min(width, height)
        shorter = None if elongated or k % 5 < 3 else max(wide, high) + int(random.integers(2)) * 17
        p = ImagePreprocessing(
            height=high,
            width=wide,
            channels=1 if k % 3 == 0 else 3,
            crop_fraction=fraction,
            resize_shorter=shorter,
            interpolation=filter_,
            rescale=(1.0, 255.0, 127.5)[k % 3],
            mean=(0.485,),
            std=(0.229,) if k % 3 == 0 else (0.229, 0.224, 0.225),
            layout="NHWC" if k % 2 else "NCHW",
        )
        shape = (1, high, wide, p.channels) if p.layout == "NHWC" else (1, p.channels, high, wide)
        noise = random.integers(0, 256, (height, width, channels)).astype(np.uint8)
        pixels = noise if k % 7 else (noise // 128 * 255).astype(np.uint8)  # black and white overshoot most
        made = ImageTransform(p, (TensorSpec("x", shape, "float32"),))(pixels if channels > 1 else pixels[:, :, 0], "x")
        assert made is not None
        expected.append((p, (width, height, channels), made["x"]))
        steps = cpp._image(p)
        numbers = [width, height, channels, wide, high, p.channels, fraction or 0, shorter or 0, FILTERS.index(filter_)]
        numbers += [int(steps["columns_first"] == "true"), int(p.layout == "NHWC"), p.rescale]
        jobs.append(f"picture {' '.join(map(str, numbers))}\n".encode() + pixels.tobytes())
    got = np.frombuffer(harness(jobs), np.float32)
    for p, size, wanted in expected:
        assert np.array_equal(got[: wanted.size].reshape(wanted.shape), wanted), (p, size)
        got = got[wanted.size :]
    assert not got.size
