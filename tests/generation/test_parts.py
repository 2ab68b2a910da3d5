"""The parts of tiny Hugging Face networks write what transformers' own generate() writes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from edgeopt.errors import UsageError
from edgeopt.generation.parts import split
from edgeopt.sources import SourceOptions, load_model
from edgeopt.types import WRAPPED_ATTRIBUTE, Dim, Generation, Model, PartName, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

VOCABULARY, START, END, PAD = 60, 3, 2, 1
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 0}
BART = {
    **IDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 24,
    "decoder_start_token_id": START, "forced_eos_token_id": None, "init_std": 0.4,
}  # fmt: skip
LLAMA = {
    **IDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24, "initializer_range": 0.4,
}  # fmt: skip
T5 = {
    **IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": START,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "initializer_factor": 3.0,
}  # fmt: skip


def whisper() -> PreTrainedModel:
    sizes = {key: value for key, value in BART.items() if key not in ("max_position_embeddings", "forced_eos_token_id")}
    config = transformers.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=10, max_target_positions=16)
    return transformers.WhisperForConditionalGeneration(config)


ENCODER_DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "gated-mt5": lambda: transformers.MT5ForConditionalGeneration(transformers.MT5Config(**T5)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**BART)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "mbart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**BART)),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**BART)),
    "m2m100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**BART)),
}
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=2, n_positions=24, initializer_range=0.4)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **IDS,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=24,
            init_std=0.4,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "mistral-windows": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=3)),
    "gemma3-mixed-windows": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **LLAMA, head_dim=4, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
        )
    ),
}


def loaded(make: Callable[[], PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, Model]:
    """A network and what edgeopt makes of its files."""
    torch.manual_seed(0)
    network = make().eval()
    network.save_pretrained(folder)
    is_decoder = not network.config.is_encoder_decoder
    hears = network.main_input_name == "input_features"
    source = None if hears else 6 if is_decoder else 9
    options = SourceOptions(name="net", max_source_length=source, max_target_length=12)
    return network, load_model(f"hf:{folder}", options)


def run(part: Model, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert part.module is not None
    with torch.no_grad():
        outputs = part.module(*(values[spec.name] for spec in part.inputs))
    for spec, tensor in zip(part.inputs, (values[spec.name] for spec in part.inputs), strict=True):
        assert tuple(tensor.shape) == spec.shape, spec.name
    return {spec.name: tensor for spec, tensor in zip(part.outputs, outputs, strict=True)}


def write(
    parts: dict[PartName, Model], generation: Generation, inputs: dict[str, torch.Tensor], count: int, beams: int = 1
) -> list[list[int]]:
    """Greedy, as an app's loop does it: the parts give no more than tensors."""
    decoder = parts["decoder"]
    cache = {
        spec.name: torch.full([d for d in spec.shape if isinstance(d, int)], 7.0)
        for spec in decoder.inputs
        if spec.name.startswith("past_")
    }
    values: dict[str, torch.Tensor] = {}
    position, ids = 0, list(generation.start_ids)
    if generation.kind == "encoder-decoder":
        memory = run(parts["encoder"], inputs)
        values = {name: tensor.repeat(beams, 1, 1, 1) for name, tensor in memory.items()}
        values["source_mask"] = inputs.get("attention_mask", torch.empty(0))
        step = None
    else:
        ids = inputs["input_ids"][0, : int(inputs["length"])].tolist()
        step = run(parts["prefill"], inputs)
        position = len(ids)
        for name, rows in cache.items():
            rows[:, :, :position] = step[name.replace("past", "present")][:, :, :position]
    written: list[list[int]] = [[] for _ in range(beams)]
    while len(written[0]) < count:
        if step is None or position < len(ids):
            tokens = torch.tensor([[ids[position]]] * beams)
            values |= {"token": tokens, "position": torch.tensor([position])}
            step = run(decoder, values | cache)
            for name, rows in cache.items():
                rows[:, :, position] = step[name.replace("past", "present")][:, :, 0]
            position += 1
            continue
        best = step["logits"].argmax(-1).tolist()
        for row, token in zip(written, best, strict=True):
            row.append(token)
        ids.append(best[0])
    return written


