"""The loop around real parts writes what transformers writes: in torch, and in the files exported to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeopt.exporter import load_exporter
from edgeopt.generation.parts import split
from edgeopt.generation.writer import Writer
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.pytorch import open_source
from edgeopt.sources import SourceOptions, load_model
from edgeopt.types import Model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.e2e

VOCABULARY, LONGEST = 40, 14
LENGTHS = {"max_source_length": 9, "max_target_length": LONGEST}
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 39, "eos_token_id": 0}


def marian() -> object:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.6}
    more = {"decoder_start_token_id": 39, "forced_eos_token_id": None, "max_position_embeddings": 32}
    model = transformers.MarianMTModel(transformers.MarianConfig(**IDS, **sizes, **heads, **more))
    with torch.no_grad():
        model.final_logits_bias[0, 0] = 5  # so that sequences end here and there
    return model


def t5() -> object:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**IDS, **sizes, decoder_start_token_id=39, initializer_factor=6.0)
    )


def llama() -> object:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "bos_token_id": 1, "initializer_range": 0.8, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**IDS, **sizes, **more))


def loaded(make: Callable[[], object], folder: Path) -> tuple[object, Model]:
    torch.manual_seed(0)
    network = make().eval()
    network.save_pretrained(folder)
    return network, load_model(f"hf:{folder}", SourceOptions(**LENGTHS))


def written_by_transformers(network: object, source: torch.Tensor, model: Model, beams: int) -> list[int]:
    generation = model.generation
    start = 1 if generation.kind == "encoder-decoder" else source.shape[1]
    options = {"suppress_tokens": list(generation.suppressed_ids) or None, "do_sample": False, "num_beams": beams}
    answer = network.generate(source, attention_mask=torch.ones_like(source), max_new_tokens=LONGEST - start, **options)
    return answer[0, start:].tolist()


def sources(count: int) -> list[torch.Tensor]:
    lengths = [9, 2, 5, 7][:count]
    return [torch.randint(1, 38, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


def inputs_of(source: torch.Tensor) -> dict[str, np.ndarray]:
    return {"input_ids": source.numpy(), "attention_mask": np.ones(source.shape, np.int64)}


@pytest.mark.parametrize("make", [marian, t5, llama])
def test_in_torch(make: Callable[[], object], tmp_path: Path) -> None:
    network, model = loaded(make, tmp_path)
    for beams in (1, 4):
        parts = split(model, beams)
        with ExitStack() as stack:
            sessions = {part: stack.enter_context(open_source(one)) for part, one in parts.items()}
            writer = Writer(sessions, model.generation, beams)
            for source in sources(4):
                expected = written_by_transformers(network, source, model, beams)
                start = 1 if model.generation.kind == "encoder-decoder" else source.shape[1]
                assert list(writer.write(inputs_of(source), LONGEST - start).ids) == expected


@pytest.mark.parametrize(("make", "beams"), [(marian, 4), (llama, 1)])
def test_in_exported_files(make: Callable[[], object], beams: int, tmp_path: Path) -> None:
    """Beams of a file that was made for more of them too."""
    network, model = loaded(make, tmp_path / "net")
    runtime = load_runtime("onnxruntime")
    with ExitStack() as stack:
        sessions = {}
        for part, one in split(model, beams).items():
            (tmp_path / part).mkdir()
            artifact = load_exporter("onnx").export_float(one, tmp_path / part)
            sessions[part] = stack.enter_context(runtime.open(artifact.path, artifact.signature))
        for used in {beams, 1, max(1, beams - 1)}:
            writer = Writer(sessions, model.generation, used)
            for source in sources(2):
                expected = written_by_transformers(network, source, model, used)
                start = 1 if model.generation.kind == "encoder-decoder" else source.shape[1]
                assert list(writer.write(inputs_of(source), LONGEST - start).ids) == expected
