"""The Kotlin and the Swift code prepare pictures, quantize and dequantize as edgeopt does, to the bit.

Needs kotlinc and java, or swiftc; skipped where the compiler is not installed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL import __version__ as pillow

from edgeopt.bundle.apps import android, ios
from edgeopt.bundle.manifest import Manifest, ModelFile
from edgeopt.datasets.image import ImageTransform
from edgeopt.runtimes.base import decode, encode
from edgeopt.targets import Target, load_target
from edgeopt.types import DType, ImagePreprocessing, QuantParams, Signature, SignatureTensor, TensorSpec

pytestmark = pytest.mark.e2e

STUBS = Path(__file__).parent / "android_stubs"
#: The runtimes whose classes for the language have the type of every input below.
KOTLIN, SWIFT = load_target("android-onnx-int8"), load_target("android-int8")


def make(target: Target, name: str, preprocessing: ImagePreprocessing, given: SignatureTensor) -> Manifest:
    return Manifest(
        schema_version=1,
        kind="edgeopt-bundle",
        name=name,
        target=target.name,
        device=target.device,
        status="passed",
        format=target.format,
        precision="w8a8",
        model=ModelFile("model", "w8a8", Signature((given,), (tensor("logits", (1, 10)),))),
        float_twin=None,
        preprocessing=preprocessing,
        labels=(),
        golden=(),
        golden_tolerance=0.05,
        history=(),
        source_sha256="0" * 64,
        tools={"pillow": pillow},
        target_definition=target,
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


def write(files: Mapping[str, str], directory: Path) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def call(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


IMAGES: dict[str, tuple[ImagePreprocessing, SignatureTensor]] = {
    "cropped": (
        ImagePreprocessing(
            24, 20, crop_fraction=0.875, interpolation="bicubic", rescale=1.0, mean=(127.0,), std=(128.0,)
        ),
        tensor("x", (1, 24, 20, 3), "int8", "float32", (0, 2, 3, 1), 0.0078, -3),
    ),
    "shorter": (
        ImagePreprocessing(
            16, 14, resize_shorter=20, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layout="NHWC"
        ),
        tensor("x", (1, 16, 14, 3), "uint8", "float32", None, 0.0186, 114),
    ),
    "wide": (
        ImagePreprocessing(9, 31, interpolation="lanczos", std=(0.3,)),
        tensor("x", (1, 3, 9, 31), "float16", "float32"),
    ),
    "grey": (
        ImagePreprocessing(10, 10, channels=1, interpolation="nearest", layout="NHWC"),
        tensor("x", (1, 1, 10, 10), "int16", "float32", (0, 3, 1, 2), 3e-5, 0),
    ),
    "raw": (ImagePreprocessing(12, 12, rescale=1.0), tensor("x", (1, 3, 12, 12), "uint8")),
    "padded": (
        ImagePreprocessing(12, 13, resize_shorter=8, interpolation="bicubic"),
        tensor("x", (1, 3, 12, 13)),
    ),
}
#: Tall ones among them: Pillow 13 takes its vertical pass first there.
PICTURES = ((37, 53), (200, 151), (30, 200), (5, 9), (1, 1), (12, 13))


def reference(preprocessing: ImagePreprocessing, spec: SignatureTensor, pixels: np.ndarray, turn: int) -> np.ndarray:
    """What edgeopt feeds the file: its own preprocessing, then its own encoding."""
    picture = Image.fromarray(pixels)
    picture.getexif()[0x0112] = turn
    upright = np.asarray(ImageOps.exif_transpose(picture))
    if preprocessing.channels == 1:
        upright = np.asarray(Image.fromarray(upright).convert("L"))
    given = TensorSpec("x", (1, 1, 1, 1), spec.model_dtype, preprocessing.layout)
    transform = ImageTransform(preprocessing, (given,))
    made = transform(Image.fromarray(upright) if spec.model_dtype == "uint8" else upright, "test")
    assert made is not None
    return encode(made["x"], spec)


def cases(directory: Path) -> list[tuple[str, Path, np.ndarray]]:
    """Writes pictures as (width, height, orientation, RGB) and returns (class, file, what must come of it)."""
    rng = np.random.default_rng(0)
    made = []
    for name, (preprocessing, spec) in IMAGES.items():
        for number, (width, height) in enumerate(PICTURES):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            turn = (number + len(made)) % 8 + 1
            file = directory / f"{name}-{number}"
            file.write_bytes(np.asarray([width, height, turn], "<i4").tobytes() + pixels.tobytes())
            made.append((name, file, reference(preprocessing, spec, pixels, turn)))
    return made


def check_cases(expected: list[tuple[str, Path, np.ndarray]]) -> None:
    for name, file, wanted in expected:
        stored = np.frombuffer(file.with_suffix(".file").read_bytes(), wanted.dtype).reshape(wanted.shape)
        np.testing.assert_array_equal(stored, wanted, err_msg=file.name)
        spec = IMAGES[name][1]
        back = decode(wanted, spec)
        dtype = np.uint8 if spec.model_dtype == "uint8" else np.float32
        model = np.frombuffer(file.with_suffix(".model").read_bytes(), dtype).reshape(back.shape)
        np.testing.assert_array_equal(model, back, err_msg=file.name)


@pytest.mark.skipif(
    shutil.which("kotlinc") is None or shutil.which("java") is None, reason="kotlinc and java are not installed"
)
def test_kotlin_prepares_pictures_to_the_bit(tmp_path: Path) -> None:
    expected = cases(tmp_path)
    branches = ""
    for name, (preprocessing, spec) in IMAGES.items():
        write(android.files(make(KOTLIN, name, preprocessing, spec)), tmp_path / name)
        pkg, model = f"edgeopt.{name}", f"edgeopt.{name}.{name.capitalize()}"
        decoder = "bytes" if spec.model_dtype == "uint8" else "floats"
        branches += f"""
        if (file.name.startsWith("{name}-")) {{
            val pixels = {pkg}.Pixels.fromArgb(width, height, colors, {preprocessing.channels}).upright(turn)
            val stored = {model}.INPUTS[0].encode({model}.normalise({model}.fit(pixels)))
            val raw = ByteArray(stored.bytes.limit()).also {{ stored.bytes.duplicate().get(it) }}
            java.io.File(file.path + ".file").writeBytes(raw)
            val back = {model}.INPUTS[0].{decoder}(stored).values
            java.io.File(file.path + ".model").writeBytes(raw(back))
        }}"""
    (tmp_path / "Check.kt").write_text(
        f"""
