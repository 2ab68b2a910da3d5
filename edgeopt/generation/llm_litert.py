"""LiteRT-LM's layout of a causal language model: one file that reads a prompt and that writes, sharing the weights.

Names and shapes are those that its executor looks for (runtime/executor in its sources). litert-torch's own exporter of
language models (generative/export_hf) can't stand in: it can't be imported without TensorFlow, and its attention and
caches are patches to `transformers` for each architecture.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from edgeopt.errors import ConversionError
from edgeopt.generation.llm_network import LanguageModel, call, language_model, masks
from edgeopt.types import WRAPPED_ATTRIBUTE, Model, Scheme

DECODE = "decode"


class _Inserted:
    """A cache that the caller owns; new tokens are inserted from one row on, in a copy that LiteRT makes in place."""

    def __init__(self, key: Tensor, value: Tensor, first: Tensor) -> None:
        self.key, self.value, self._first = key, value, first

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.key, self.value = _insert(self.key, key, self._first), _insert(self.value, value, self._first)
        return self.key, self.value


def _insert(cache: Tensor, rows: Tensor, first: Tensor) -> Tensor:
    from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

    zero = torch.zeros((), dtype=first.dtype)
    inserted: Tensor = dynamic_update_slice(cache, rows, [zero, zero, first, zero])
    return inserted


class LiteRtNetwork(torch.nn.Module):
    """(tokens int32 (1, L), input_pos int32 (L,), kv_cache_k_i and kv_cache_v_i (1, H, C, D)) -> the caches, and with
    `writes` the logits (1, L, V).

    Tokens are taken to follow each other from input_pos[0] on: the executor fills what is left of a prompt's last chunk
    with zeros, positions too. The rows of those are overwritten before anything looks at them.
    """

    def __init__(self, found: LanguageModel, writes: bool) -> None:
        super().__init__()
        self.add_module(WRAPPED_ATTRIBUTE, found.network)
        self._windows = found.windows
        self._layers = tuple(shape.layer for shape in found.caches)
        self._writes = writes

    def forward(self, tokens: Tensor, input_pos: Tensor, **caches: Tensor) -> dict[str, Tensor]:
        stores = {
            layer: _Inserted(caches[f"kv_cache_k_{number}"], caches[f"kv_cache_v_{number}"], input_pos[0])
            for number, layer in enumerate(self._layers)
        }
        positions = (input_pos[:1] + torch.arange(tokens.shape[1], dtype=torch.int32)).to(torch.int64)
        mask = masks(positions, torch.arange(caches["kv_cache_k_0"].shape[2]), self._windows)
        network = getattr(self, WRAPPED_ATTRIBUTE)
        logits = call(network, tokens.to(torch.int64), positions[None], mask, stores)
        result: dict[str, Tensor] = {}
        for number, store in enumerate(stores.values()):
            result |= {f"kv_cache_k_{number}": store.key, f"kv_cache_v_{number}": store.value}
        return result | {"logits": logits} if self._writes else result


def convert_litert_lm(model: Model, path: Path) -> LanguageModel:
    """Write the float .tflite file with the signatures prefill_<max_source> and decode.

    Raises ConversionError where the model is no Hugging Face language model, or litert-torch can't convert it.
    """
    found = language_model(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the vendors' own code
            import litert_torch

            length = found.generation.max_source
            reading, writing = LiteRtNetwork(found, writes=False).eval(), LiteRtNetwork(found, writes=True).eval()
            converter = litert_torch.signature(
                f"prefill_{length}", reading, sample_kwargs=sample_inputs(found, length)
            ).signature(DECODE, writing, sample_kwargs=sample_inputs(found, 1))
            converter.convert().export(str(path))
    except Exception as error:  # every lowering raises its own type
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConversionError(f"litert-torch can't convert it for LiteRT-LM: {reason}", where=model.name) from error
    return found


def sample_inputs(found: LanguageModel, length: int) -> dict[str, Tensor]:
    """Arguments for that many tokens."""
    rows = found.generation.max_target
    caches = {}
    for number, shape in enumerate(found.caches):
        caches[f"kv_cache_k_{number}"] = torch.zeros(1, shape.heads, rows, shape.key_size)
        caches[f"kv_cache_v_{number}"] = torch.zeros(1, shape.heads, rows, shape.value_size)
    tokens = torch.ones(1, length, dtype=torch.int32)
    return {"tokens": tokens, "input_pos": torch.arange(length, dtype=torch.int32), **caches}


def refuse_litert_lm(scheme: Scheme) -> None:
    """Raises ConversionError for a scheme other than float, or integer weights with float activations or run-time
    ranges."""
    if scheme.is_plain_float:
        return
    if scheme.weight_bits > 8 or scheme.activations == "static" or scheme.weight_values != "linear":
        raise ConversionError(
            f"a LiteRT-LM file is made with integer weights (w8, w4, 8da4w, dynamic w8a8), not {scheme.precision} "
            f"with {scheme.activations} activations",
            where="scheme",
        )


def quantize_litert_lm(source: Path, scheme: Scheme, path: Path) -> None:
    """Write the same file with integer weights; both signatures go on sharing them.

    Raises ConversionError for a scheme that `refuse_litert_lm` refuses.
    """
    from ai_edge_quantizer import qtyping, quantizer

    refuse_litert_lm(scheme)
    granularity = {
        "per-channel": qtyping.QuantGranularity.CHANNELWISE,
        "per-tensor": qtyping.QuantGranularity.TENSORWISE,
        "per-group": getattr(qtyping.QuantGranularity, f"BLOCKWISE_{scheme.group_size}", None),
    }[scheme.weight_granularity]
    if granularity is None:
        raise ConversionError(f"LiteRT has no weight groups of {scheme.group_size}", where="scheme")
    maker = quantizer.Quantizer(str(source))
    every = qtyping.TFLOperationName.ALL_SUPPORTED
    add = maker.add_dynamic_config if scheme.activations == "dynamic" else maker.add_weight_only_config
    add(".*", every, num_bits=scheme.weight_bits, granularity=granularity)
    maker.quantize().export_model(str(path), overwrite=True)
