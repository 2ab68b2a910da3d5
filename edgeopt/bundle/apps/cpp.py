"""The C++ app: a CMake library with the model behind typed structs, and a program that runs the golden vectors with it.

The runtime's side is edgeopt's own runner, so the code that was proven in the emulated phone is what the app compiles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.bundle.apps.base import (
    TEMPLATES,
    AppTensor,
    TextField,
    array_preprocessing,
    audio_preprocessing,
    float32_text,
    identifier,
    image_preprocessing,
    padded_length,
    render,
    resizes_columns_first,
    scores_output,
    tensors,
    text_fields,
    text_preprocessing,
)
from edgeopt.bundle.apps.cpp_names import FIELD_NAMES, MODEL_NAMES
from edgeopt.bundle.guide import PYTHON_PACKAGE, RUNTIME_TITLE
from edgeopt.bundle.manifest import Manifest, StoredArray
from edgeopt.native import IMPLEMENTATIONS, RUNNER
from edgeopt.types import ArrayPreprocessing, AudioPreprocessing, DType, ImagePreprocessing

#: How C++ holds a number of the trained model's type; `edgeopt_values.hpp` tells why not bool and half.
CPP_TYPE: dict[DType, str] = {
    "float32": "float",
    "float16": "float",
    "int8": "std::int8_t",
    "uint8": "std::uint8_t",
    "int16": "std::int16_t",
    "int32": "std::int32_t",
    "int64": "std::int64_t",
    "bool": "std::uint8_t",
}
DTYPE_CONSTANT: dict[DType, str] = {
    "float32": "DType::kFloat32",
    "float16": "DType::kFloat16",
    "int8": "DType::kInt8",
    "uint8": "DType::kUInt8",
    "int16": "DType::kInt16",
    "int32": "DType::kInt32",
    "int64": "DType::kInt64",
    "bool": "DType::kBool",
}
#: The CMake variable that says where the runtime is.
RUNTIME_OPTION = {"litert": "LITERT_DIR", "onnx": "ONNXRUNTIME_DIR", "executorch": "EXECUTORCH_DIR"}


_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CppTensor:
    """What the templates say about one tensor.

    Attributes:
        identifier, type: of the field. literal: the tensor's name as a string literal.
        initial: initializer of a field whose shape is known.
        note: type and shape, for a comment.
        mapping: initializer of an `edgeopt::Mapping`.
        is_float: whether normalisation applies to it.
        axis: of `ArrayPreprocessing.channel_axis`, counted from the front.
    """

    identifier: str
    type: str
    literal: str
    initial: str
    note: str
    mapping: str
    is_float: bool
    axis: int


@dataclass(frozen=True, slots=True)
class CppField:
    """One input that a tokenizer fills: with which numbers, and with which behind or before them."""

    identifier: str
    type: str
    tokens: str
    filler: str


def files(manifest: Manifest) -> Mapping[str, str]:
    """File name in <bundle>/cpp/ -> text."""
    model = identifier(manifest.name, "snake", MODEL_NAMES, "model")
    values = _values(manifest, model)
    made = {
        "CMakeLists.txt": render("cpp", "CMakeLists.txt.j2", **values),
        f"{model}.hpp": render("cpp", "model.hpp.j2", **values),
        f"{model}.cpp": render("cpp", "model.cpp.j2", **values),
        "golden_test.cpp": render("cpp", "golden_test.cpp.j2", **values),
        "edgeopt_values.hpp": _text(TEMPLATES / "cpp" / "edgeopt_values.hpp"),
    }
    if image_preprocessing(manifest) is not None:
        made["edgeopt_image.hpp"] = _text(TEMPLATES / "cpp" / "edgeopt_image.hpp")
    for name in _with_headers(IMPLEMENTATIONS[manifest.format].source):
        made[name] = _text(RUNNER / name)
    return made


def string_literal(text: str) -> str:
    """Any text as an ASCII string literal; bytes of UTF-8 and control characters as octal escapes, which, unlike
    hexadecimal ones, end after three digits."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\?' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogatepass")
    )
    return f'"{plain}"'


def _with_headers(source: str) -> tuple[str, ...]:
    """The runner's source and every header of the runner that it needs, sorted."""
    found: set[str] = set()
    missing = {source}
    while missing:
        found |= missing
        included = {name for file in missing for name in _INCLUDE.findall(_text(RUNNER / file))}
        missing = included - found
    return tuple(sorted(found))


