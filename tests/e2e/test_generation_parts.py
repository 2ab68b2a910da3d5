"""Parts of networks that write, through the real converters: the files compute what the parts compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgeopt.exporter import load_exporter
from edgeopt.generation.parts import split
from edgeopt.runtimes import load_runtime
from edgeopt.sources import ModelSpec, SourceOptions, load_model
from edgeopt.types import Array, Format, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.e2e

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

RUNTIMES: dict[Format, str] = {"litert": "litert", "onnx": "onnxruntime", "executorch": "executorch"}
#: Far more vocabulary than layers: a file that held the embeddings of another part too would show it by its size.
IDS = {"vocab_size": 2000, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}


def marian() -> PreTrainedModel:
    return transformers.MarianMTModel(
        transformers.MarianConfig(
            **IDS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_attention_heads=2, decoder_ffn_dim=24, max_position_embeddings=24, decoder_start_token_id=3,
        )
    )  # fmt: skip


def llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **IDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=24,
        )
    )  # fmt: skip


def filled(part: Model) -> dict[str, Array]:
    """Inputs in mid-text: a cache that holds something, a source with padding at its end."""
    rng = np.random.default_rng(0)
    values = dict(part.example_inputs)
    for spec in part.inputs:
        if spec.name.startswith(("past_", "memory_")):
            values[spec.name] = rng.standard_normal(values[spec.name].shape).astype(np.float32)
        elif spec.name in ("position", "length"):
            values[spec.name] = np.array([5])
        elif spec.name.endswith("mask"):
            values[spec.name] = (np.arange(values[spec.name].shape[1]) < 6).astype(np.int64)[None]
    return values


@pytest.mark.parametrize("format_", RUNTIMES)
@pytest.mark.parametrize("network", [marian, llama])
def test_files_compute_what_the_parts_do(
    network: Callable[[], PreTrainedModel], format_: Format, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    options = SourceOptions(name="net", max_source_length=8, max_target_length=10)
    for name, part in split(load_model(ModelSpec(network()), options), beams=2).items():
        folder = tmp_path / name
        folder.mkdir()
        artifact = load_exporter(format_).export_float(part, folder)
        # An encoder looks tokens up, a decoder also tells them apart; more tables would be those of other parts.
        tables = 1 if name == "encoder" else 2
        assert artifact.size_bytes < tables * 4 * 16 * 2000 + 100_000
        values = filled(part)
        assert part.module is not None
        with torch.no_grad():
            outputs = part.module(*(torch.from_numpy(values[spec.name]) for spec in part.inputs))
        with load_runtime(RUNTIMES[format_]).open(artifact.path, artifact.signature) as session:
            got = session.run(values)
        assert [*got] == [spec.name for spec in part.outputs]
        for spec, expected in zip(part.outputs, outputs, strict=True):
            assert np.allclose(got[spec.name], expected.numpy(), atol=1e-5), (name, spec.name)
