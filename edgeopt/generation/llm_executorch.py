"""ExecuTorch's layout of a causal language model: the cache is the network's own, in buffers that it writes to.

Inputs and output are those that ExecuTorch's text runner calls (extension/llm/runner in its sources).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgeopt.generation.llm_network import LanguageModel, call, language_model, masks
from edgeopt.types import WRAPPED_ATTRIBUTE, Dim, Generation, Model, TensorSpec


class _Rows:
    """A cache of so many rows; new tokens are written to those that they are at."""

    def __init__(self, key: Tensor, value: Tensor, at: Tensor) -> None:
        self._key, self._value, self._at = key, value, at

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # Not by `[:, :, at] =`, which drops the first dimension of what is written: the kernel that writes in place
        # wants it.
        self._key.index_copy_(2, self._at, key)
        self._value.index_copy_(2, self._at, value)
        return self._key, self._value


class ExecuTorchNetwork(torch.nn.Module):
    """(input_ids (1, L), cache_position (L,)) -> logits (1, 1, V) of the last token.

    Rows of the cache behind the last position are never looked at, so a new text may start without clearing them.
    """

    def __init__(self, found: LanguageModel) -> None:
        super().__init__()
        self.add_module(WRAPPED_ATTRIBUTE, found.network)
        self._windows = found.windows
        self._layers = tuple(shape.layer for shape in found.caches)
        self._count = found.generation.max_target
        for shape in found.caches:
            self.register_buffer(f"key_{shape.layer}", torch.zeros(1, shape.heads, self._count, shape.key_size))
            self.register_buffer(f"value_{shape.layer}", torch.zeros(1, shape.heads, self._count, shape.value_size))

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        stores = {
            layer: _Rows(getattr(self, f"key_{layer}"), getattr(self, f"value_{layer}"), cache_position)
            for layer in self._layers
        }
        mask = masks(cache_position, torch.arange(self._count), self._windows)
        network = getattr(self, WRAPPED_ATTRIBUTE)
        return call(network, input_ids, cache_position[None], mask, stores, last_only=True)


def executorch_model(model: Model) -> Model:
    """The network as ExecuTorch's text runner calls it, to be exported and quantized like any other model.

    Layers keep their names, so that what was said of them (keep-float, input ranges) still holds.

    Raises ConversionError where the model is no Hugging Face language model.
    """
    found = language_model(model)
    new = Dim("sequence", 1, longest_chunk(found.generation))
    return replace(
        model,
        name=f"{model.name}-executorch",
        module=ExecuTorchNetwork(found).eval(),
        inputs=(TensorSpec("input_ids", (1, new), "int64"), TensorSpec("cache_position", (new,), "int64")),
        outputs=(TensorSpec("logits", (1, 1, found.generation.vocabulary), "float32"),),
        example_inputs={"input_ids": np.ones((1, 3), np.int64), "cache_position": np.arange(3)},
        preprocessing=None,
        generation=None,
    )


def longest_chunk(generation: Generation) -> int:
    """Tokens that the network reads at once. The runner cuts a longer prompt into chunks."""
    return min(generation.max_source, generation.max_target - 1)
