"""onnxruntime-genai's layout of a causal language model: one network for prompt and steps, whose cache grows.

Names and shapes are those of its configuration reference (onnxruntime.ai/docs/genai/reference/config.html).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgeopt.errors import ConversionError
from edgeopt.generation.llm_network import CacheShape, LanguageModel, Tensors, call, language_model, masks
from edgeopt.types import WRAPPED_ATTRIBUTE, Array, Artifact, Dim, Generation, Model, TensorSpec

#: Sequences at once: a batch, or the beams of a search.
_MAX_BATCH = 64
#: Sizes of the example's dynamic dimensions. All differ, since a tracer takes equal ones as the same.
_BATCH, _NEW, _PAST = 2, 3, 4


class _Growing:
    """A cache that the caller owns: what was there goes in, all there is comes out."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.key = torch.cat([self.key, key], dim=2)
        self.value = torch.cat([self.value, value], dim=2)
        return self.key, self.value


class GenaiNetwork(torch.nn.Module):
    """(input_ids (B, L), attention_mask (B, P + L), position_ids (B, L), past keys and values (B, H, P, D) by layer)
    -> (logits (B, L, V), present keys and values (B, H, P + L, D))."""

    def __init__(self, found: LanguageModel) -> None:
        super().__init__()
        self.add_module(WRAPPED_ATTRIBUTE, found.network)
        self._windows = found.windows
        self._layers = tuple(shape.layer for shape in found.caches)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Tensors:
        pairs = zip(past[::2], past[1::2], strict=True)
        stores = {layer: _Growing(*pair) for layer, pair in zip(self._layers, pairs, strict=True)}
        before, new = past[0].shape[2], input_ids.shape[1]
        rows = torch.arange(before + new)
        # Read by index: that the mask is as long as past and new tokens together is nothing a tracer could know.
        real = attention_mask[:, rows] != 0
        mask = masks(before + torch.arange(new), rows, self._windows, real)
        logits = call(getattr(self, WRAPPED_ATTRIBUTE), input_ids, position_ids, mask, stores)
        return (logits, *(tensor for store in stores.values() for tensor in (store.key, store.value)))


def genai_model(model: Model) -> Model:
    """The network as onnxruntime-genai calls it, to be exported and quantized like any other model.

    Layers keep their names, so that what was said of them (keep-float, input ranges) still holds.

    Raises ConversionError where the network has no such form: it is no Hugging Face language model, or its layers'
    caches differ, of which genai_config.json could not tell.
    """
    found = language_model(model)
    if len({(s.heads, s.key_size, s.value_size) for s in found.caches}) != 1 or (
        found.caches[0].key_size != found.caches[0].value_size
    ):
        raise ConversionError(
            "onnxruntime-genai wants caches of one shape, and those of its layers differ",
            where=model.name,
            fix="prune the heads of all layers alike, or export its parts instead",
        )
    return replace(
        model,
        name=f"{model.name}-genai",
        module=GenaiNetwork(found).eval(),
        inputs=_inputs(found.caches, found.generation),
        outputs=_outputs(found.caches, found.generation),
        example_inputs=_examples(found.caches, found.generation),
        preprocessing=None,
        generation=None,
    )


def cache_of(artifact: Artifact) -> tuple[int, int, int]:
    """Layers, heads and head size of the caches in an exported file.

    Raises ConversionError where it is no file of `genai_model`.
    """
    caches = [t.shape for t in artifact.signature.inputs if t.native_name.startswith("past_key_values.")]
    match caches:
        case [(_, int(heads), _, int(size)), *_]:
            return len(caches) // 2, heads, size
        case _:
            raise ConversionError("has no cache that onnxruntime-genai would find", where=str(artifact.path))


def _inputs(shapes: tuple[CacheShape, ...], generation: Generation) -> tuple[TensorSpec, ...]:
    batch, new, total = _dims(generation)
    past = Dim("past", 0, generation.max_target)
    return (
        TensorSpec("input_ids", (batch, new), "int64"),
        TensorSpec("attention_mask", (batch, total), "int64"),
        TensorSpec("position_ids", (batch, new), "int64"),
        *_caches("past_key_values", shapes, batch, past),
    )


def _outputs(shapes: tuple[CacheShape, ...], generation: Generation) -> tuple[TensorSpec, ...]:
    batch, new, total = _dims(generation)
    logits = TensorSpec("logits", (batch, new, generation.vocabulary), "float32")
    return (logits, *_caches("present", shapes, batch, total))


def _dims(generation: Generation) -> tuple[Dim, Dim, Dim]:
    """Batch, new tokens, and these with those before: a sum has no name of its own in torch.export."""
    rows = generation.max_target
    return Dim("batch", 1, _MAX_BATCH), Dim("sequence", 1, rows), Dim("total", 1, rows)


def _caches(stem: str, shapes: tuple[CacheShape, ...], batch: Dim, rows: Dim) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"{stem}.{number}.{kind}", (batch, shape.heads, rows, shape.key_size), "float32")
        for number, shape in enumerate(shapes)
        for kind in ("key", "value")
    )


def _examples(shapes: tuple[CacheShape, ...], generation: Generation) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    past = {
        f"past_key_values.{number}.{kind}": generator.standard_normal(
            (_BATCH, shape.heads, _PAST, shape.key_size), dtype=np.float32
        )
        for number, shape in enumerate(shapes)
        for kind in ("key", "value")
    }
    return {
        "input_ids": generator.integers(0, generation.vocabulary, (_BATCH, _NEW)),
        "attention_mask": np.ones((_BATCH, _PAST + _NEW), np.int64),
        "position_ids": np.tile(np.arange(_PAST, _PAST + _NEW), (_BATCH, 1)),
        **past,
    }
