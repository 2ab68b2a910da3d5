"""The Python app: one module with a class, on NumPy and the runtime (Pillow for pictures, tokenizers for text)."""

from __future__ import annotations

import keyword
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from edgeopt.bundle.apps.base import (
    AppTensor,
    array_preprocessing,
    audio_preprocessing,
    float32_text,
    identifier,
    image_preprocessing,
    padded_length,
    render,
    scores_output,
    tensors,
    text_fields,
    text_preprocessing,
    words,
)
from edgeopt.bundle.guide import PYTHON_PACKAGE, RUNTIME_TITLE
from edgeopt.bundle.manifest import Manifest
from edgeopt.types import ArrayPreprocessing, AudioPreprocessing, ImagePreprocessing

RUNTIME_IMPORT = {
    "litert": "from ai_edge_litert.interpreter import Interpreter",
    "onnx": "import onnxruntime",
    "executorch": "import torch\nfrom executorch.runtime import Runtime",
    "openvino": "import openvino",
    "coreml": "from coremltools.models import MLModel",
}
#: What a tokenizer's field is called in its `Encoding`.
ENCODING = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

FIELD_NAMES = frozenset(keyword.kwlist)
CLASS_NAMES = words(
    "Any Array Image ImageOps Input Interpreter MLModel Mapping Output Path Runtime Tokenizer Tokens None True False"
)
#: A module of this name would hide another that it needs.
MODULE_NAMES = (
    frozenset(keyword.kwlist)
    | sys.stdlib_module_names
    | words(
        "ai_edge_litert check coremltools executorch golden_test numpy onnxruntime openvino pil pip setuptools "
        "tokenizers torch unpack"
    )
)


@dataclass(frozen=True, slots=True)
class PythonTensor:
    """What the templates say about one tensor.

    Attributes:
        identifier: of the field; `key` the same as a string. name: the model's name, as a string.
        note: type and shape, for a comment.
        mapping: expression that makes a `Mapping`. mapping_key: key in the golden test's table of names.
        is_float: whether normalisation applies to it, along `axis`.
    """

    identifier: str
    key: str
    name: str
    note: str
    mapping: str
    mapping_key: str
    is_float: bool
    axis: int


def files(manifest: Manifest) -> Mapping[str, str]:
    """File name in <bundle>/python/ -> text."""
    values = _values(manifest)
    return {
        f"{values['module']}.py": render("python", "model.py.j2", **values),
        "golden_test.py": render("python", "golden_test.py.j2", **values),
    }


def _values(manifest: Manifest) -> dict[str, object]:
    """Everything that the templates speak of."""
    signature = manifest.model.signature
    inputs = tensors(signature.inputs, "snake", FIELD_NAMES, "input")
    outputs = tensors(signature.outputs, "snake", FIELD_NAMES, "output")
    image, audio = image_preprocessing(manifest), audio_preprocessing(manifest)
    text, array = text_preprocessing(manifest), array_preprocessing(manifest)
    fields = text_fields(manifest, inputs) if text else ()
    limit, pad = padded_length(text, fields) if text else (0, 0)
    scores = scores_output(manifest, outputs)
    package = "openvino" if manifest.target_definition.accelerator == "openvino" else PYTHON_PACKAGE[manifest.format]
    known = manifest.tools.get(package)
    needed = ["NumPy", f"{package}=={known}" if known else package]
    needed += [f"Pillow=={manifest.tools['pillow']}"] if image else ["tokenizers"] if text else []
    return {
        "title": f"The model {_string(manifest.name)[1:-1]} ({RUNTIME_TITLE[manifest.format]}, {manifest.precision})",
        "module": identifier(manifest.name, "snake", MODULE_NAMES, "model"),
        "cls": identifier(manifest.name, "pascal", CLASS_NAMES, "model"),
        "needs": f"{', '.join(needed[:-1])} and {needed[-1]}",
        "runtime": "openvino" if package == "openvino" else manifest.format,
        "runtime_import": RUNTIME_IMPORT["openvino" if package == "openvino" else manifest.format],
        "file": _string(manifest.model.file),
        "inputs": [_tensor(tensor, "in", array) for tensor in inputs],
        "outputs": [_tensor(tensor, "out", array) for tensor in outputs],
        "image": _image(image, is_float=inputs[0].is_float) if image else None,
        "audio": _audio(audio, len(inputs[0].file_shape)) if audio else None,
        "text": {
            "tokenizer": _string(text.tokenizer),
            "limit": limit,
            "pad": pad,
            "fields": [
                {
                    "identifier": field.tensor.identifier,
                    "attribute": ENCODING[field.field],
                    "dtype": _string(field.tensor.model_dtype),
                }
                for field in fields
            ],
        }
        if text
        else None,
        "pair": text is not None and len(text.text_keys) > 1,
        "array": _array(array) if array else None,
        "scores": scores.identifier if scores else None,
        "labels": [_string(label) for label in manifest.labels] if scores else [],
        "has_main": scores is not None and (image is not None or text is not None),
    }


def _tensor(tensor: AppTensor, side: str, array: ArrayPreprocessing | None) -> PythonTensor:
    shape = _tuple([_string(size) if isinstance(size, str) else str(size) for size in tensor.model_shape])
    free = _tuple(["None" if isinstance(size, str) else str(size) for size in tensor.model_shape])
    arguments = [_string(tensor.native_name), _string(tensor.file_dtype), _string(tensor.model_dtype), free]
    if tensor.permutation is not None:
        arguments.append(f"permutation={_tuple(list(map(str, tensor.permutation)))}")
    if tensor.scale is not None:
        arguments.append(f"scale={float32_text(tensor.scale)}, zero_point={tensor.zero_point}")
    return PythonTensor(
        identifier=tensor.identifier,
        key=_string(tensor.identifier),
        name=_string(tensor.name),
        note=f"{tensor.model_dtype} {shape}",
        mapping=f"Mapping({', '.join(arguments)})",
        mapping_key=f'("{side}", {_string(tensor.identifier)})',
        is_float=tensor.is_float,
        axis=array.channel_axis % max(1, len(tensor.file_shape)) if array else 0,
    )


def _image(p: ImagePreprocessing, *, is_float: bool) -> dict[str, object]:
    return {
        "width": p.width,
        "height": p.height,
        "channels": p.channels,
        "mode": '"L"' if p.channels == 1 else '"RGB"',
        "crop_fraction": p.crop_fraction,
        "resize_shorter": p.resize_shorter,
        "filter": p.interpolation.upper(),
        "channels_last": p.layout == "NHWC",
        "is_float": is_float,
        "rescale": repr(p.rescale),
        "mean": _tuple(list(map(repr, p.mean))),
        "std": _tuple(list(map(repr, p.std))),
    }


def _audio(p: AudioPreprocessing, rank: int) -> dict[str, object]:
    return {
        "sample_rate": p.sample_rate,
        "num_samples": p.num_samples,
        "mean": repr(p.mean),
        "std": repr(p.std),
        "shape": _tuple([*["1"] * (rank - 1), str(p.num_samples)]),
    }


def _array(p: ArrayPreprocessing) -> dict[str, str]:
    return {
        "rescale": repr(p.rescale),
        "mean": _tuple(list(map(repr, p.mean))),
        "std": _tuple(list(map(repr, p.std))),
    }


def _string(text: str) -> str:
    """Any text as an ASCII string literal in double quotes."""
    body = "".join(
        character if " " <= character <= "~" and character not in '"\\' else character.encode("unicode_escape").decode()
        for character in text
    )
    return '"' + body.replace('"', '\\"') + '"'


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
