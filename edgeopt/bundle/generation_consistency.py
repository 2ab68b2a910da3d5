"""Does the bundle of a network that writes make sense in itself: do its parts fit each other and the loop?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from edgeopt.bundle.generation_manifest import GenerationManifest
from edgeopt.bundle.manifest import Manifest
from edgeopt.types import PartName, SignatureTensor

Shape = tuple[int | str, ...]


def contradictions(manifest: GenerationManifest, parts: Mapping[PartName, Manifest]) -> Iterator[str]:
    """Every contradiction, in words that go after the name of generation.json."""
    target, generation = manifest.target_definition, manifest.generation
    if (manifest.target, manifest.format) != (target.name, target.format):
        yield f"is for {manifest.target!r} ({manifest.format}), its target_definition for {target.name!r}"
    if not 1 <= manifest.beams <= 64:
        yield f"has {manifest.beams} beams"
    if not math.isfinite(manifest.length_penalty):
        yield f"has the length penalty {manifest.length_penalty!r}"
    for name in ("vocabulary", "max_source", "max_target", "layers"):
        if getattr(generation, name) < 1:
            yield f"has the {name} {getattr(generation, name)}"
    ids = (
        *generation.start_ids,
        *generation.end_ids,
        *generation.suppressed_ids,
        *generation.begin_suppressed_ids,
        generation.pad_id,
    )
    for token in ids:
        if not 0 <= token < max(generation.vocabulary, 1):
            yield f"speaks of the token {token}; there are {generation.vocabulary}"
            break
    if generation.kind == "encoder-decoder" and not 1 <= len(generation.start_ids) <= generation.max_target:
        yield f"has {len(generation.start_ids)} start_ids for a cache of {generation.max_target} rows"
    for name, part in parts.items():
        if (part.target, part.format) != (manifest.target, manifest.format):
            yield f"is for {manifest.target!r}, its part {name!r} for {part.target!r}"
    yield from _tensor_contradictions(manifest, parts)


def _tensor_contradictions(manifest: GenerationManifest, parts: Mapping[PartName, Manifest]) -> Iterator[str]:
    """The loop hands tensors on by name, so names and sizes must be those that it goes by."""
    rows, generation = manifest.beams, manifest.generation
    signature = parts["decoder"].model.signature
    takes, gives = _shapes(signature.inputs), _shapes(signature.outputs)
    if (takes.get("token"), gives.get("logits")) != ((rows, 1), (rows, generation.vocabulary)):
        yield f"has a decoder that doesn't write {rows} rows of {generation.vocabulary} tokens"
    cache = {name: shape for name, shape in takes.items() if name.startswith("past_")}
    if set(cache) != {f"past_{kind}_{layer}" for layer in range(generation.layers) for kind in ("key", "value")}:
        yield f"has {generation.layers} layers, and a decoder with another cache"
    for name, shape in cache.items():
        present = gives.get(f"present_{name.removeprefix('past_')}")
        if len(shape) != 4 or (shape[0], shape[2]) != (rows, generation.max_target):
            yield f"has the cache {name} of {shape}"
        elif present != (shape[0], shape[1], 1, shape[3]):
            yield f"has the cache {name} of {shape}, and new rows of {present}"
    if generation.kind == "encoder-decoder":
        yield from _encoder_contradictions(rows, parts["encoder"], takes)
    else:
        yield from _prefill_contradictions(manifest, parts["prefill"], cache)


def _encoder_contradictions(rows: int, encoder: Manifest, takes: Mapping[str, Shape]) -> Iterator[str]:
    gives = _shapes(encoder.model.signature.outputs)
    for name, shape in takes.items():
        if name.startswith("memory_") and (shape[:1] != (rows,) or gives.get(name, ()) != (1, *shape[1:])):
            yield f"has an encoder whose {name} is not the decoder's"
    if "source_mask" in takes and source_mask(encoder) is None:
        yield "has a decoder with a mask of the source, and an encoder that takes none"


def _prefill_contradictions(
    manifest: GenerationManifest, prefill: Manifest, cache: Mapping[str, Shape]
) -> Iterator[str]:
    takes, gives = _shapes(prefill.model.signature.inputs), _shapes(prefill.model.signature.outputs)
    prompt, vocabulary = manifest.generation.max_source, manifest.generation.vocabulary
    if takes != {"input_ids": (1, prompt), "length": (1,)} or gives.get("logits") != (1, vocabulary):
        yield f"has a prefill that doesn't read {prompt} tokens with their length and score {vocabulary}"
    for name, shape in cache.items():
        if len(shape) == 4 and gives.get(f"present_{name.removeprefix('past_')}") != (1, shape[1], prompt, shape[3]):
            yield f"has a prefill whose rows are not those of the decoder's {name}"


def source_mask(encoder: Manifest) -> str | None:
    """The encoder's input that tells tokens from padding, which the decoder takes as source_mask."""
    names = (tensor.name for tensor in encoder.model.signature.inputs)
    return next((name for name in names if "mask" in name), None)


def layers_of(decoder: Manifest) -> int:
    """Layers that have a cache."""
    return sum(tensor.name.startswith("past_key_") for tensor in decoder.model.signature.inputs)


def _shapes(tensors: tuple[SignatureTensor, ...]) -> dict[str, Shape]:
    """Name -> shape in the model's own order of dimensions."""
    shapes: dict[str, Shape] = {}
    for tensor in tensors:
        order = tensor.permutation
        if order is None:
            shapes[tensor.name] = tensor.shape
        else:
            shapes[tensor.name] = tuple(tensor.shape[order.index(axis)] for axis in range(len(order)))
    return shapes
