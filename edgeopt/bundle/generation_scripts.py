"""generate.py and check_generation.py: the loop around the parts as a program that needs nothing of edgeopt.

They open the files through the parts' own Python modules, which take and give tensors as the trained model has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgeopt.bundle.apps.base import AppTensor, identifier, render, tensors, text_fields
from edgeopt.bundle.apps.python import CLASS_NAMES, ENCODING, FIELD_NAMES, MODULE_NAMES
from edgeopt.bundle.generation_consistency import source_mask
from edgeopt.bundle.generation_manifest import PARTS, GenerationManifest
from edgeopt.bundle.guide import PYTHON_PACKAGE, RUNTIME_TITLE
from edgeopt.bundle.manifest import Manifest
from edgeopt.types import PartName, TextPreprocessing

SCRIPTS = ("generate.py", "check_generation.py")


def scripts(manifest: GenerationManifest, parts: Mapping[PartName, Manifest], *, truncation: str) -> dict[str, str]:
    """File name -> text. `truncation`: the side on which the tokenizer cuts a text that is too long."""
    values = _values(manifest, parts, truncation)
    return {name: render("generation", f"{name}.j2", **values) for name in SCRIPTS}


def reads_text(manifest: GenerationManifest, parts: Mapping[PartName, Manifest]) -> bool:
    """Whether the first part takes what the tokenizer makes of a text."""
    if not isinstance(manifest.preprocessing, TextPreprocessing):
        return False
    first = parts[PARTS[manifest.generation.kind][0]]
    return manifest.generation.kind == "decoder" or bool(text_fields(first, _inputs(first)))


def most_prompt_tokens(manifest: GenerationManifest) -> int:
    """Where a text is cut."""
    generation, preprocessing = manifest.generation, manifest.preprocessing
    limits = [generation.max_source]
    if generation.kind == "decoder":
        limits.append(generation.max_target)
    if isinstance(preprocessing, TextPreprocessing):
        limits.append(preprocessing.max_length)
    return min(limits)


def _values(manifest: GenerationManifest, parts: Mapping[PartName, Manifest], truncation: str) -> dict[str, object]:
    first, decoder = PARTS[manifest.generation.kind]
    inputs = _inputs(parts[first])
    text = reads_text(manifest, parts)
    encoder = first == "encoder"
    mask = next((t for t in inputs if t.name == source_mask(parts[first])), None)
    takes_mask = any(tensor.name == "source_mask" for tensor in parts[decoder].model.signature.inputs)
    preprocessing = manifest.preprocessing
    return {
        "title": f"{_ascii(manifest.name)} ({RUNTIME_TITLE[manifest.format]}, {manifest.precision})",
        "needs": needs(manifest),
        "beams": manifest.beams,
        "sample": "A man in a hat.",
        "text": text,
        "tokenizer": manifest.tokenizer is not None,
        "encoder": encoder,
        "first": first,
        "first_class": _class(parts[first]),
        "decoder_class": _class(parts[decoder]),
        "imports": [*_imports(parts[first], first), *_imports(parts[decoder], decoder)],
        "source_mask": mask.identifier if takes_mask and mask is not None else None,
        "mask": mask.identifier if mask is not None else None,
        "limit": most_prompt_tokens(manifest),
        "truncation": truncation,
        "prefix": ascii(preprocessing.prefix)
        if isinstance(preprocessing, TextPreprocessing) and preprocessing.prefix
        else None,
        "fields": [(field.tensor.identifier, ENCODING[field.field]) for field in text_fields(parts[first], inputs)]
        if text and encoder
        else [],
        "only_input": inputs[0].identifier if inputs else "",
    }


def needs(manifest: GenerationManifest) -> str:
    """The packages, for a sentence or for pip once the commas are gone."""
    package = PYTHON_PACKAGE[manifest.format]
    version = manifest.tools.get(package)
    names = ["numpy", f"{package}=={version}" if version else package]
    return ", ".join([*names, "tokenizers"] if manifest.tokenizer is not None else names)


def _imports(manifest: Manifest, part: PartName) -> list[tuple[str, str]]:
    """(module, symbol) of what generate.py takes from a part's module."""
    module = identifier(manifest.name, "snake", MODULE_NAMES, "model")
    symbols = (f"INPUTS as {part.upper()}_INPUTS", f"Input as {part.capitalize()}Input", _class(manifest))
    return [(module, symbol) for symbol in symbols]


def _class(manifest: Manifest) -> str:
    return identifier(manifest.name, "pascal", CLASS_NAMES, "model")


def _inputs(manifest: Manifest) -> tuple[AppTensor, ...]:
    return tensors(manifest.model.signature.inputs, "snake", FIELD_NAMES, "input")


def _ascii(text: str) -> str:
    return json.dumps(text)[1:-1]
