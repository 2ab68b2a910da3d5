"""The headers of generated C++ encode, decode and prepare pictures as edgeopt does, to the bit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import __version__ as pillow

from edgeopt.bundle.apps.base import TEMPLATES
from edgeopt.datasets.image import ImageTransform
from edgeopt.native import RUNNER
from edgeopt.runtimes.base import decode, encode
from edgeopt.types import DType, ImagePreprocessing, QuantParams, SignatureTensor, TensorSpec

pytestmark = pytest.mark.e2e

COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
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
    includes = ("-I", TEMPLATES / "cpp", "-I", RUNNER)
    command = (COMPILER, *FLAGS, "-O1", *includes, folder / "harness.cpp", "-o", folder / "harness")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
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
            special = [0.0, -0.0, np.inf, -np.inf, 65519.0, 65520.0, 1e-8, 6e-8, 5.9e-5, 6.2e-5, -7e4]
            special += [step * 0.037 for step in (0.5, 1.5, 2.5, -0.5, -1.5)]  # halves go to even
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
        numbers = [width, height, channels, wide, high, p.channels, fraction or 0, shorter or 0, FILTERS.index(filter_)]
        numbers += [int(int(pillow.partition(".")[0]) >= 13), int(p.layout == "NHWC"), p.rescale]
        jobs.append(f"picture {' '.join(map(str, numbers))}\n".encode() + pixels.tobytes())
    got = np.frombuffer(harness(jobs), np.float32)
    for p, size, wanted in expected:
        assert np.array_equal(got[: wanted.size].reshape(wanted.shape), wanted), (p, size)
        got = got[wanted.size :]
    assert not got.size


def test_what_is_no_number_and_what_is_outside(harness: Harness) -> None:
    """NaN is stored as 0, whatever the type and the zero point; a crop beyond the picture is black."""
    values = np.asarray([np.nan, -np.nan, 1.0], np.float32)
    words = f"{DTYPES.index('float32')} 1 0.5 7 1 3 0"
    got = harness([f"array {DTYPES.index(d)} {words}\n".encode() + values.tobytes() for d in ("int8", "uint8")])
    assert np.frombuffer(got[:3], np.int8).tolist() == np.frombuffer(got[15:18], np.uint8).tolist() == [0, 0, 9]
    pixels = np.full((2, 2, 3), 255, np.uint8)
    shape = "2 2 3 6 4 3 0 2 0 1 1 255"  # shorter side 2, cut to 6 x 4
    cut = np.frombuffer(harness([f"picture {shape}\n".encode() + pixels.tobytes()]), np.float32).reshape(4, 6, 3)
    black = np.float32(-0.485) / np.float32(0.229)
    assert np.argwhere(cut[..., 0] != black).tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
