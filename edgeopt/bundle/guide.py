"""The bundle's README: what the app developer has to know, and nothing that the manifest doesn't say."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from edgeopt.bundle.manifest import Manifest, ModelFile
from edgeopt.bundle.on_device import on_device
from edgeopt.bundle.sparse_storage import StorageSizes
from edgeopt.types import (
    ArrayPreprocessing,
    AudioPreprocessing,
    Format,
    ImagePreprocessing,
    Preprocessing,
    SignatureTensor,
    TextPreprocessing,
)

TEMPLATES = Path(__file__).parent / "templates"

RUNTIME_TITLE: dict[Format, str] = {
    "litert": "LiteRT",
    "onnx": "ONNX Runtime",
    "executorch": "ExecuTorch",
    "coreml": "Core ML",
}
#: The Python package whose version the model was proven with.
PYTHON_PACKAGE: dict[Format, str] = {
    "litert": "ai-edge-litert",
    "onnx": "onnxruntime",
    "executorch": "executorch",
    "coreml": "coremltools",
}
#: What `check.py` opens a file with, by suffix.
CHECK_PACKAGE = {
    ".tflite": PYTHON_PACKAGE["litert"],
    ".onnx": PYTHON_PACKAGE["onnx"],
    ".pte": PYTHON_PACKAGE["executorch"],
    ".mlpackage": PYTHON_PACKAGE["coreml"],
    ".tosa": "tosa-tools",
    ".zip": "edgeopt[ethos-u]",  # what runs on the NPU and on the CPU in turns
}
GRADLE: dict[Format, str] = {
    "litert": "com.google.ai.edge.litert:litert",
    "onnx": "com.microsoft.onnxruntime:onnxruntime-android",
    "executorch": "org.pytorch:executorch-android",
}
#: Folder with code for an app -> what it is, and how to use it.
APPS: dict[str, tuple[str, str]] = {
    "android": (
        "an Android library module in Kotlin",
        (
            "**Android:** `android/build.gradle.kts` begins with the lines that make `android/` a module of the app's "
            "project. Its test replays `golden/` on a device."
        ),
    ),
    "ios": (
        "a Swift package",
        (
            "**iOS:** `ios/Package.swift` begins with how to add `ios/` and the model in Xcode. `swift test` replays "
            "`golden/`."
        ),
    ),
    "cpp": (
        "a C++ library with CMake",
        (
            "**C++:** `cpp/CMakeLists.txt` begins with how to build `cpp/`, alone or in a project, and what it needs. "
            "`golden_test` replays `golden/`."
        ),
    ),
    "python": (
        "a Python module",
        (
            "**Python:** put `python/` on Python's path and import the class. `python python/golden_test.py` replays "
            "`golden/`."
        ),
    ),
}


def render_guide(manifest: Manifest, *, has_chart: bool, sizes: StorageSizes | None, folders: Collection[str]) -> str:
    """README.md as Markdown. `has_chart`: there is a steps.svg. `sizes`: of the packed model; None without one.
    `folders`: those of the bundle, such as "android"."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only here, and only when a bundle is written

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    check_package = CHECK_PACKAGE[Path(manifest.model.emulation or manifest.model.file).suffix]
    quantized = [t for t in _tensors(manifest.model) if t.quantization is not None]
    return environment.get_template("README.md.j2").render(
        m=manifest,
        has_chart=has_chart,
        folders=folders,
        sizes=sizes,
        runtime=RUNTIME_TITLE[manifest.format],
        apps=[(folder, what) for folder, (what, _) in APPS.items() if folder in folders],
        uses=[use for folder, (_, use) in APPS.items() if folder in folders],
        check_needs=_requirement(check_package, manifest.tools.get(check_package)),
        proven_with=_proven_with(manifest),
        inputs=[_row(tensor) for tensor in manifest.model.signature.inputs],
        outputs=[_row(tensor) for tensor in manifest.model.signature.outputs],
        example=quantized[0] if quantized else None,
        steps=_steps(manifest.preprocessing),
        on_device=on_device(manifest.format, manifest.target_definition.accelerator),
    )


