"""Causal language models in the layouts of the runtimes' own generators, before anything is exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from edgeopt.errors import ConversionError
from edgeopt.generation.llm_executorch import executorch_model
from edgeopt.generation.llm_genai import genai_model
from edgeopt.generation.llm_genai_folder import write_genai
from edgeopt.generation.llm_network import language_model
from edgeopt.sources.huggingface_generation import adapter_for
from edgeopt.types import (
    Artifact,
    Dim,
    Generation,
    Model,
    Signature,
    SignatureTensor,
    TensorSpec,
    TextPreprocessing,
)

VOCABULARY, ROWS = 50, 12
SIZES = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 32}
LLAMA = LlamaConfig(hidden_size=16, intermediate_size=24, num_key_value_heads=2, bos_token_id=1, **SIZES)


def network(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return made


def model_of(made: PreTrainedModel) -> Model:
    target = Dim("target", 2, ROWS)
    return Model(
        name="tiny",
        module=adapter_for(made, "test"),
        native=None,
        inputs=(TensorSpec("input_ids", (1, target), "int64"),),
        outputs=(TensorSpec("logits", (1, target, VOCABULARY), "float32"),),
        example_inputs={"input_ids": np.ones((1, 4), np.int64)},
        preprocessing=None,
        labels=(),
        history=(),
        source_sha256="0" * 64,
        generation=Generation("decoder", "text-generation", VOCABULARY, (), (2,), 0, 6, ROWS, 2),
    )


def ids(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(3, VOCABULARY, shape))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32),
        Qwen2Config(hidden_size=16, intermediate_size=24, num_key_value_heads=2, **SIZES),
        MistralConfig(hidden_size=16, intermediate_size=24, num_key_value_heads=2, sliding_window=3, **SIZES),
    ],
    ids=["llama", "gpt2", "qwen2", "mistral-window"],
)
class TestEqualsTheWhole:
    """A prompt, then token by token, gives the logits that the network gives for all of them at once."""

    def test_genai(self, config: PretrainedConfig) -> None:
        made = network(config)
        form = genai_model(model_of(made))
        tokens = ids(2, 8)
        with torch.no_grad():
            expected = made(input_ids=tokens).logits
            # An empty past, as the runtime begins with.
            past = [torch.zeros(2, *form.inputs[3].shape[1:2], 0, form.example_inputs[s.name].shape[3])
                    for s in form.inputs[3:]]  # fmt: skip
            got = []
            for start, end in ((0, 5), (5, 6), (6, 8)):
                mask = torch.ones(2, end, dtype=torch.int64)
                positions = torch.arange(start, end).repeat(2, 1)
                logits, *past = form.module(tokens[:, start:end], mask, positions, *past)
                got.append(logits)
        assert torch.allclose(torch.cat(got, 1), expected, atol=1e-5)

    def test_executorch(self, config: PretrainedConfig) -> None:
        made = network(config)
        form = executorch_model(model_of(made))
        tokens = ids(1, 8)
        with torch.no_grad():
            expected = made(input_ids=tokens).logits
            # A longer text first: what it has left in the cache must not be seen.
            form.module(ids(1, 10), torch.arange(10))
            for start, end in ((0, 5), (5, 6), (6, 8)):
                logits = form.module(tokens[:, start:end], torch.arange(start, end))
                assert torch.allclose(logits[:, 0], expected[:, end - 1], atol=1e-5)


def test_padding_on_the_left_is_not_seen() -> None:
    made = network(LLAMA)
    form = genai_model(model_of(made))
    tokens = ids(1, 4)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), tokens], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    past = [torch.zeros(1, 2, 0, 4)] * 4
    with torch.no_grad():
        expected = made(input_ids=tokens).logits
        got = form.module(padded, mask, torch.tensor([[0, 0, 0, 0, 1, 2, 3]]), *past)[0]
    assert torch.allclose(got[:, 3:], expected, atol=1e-5)


def test_layers_keep_their_names() -> None:
    model = model_of(network(LLAMA))
    assert model.module is not None
    own = {name for name, _ in model.module.named_parameters()}
    for form in (genai_model(model), executorch_model(model)):
        assert form.module is not None
        assert {name for name, _ in form.module.named_parameters()} == own
        assert form.generation is None


def test_signature_of_genai() -> None:
    form = genai_model(model_of(network(LLAMA)))
    assert [t.name for t in form.inputs] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value",
        "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    assert [t.name for t in form.outputs][:3] == ["logits", "present.0.key", "present.0.value"]
    for spec in form.inputs:
        shape = form.example_inputs[spec.name].shape
        assert len(shape) == len(spec.shape)
        assert all(size == dim for size, dim in zip(shape, spec.shape, strict=True) if isinstance(dim, int))


class TestPrunedLayers:
    def narrowed(self) -> PreTrainedModel:
        """A network of which the second layer has lost one of its two groups of heads."""
        made = network(LLAMA)
        attention = made.model.layers[1].self_attn
        for name, keep in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            layer = getattr(attention, name)
            layer.weight = torch.nn.Parameter(layer.weight[:keep])
        attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :8])
        return made

    def test_caches_are_as_wide_as_the_layers(self) -> None:
        shapes = language_model(model_of(self.narrowed())).caches
        assert [(shape.heads, shape.key_size) for shape in shapes] == [(2, 4), (1, 4)]
        form = executorch_model(model_of(self.narrowed()))
        assert form.module is not None
        with torch.no_grad():
            assert form.module(ids(1, 3), torch.arange(3)).shape == (1, 1, VOCABULARY)

    def test_genai_can_not_tell_of_them(self) -> None:
        with pytest.raises(ConversionError, match="caches of one shape"):
            genai_model(model_of(self.narrowed()))

    def test_numbers_with_gaps(self) -> None:
        made = network(LLAMA)
        made.model.layers[1].self_attn.layer_idx = 5
        found = language_model(model_of(made))
        assert [shape.layer for shape in found.caches] == [0, 5]
        form = genai_model(model_of(made))
        assert [t.name for t in form.inputs][-1] == "past_key_values.1.value"


class TestRefused:
    def test_no_decoder(self) -> None:
        model = model_of(network(LLAMA))
        assert model.generation is not None
        for generation in (None, replace(model.generation, kind="encoder-decoder")):
            with pytest.raises(ConversionError, match="is no decoder-only language model"):
                genai_model(replace(model, generation=generation))

    def test_network_of_ones_own(self) -> None:
        class Own(torch.nn.Module):
            def decode(self) -> None: ...

            def prefill(self) -> None: ...

        with pytest.raises(ConversionError, match="made from Hugging Face models"):
            executorch_model(replace(model_of(network(LLAMA)), module=Own()))

    def test_positions_of_its_own(self) -> None:
        made = network(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2))
        with pytest.raises(ConversionError, match="takes no position_ids"):
            genai_model(model_of(made))


class TestGenaiFolder:
    def artifact(self, path: Path, *names: str) -> Artifact:
        path.write_bytes(b"onnx")
        tensors = tuple(SignatureTensor(n, n, ("batch", 2, "past", 4), "float32", "float32") for n in names)
        return Artifact(path, "onnx", "fp32", Signature(tensors, ()), 4, "0" * 64, (), {}, ())

    def test_configuration(self, tmp_path: Path) -> None:
        names = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
        artifact = self.artifact(tmp_path / "exported.onnx", *names)
        folder = tmp_path / "folder"
        folder.mkdir()
        written = write_genai(model_of(network(LLAMA)), artifact, folder)
        assert [path.name for path in written] == ["genai_config.json", "model.onnx"]
        settings = json.loads((folder / "genai_config.json").read_text("utf-8"))
        assert settings["model"]["bos_token_id"] == 1
        assert settings["model"]["eos_token_id"] == 2
        assert settings["model"]["context_length"] == settings["search"]["max_length"] == ROWS
        decoder = settings["model"]["decoder"]
        assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 4)
        assert settings["search"]["past_present_share_buffer"] is False

    def test_tokenizer_travels(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "tokenizer.json").write_text("{}", "utf-8")
        (source / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
        (source / "model.safetensors").write_bytes(b"weights")
        model = replace(model_of(network(LLAMA)), preprocessing=TextPreprocessing(str(source / "tokenizer.json")))
        artifact = self.artifact(tmp_path / "exported.onnx", "past_key_values.0.key", "past_key_values.0.value")
        folder = tmp_path / "folder"
        folder.mkdir()
        assert [path.name for path in write_genai(model, artifact, folder)] == [
            "chat_template.jinja", "genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip

    def test_file_of_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="has no cache"):
            write_genai(model_of(network(LLAMA)), self.artifact(tmp_path / "exported.onnx", "input"), tmp_path)