import java.nio.ByteBuffer
import java.nio.ByteOrder

fun raw(values: FloatArray): ByteArray {{
    val buffer = ByteBuffer.allocate(4 * values.size).order(ByteOrder.LITTLE_ENDIAN)
    values.forEach {{ buffer.putFloat(it) }}
    return buffer.array()
}}

fun raw(values: ByteArray): ByteArray = values

fun main(files: Array<String>) {{
    for (path in files) {{
        val file = java.io.File(path)
        val given = ByteBuffer.wrap(file.readBytes()).order(ByteOrder.LITTLE_ENDIAN)
        val width = given.int
        val height = given.int
        val turn = given.int
        val colors = IntArray(width * height) {{
            (0 until 3).fold(0) {{ color, _ -> (color shl 8) or (given.get().toInt() and 0xff) }}
        }}
{branches}
    }}
}}
""",
        encoding="utf-8",
    )
    jar = tmp_path / "check.jar"
    sources = [*tmp_path.glob("*/src/main"), tmp_path / "Check.kt", STUBS]
    call("kotlinc", "-include-runtime", "-d", jar, *sources)
    call("java", "-cp", jar, "CheckKt", *[file for _, file, _ in expected])
    check_cases(expected)


@pytest.mark.skipif(shutil.which("swiftc") is None, reason="swiftc is not installed")
def test_swift_prepares_pictures_to_the_bit(tmp_path: Path) -> None:
    expected = cases(tmp_path)
    shared: dict[str, str] = {}
    branches = ""
    for name, (preprocessing, spec) in IMAGES.items():
        files = ios.files(make(SWIFT, name, preprocessing, spec))
        shared |= {Path(path).name: text for path, text in files.items() if path.startswith("Sources/")}
        model = name.capitalize()
        wide = "Tensor<UInt8>" if spec.model_dtype == "uint8" else "Tensor<Float>"
        decoder = "integers" if spec.model_dtype == "uint8" else "floats"
        branches += f"""
    if file.lastPathComponent.hasPrefix("{name}-") {{
        let pixels = Pixels(width: width, height: height, rgb: rgb, stride: 3, channels: {preprocessing.channels})
        let stored = try {model}.inputs[0].encode({model}.normalise({model}.fit(pixels.upright(turn))))
        try Data(stored.bytes).write(to: file.appendingPathExtension("file"))
        let back: {wide} = {model}.inputs[0].{decoder}(stored)
        try back.values.withUnsafeBytes {{ try Data($0).write(to: file.appendingPathExtension("model")) }}
    }}"""
    shared["Runner.swift"] = """import Foundation
final class Runner {
    init(modelURL: URL, threads: Int, inputs: [TensorSpec], outputs: [TensorSpec]) throws {}
    func run(_ tensors: [FileTensor]) throws -> [FileTensor] { tensors }
}
"""
    shared["main.swift"] = f"""import Foundation
for path in CommandLine.arguments.dropFirst() {{
    let file = URL(fileURLWithPath: path)
    let given = [UInt8](try Data(contentsOf: file))
    func number(_ at: Int) -> Int {{ (0..<4).reduce(0) {{ $0 | Int(given[at + $1]) << (8 * $1) }} }}
    let (width, height, turn) = (number(0), number(4), number(8))
    let rgb = Array(given[12...])
{branches}
}}
"""
    write(shared, tmp_path / "code")
    call("swiftc", "-O", "-o", tmp_path / "check", *sorted((tmp_path / "code").glob("*.swift")))
    call(tmp_path / "check", *[file for _, file, _ in expected])
    check_cases(expected)