def _requirement(package: str, version: str | None) -> str:
    """For a command line of pip; a shell may take brackets for a pattern."""
    text = f"{package}=={version}" if version is not None else package
    return f"'{text}'" if "[" in text else text


def _proven_with(manifest: Manifest) -> str | None:
    """The runtime as the platform's package manager calls it; None where another one runs the file on the device."""
    version = manifest.tools.get(PYTHON_PACKAGE[manifest.format])
    if version is None or manifest.format == "coreml" or manifest.target_definition.accelerator is not None:
        return None
    names = [f"Python: `{PYTHON_PACKAGE[manifest.format]}=={version}`"]
    if manifest.target_definition.platform == "android":
        names.insert(0, f"Gradle: `{GRADLE[manifest.format]}:{version}`")
    return f"{RUNTIME_TITLE[manifest.format]} {version} ({'; '.join(names)})"


def _tensors(model: ModelFile) -> tuple[SignatureTensor, ...]:
    return (*model.signature.inputs, *model.signature.outputs)


def _row(tensor: SignatureTensor) -> dict[str, str]:
    quantization = "-"
    if tensor.quantization is not None:
        scale, zero_point = tensor.quantization.scale[0], tensor.quantization.zero_point[0]
        quantization = f"scale {scale!r}, zero point {zero_point}"
    notes = []
    if tensor.permutation is not None:
        notes.append(f"transposed from the trained model by {tensor.permutation}")
    if any(isinstance(size, str) for size in tensor.shape):
        notes.append("named sizes are free")
    return {
        "name": tensor.native_name,
        "shape": " x ".join(str(size) for size in tensor.shape) or "scalar",
        "dtype": tensor.dtype,
        "quantization": quantization,
        "notes": "; ".join(notes) or "-",
    }


def _steps(preprocessing: Preprocessing | None) -> list[str]:
    """Preprocessing in words, in the order of the arithmetic."""
    match preprocessing:
        case None:
            return []
        case ImagePreprocessing():
            return _image_steps(preprocessing)
        case TextPreprocessing(tokenizer=tokenizer, max_length=length, padding=padding, text_keys=keys):
            pair = f" the pair ({', '.join(keys)})" if len(keys) > 1 else " the text"
            fill = f" and pad it to {length}" if padding == "max_length" else ""
            return [
                f"Tokenize{pair} with `{tokenizer}/tokenizer.json` (Hugging Face tokenizers).",
                f"Cut the sequence at {length} tokens{fill}; the attention mask is 1 on tokens and 0 on padding.",
            ]
        case AudioPreprocessing():
            steps = [
                f"Mix to mono, as float32 in -1..1, and resample to {preprocessing.sample_rate} Hz.",
                f"Cut to {preprocessing.num_samples} samples, or pad with zeros at the end.",
            ]
            if (preprocessing.mean, preprocessing.std) != (0.0, 1.0):
                steps.append(f"Subtract {preprocessing.mean!r}, then divide by {preprocessing.std!r}.")
            return steps
        case ArrayPreprocessing():
            arithmetic = _arithmetic(preprocessing.rescale, preprocessing.mean, preprocessing.std)
            return [f"{arithmetic} Several values go along axis {preprocessing.channel_axis}."]


def _image_steps(p: ImagePreprocessing) -> list[str]:
    steps = [f"Decode to {'RGB' if p.channels == 3 else 'grey'}, values 0..255."]
    if p.crop_fraction is not None:
        steps.append(f"Cut out the central square of side {p.crop_fraction!r} x min(height, width).")
    if p.resize_shorter is not None:
        steps.append(f"Scale the shorter side to {p.resize_shorter} ({p.interpolation}).")
        steps.append(f"Cut out the central {p.height} x {p.width} (height x width).")
    else:
        steps.append(f"Resize to {p.height} x {p.width} (height x width, {p.interpolation}).")
    steps.append(_arithmetic(p.rescale, p.mean, p.std))
    return steps


def _arithmetic(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    values = [", ".join(repr(v) for v in group) for group in (mean, std)]
    return f"Compute `(value / {rescale!r} - mean) / std` with mean = [{values[0]}] and std = [{values[1]}]."