def padded(rows: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    full = torch.full([d.max if isinstance(d, Dim) else d for d in spec.shape], spec.padding or 0, dtype=rows.dtype)
    full[:, : rows.shape[1]] = rows
    return full


def never_ending(network: PreTrainedModel, count: int, **inputs: torch.Tensor) -> list[int]:
    """transformers' own greedy writing, `count` tokens whatever they are."""
    network.generation_config.eos_token_id = None
    written = network.generate(**inputs, max_new_tokens=count, num_beams=1, do_sample=False)
    return [int(token) for token in written[0, -count:]]


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def changed(model: Model) -> Model:
    """A deep copy with noise on the weights, so that nothing of the first model can be left in it."""
    module = copy.deepcopy(model.module)
    assert module is not None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return replace(model, module=module)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_writes_as_transformers_does(family: str, tmp_path: Path) -> None:
    network, model = loaded(ENCODER_DECODERS[family], tmp_path)
    assert model.generation is not None
    assert model.module is not None
    assert (model.generation.layers, model.generation.vocabulary) == (2, VOCABULARY)
    ids = torch.tensor([[5, 9, 4, 11, 30, END]])
    mask = torch.ones_like(ids)
    target = torch.tensor([[START, 8, 7, 21]])
    with torch.no_grad():
        padded_ids = torch.nn.functional.pad(ids, (0, 2), value=PAD)
        padded_mask = torch.nn.functional.pad(mask, (0, 2))
        expected = network(input_ids=padded_ids, attention_mask=padded_mask, decoder_input_ids=target).logits
        assert close(model.module(padded_ids, padded_mask, target), expected)

    inputs = {"input_ids": padded(ids, model.inputs[0]), "attention_mask": padded(mask, model.inputs[1])}
    for whole in (model, changed(model)):
        own = network if whole is model else getattr(whole.module, WRAPPED_ATTRIBUTE)
        reference = never_ending(own, 8, input_ids=ids, attention_mask=mask)
        parts = split(whole)
        assert [*parts] == ["encoder", "decoder"]
        assert write(parts, model.generation, inputs, 8) == [reference]
    assert write(split(model, beams=3), model.generation, inputs, 8, beams=3) == 3 * [
        never_ending(network, 8, input_ids=ids, attention_mask=mask)
    ]


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_only_network_writes_as_transformers_does(family: str, tmp_path: Path) -> None:
    network, model = loaded(DECODERS[family], tmp_path)
    assert model.generation is not None
    assert model.module is not None
    assert (model.generation.kind, model.generation.start_ids) == ("decoder", ())
    ids = torch.tensor([[5, 9, 4, 11]])
    with torch.no_grad():
        longer = torch.tensor([[5, 9, 4, 11, 8, 20, 3, 40, 6]])
        assert close(model.module(longer), network(input_ids=longer).logits)
    inputs = {"input_ids": padded(ids, TensorSpec("input_ids", (1, 6), "int64", padding=PAD))}
    inputs["length"] = torch.tensor([4])
    for whole in (model, changed(model)):
        own = network if whole is model else getattr(whole.module, WRAPPED_ATTRIBUTE)
        parts = split(whole)
        assert [*parts] == ["prefill", "decoder"]
        reference = never_ending(own, 7, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert write(parts, model.generation, inputs, 7) == [reference]


def test_whisper_writes_as_transformers_does(tmp_path: Path) -> None:
    network, model = loaded(whisper, tmp_path)
    assert model.generation is not None
    assert (model.generation.task, model.generation.max_source) == ("speech-recognition", 20)
    parts = split(model)
    assert [spec.name for spec in parts["encoder"].inputs] == ["input_features"]
    assert "source_mask" not in [spec.name for spec in parts["decoder"].inputs]
    features = torch.randn((1, 8, 20), generator=torch.Generator().manual_seed(2))
    ids = [START]
    with torch.no_grad():
        for _ in range(8):
            logits = network(input_features=features, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    assert write(parts, model.generation, {"input_features": features}, 8) == [ids[1:]]


def test_parts_are_ordinary_models_of_the_same_layers(tmp_path: Path) -> None:
    _, model = loaded(ENCODER_DECODERS["marian"], tmp_path)
    parts = split(replace(model, input_ranges={"model.encoder.layers.0.fc1": (-1.0, 1.0)}), beams=2)
    assert model.module is not None
    layers = [name for name, _ in model.module.named_modules()]
    for name, part in parts.items():
        assert part.module is not None
        assert part.name == f"net-{name}"
        assert (part.history, part.source_sha256) == (model.history, model.source_sha256)
        assert part.input_ranges == {"model.encoder.layers.0.fc1": (-1.0, 1.0)}
        assert part.generation is None
        assert not any(spec.is_dynamic for spec in (*part.inputs, *part.outputs))
        assert [found for found, _ in part.module.named_modules()] == layers
        for spec in part.inputs:
            assert part.example_inputs[spec.name].shape == spec.shape
            assert part.example_inputs[spec.name].dtype.name == spec.dtype
    assert [spec.name for spec in parts["decoder"].inputs] == [
        "token", "position", "source_mask",
        "memory_key_0", "memory_value_0", "memory_key_1", "memory_value_1",
        "past_key_0", "past_value_0", "past_key_1", "past_value_1",
    ]  # fmt: skip
    assert [spec.name for spec in parts["decoder"].outputs][:3] == ["logits", "present_key_0", "present_value_0"]
    # The weights are the whole model's own; its forward is not.
    assert parts["encoder"].module is not model.module
    shared = {id(parameter) for parameter in model.module.parameters()}
    decoder = parts["decoder"].module
    assert decoder is not None
    assert {id(parameter) for parameter in decoder.parameters()} == shared


def test_what_cannot_be_split(tmp_path: Path) -> None:
    _, model = loaded(ENCODER_DECODERS["marian"], tmp_path)
    with pytest.raises(UsageError, match="doesn't write"):
        split(replace(model, generation=None))
    with pytest.raises(UsageError, match="0 sequences"):
        split(model, beams=0)
    with pytest.raises(UsageError, match="no methods encode"):
        split(replace(model, module=torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("family", ["marian", "llama"])
def test_the_whole_network_has_dynamic_lengths_for_tracers(family: str, tmp_path: Path) -> None:
    _, model = loaded({**ENCODER_DECODERS, **DECODERS}[family], tmp_path)
    assert model.module is not None
    dims = {
        entry.name: torch.export.Dim(entry.name, min=entry.min, max=entry.max)
        for spec in model.inputs
        for entry in spec.shape
        if isinstance(entry, Dim)
    }
    shapes = tuple({1: dims[str(getattr(spec.shape[1], "name", ""))]} for spec in model.inputs)
    examples = tuple(torch.from_numpy(model.example_inputs[spec.name]) for spec in model.inputs)
    program = torch.export.export(model.module, examples, dynamic_shapes=shapes, strict=False).module()
    shorter = tuple(tensor[:, :5] for tensor in examples)
    assert close(program(*shorter), model.module(*shorter))