def _values(manifest: Manifest, model: str) -> dict[str, object]:
    """Everything that the templates speak of."""
    signature = manifest.model.signature
    inputs = tensors(signature.inputs, "snake", FIELD_NAMES, "input")
    outputs = tensors(signature.outputs, "snake", FIELD_NAMES, "output")
    image, audio = image_preprocessing(manifest), audio_preprocessing(manifest)
    text, array = text_preprocessing(manifest), array_preprocessing(manifest)
    fields = text_fields(manifest, inputs) if text else ()
    limit, pad = padded_length(text, fields) if text else (0, 0)
    scores = scores_output(manifest, outputs)
    package = PYTHON_PACKAGE[manifest.format]
    name = string_literal(manifest.name)[1:-1]
    return {
        "model": model,
        "guard": f"EDGEOPT_APP_{model.upper().rstrip('_')}_HPP_",
        "title": f"The model {name} ({RUNTIME_TITLE[manifest.format]}, {manifest.precision})",
        "file": manifest.model.file,
        "file_literal": string_literal(manifest.model.file),
        "format": manifest.format,
        "by_name": manifest.format != "executorch",
        "version": manifest.tools.get(package),
        "option": RUNTIME_OPTION[manifest.format],
        "runner": IMPLEMENTATIONS[manifest.format],
        "inputs": [_tensor(tensor, array, is_input=True) for tensor in inputs],
        "outputs": [_tensor(tensor, array, is_input=False) for tensor in outputs],
        "image": _image(image, columns_first=resizes_columns_first(manifest)) if image else None,
        "audio": _audio(audio, len(inputs[0].file_shape)) if audio else None,
        "text": [_field(field) for field in fields],
        "pair": text is not None and len(text.text_keys) > 1,
        "text_limit": limit,
        "text_pad": pad,
        "array": _array(array) if array and any(tensor.is_float for tensor in inputs) else None,
        "scores": scores.identifier if scores else None,
        "labels": [f"{string_literal(label)}sv" for label in manifest.labels],
        "tolerance": repr(manifest.golden_tolerance),
        "golden": [
            {
                "inputs": [_stored(vector.inputs[tensor.name]) for tensor in inputs],
                "outputs": [_stored(vector.outputs[tensor.name]) for tensor in outputs],
            }
            for vector in manifest.golden
        ],
    }


def _tensor(tensor: AppTensor, array: ArrayPreprocessing | None, *, is_input: bool) -> CppTensor:
    shape = ", ".join(str(size) if isinstance(size, int) else string_literal(size) for size in tensor.model_shape)
    permutation = ", ".join(map(str, tensor.permutation or ()))
    mapping = [
        string_literal(tensor.native_name),
        DTYPE_CONSTANT[tensor.file_dtype],
        DTYPE_CONSTANT[tensor.model_dtype],
        _braces([str(size) if isinstance(size, int) else "kFree" for size in tensor.file_shape]),
        f"{{{permutation}}}",
        str(tensor.scale is not None).lower(),
        _float(1.0 if tensor.scale is None else tensor.scale),
        str(tensor.zero_point or 0),
    ]
    numbers = "" if tensor.is_dynamic else _braces(list(map(str, tensor.model_shape)))
    notes = [f"{tensor.model_dtype} ({shape})"]
    if tensor.model_dtype == "bool":
        notes.append("0 or 1")
    return CppTensor(
        identifier=tensor.identifier,
        type=CPP_TYPE[tensor.model_dtype],
        literal=string_literal(tensor.name),
        initial=f"{{Shape{numbers}}}" if numbers and is_input else "",
        note=f"{string_literal(tensor.name)}: {', '.join(notes)}",
        mapping=_braces(mapping),
        is_float=tensor.is_float,
        axis=array.channel_axis % max(1, len(tensor.file_shape)) if array else 0,
    )


def _field(field: TextField) -> CppField:
    tokens, filler = {
        "input_ids": ("ids", "padding.id"),
        "attention_mask": ("std::vector<std::int64_t>(ids.size(), 1)", "0"),
        "token_type_ids": ("type_ids.empty() ? std::vector<std::int64_t>(ids.size()) : type_ids", "padding.type_id"),
    }[field.field]
    return CppField(field.tensor.identifier, CPP_TYPE[field.tensor.model_dtype], tokens, filler)


def _image(p: ImagePreprocessing, *, columns_first: bool) -> dict[str, str]:
    sizes = (1, p.channels, p.height, p.width) if p.layout == "NCHW" else (1, p.height, p.width, p.channels)
    return {
        "width": str(p.width),
        "height": str(p.height),
        "channels": str(p.channels),
        "crop_fraction": repr(p.crop_fraction or 0.0),
        "resize_shorter": str(p.resize_shorter or 0),
        "filter": f"k{p.interpolation.capitalize()}",
        "columns_first": str(columns_first).lower(),
        "channels_last": str(p.layout == "NHWC").lower(),
        "rescale": _float(p.rescale),
        "mean": _braces(list(map(_float, p.mean))),
        "std": _braces(list(map(_float, p.std))),
        "shape": _braces(list(map(str, sizes))),
    }


def _audio(p: AudioPreprocessing, rank: int) -> dict[str, str]:
    return {
        "sample_rate": str(p.sample_rate),
        "num_samples": str(p.num_samples),
        "mean": _float(p.mean),
        "std": _float(p.std),
        "shape": _braces([*["1"] * (rank - 1), str(p.num_samples)]),
    }


def _array(p: ArrayPreprocessing) -> dict[str, str]:
    return {
        "rescale": _float(p.rescale),
        "mean": _braces(list(map(_float, p.mean))),
        "std": _braces(list(map(_float, p.std))),
    }


def _stored(array: StoredArray) -> str:
    return _braces([string_literal(array.file), _braces(list(map(str, array.shape)))])


def _float(value: float) -> str:
    return f"{float32_text(value)}f"


def _braces(items: list[str]) -> str:
    return "{" + ", ".join(items) + "}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
