"""Networks of the user's own that write, and how Hugging Face's settings become those of a loop."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from edgeopt.errors import ConversionError, UsageError
from edgeopt.generation.parts import split
from edgeopt.sources import ModelSpec, SourceOptions, load_model
from edgeopt.sources.generative import cache_shapes, check_writer, writer_of
from edgeopt.types import Dim, Generation, Model, TensorSpec, TextPreprocessing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DOCUMENTED = Path(__file__).parents[2] / "docs" / "sources-writing.md"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """What the factory of the page on networks that write returns."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTED.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {"__name__": "documented"}
    exec(next(block for block in blocks if "def decode" in block), names)
    make = names["make"]
    assert callable(make)
    torch.manual_seed(0)
    made = make()
    assert isinstance(made, ModelSpec)
    return made


def documented(spec: ModelSpec) -> Model:
    return load_model(spec, SourceOptions())


def test_the_documented_network_is_taken_as_it_is(spec: ModelSpec) -> None:
    model = documented(spec)
    assert model.generation is not None
    assert model.module is spec.module
    assert model.generation.vocabulary == model.outputs[0].shape[-1]
    parts = split(model)
    assert [*parts] == ["encoder", "decoder"]
    assert [s.name for s in parts["decoder"].inputs] == [
        "token", "position", "source_mask", "memory_key_0", "memory_value_0", "past_key_0", "past_value_0",
    ]  # fmt: skip
    decoder = parts["decoder"].module
    assert decoder is not None
    assert [n for n, _ in decoder.named_parameters()] == [n for n, _ in spec.module.named_parameters()]


def test_a_network_that_forgets_is_found_out(spec: ModelSpec) -> None:
    kind = type(spec.module)

    class Forgetful(kind):  # type: ignore[misc, valid-type]
        def decode(self, token, position, source_mask, memory, past):  # type: ignore[no-untyped-def]
            return super().decode(token, position, source_mask, memory, tuple(torch.zeros_like(p) for p in past))

    torch.manual_seed(0)
    with pytest.raises(ConversionError, match="other logits token by token"):
        load_model(replace(spec, module=Forgetful()), SourceOptions())


def test_what_the_methods_lack_is_one_line(spec: ModelSpec) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = spec.module

        def forward(self, input_ids: torch.Tensor, mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(input_ids, mask, target)
            return logits

    plain = Plain()
    with pytest.raises(UsageError, match=r"has no methods encode\(\) and decode\(\)") as caught:
        load_model(replace(spec, module=plain), SourceOptions())
    assert "docs/sources-writing.md" in caught.value.line()

    class Broken(type(spec.module)):  # type: ignore[misc]
        def decode(self, *inputs):  # type: ignore[no-untyped-def]
            del inputs
            raise RuntimeError("no ears\nat all")

    with pytest.raises(UsageError, match=r"can't be run token by token: no ears$"):
        load_model(replace(spec, module=Broken()), SourceOptions())

    static = tuple(replace(s, shape=(1, 6)) for s in spec.inputs or ())
    with pytest.raises(UsageError, match="dynamic length"):
        load_model(replace(spec, inputs=static), SourceOptions())


def test_caches_may_differ_from_the_memory(spec: ModelSpec) -> None:
    model = documented(spec)
    generation = model.generation
    assert generation is not None

    class Rows(torch.nn.Module):
        def encode(self, *source: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return source

        def decode(self) -> None: ...

        def rows(self, ids: torch.Tensor, *_: object) -> tuple[torch.Tensor, ...]:
            return (torch.zeros(1, 3, ids.shape[1], 5),) * 2

    memory = (torch.zeros(1, 2, 6, 4),) * 2
    assert cache_shapes(Rows(), generation, memory, None) == ((3, 5), (3, 5))
    assert cache_shapes(spec.module, generation, memory, None) == ((2, 4), (2, 4))
    with pytest.raises(ValueError, match="no network that writes"):
        check_writer(replace(model, generation=None))
    assert writer_of(model.module, generation) is model.module


def test_tokens_that_are_none_of_the_vocabulary(spec: ModelSpec) -> None:
    """Configurations of small networks keep the large ones' end token, which would never come."""
    model = documented(spec)
    assert model.generation is not None
    beyond = replace(model.generation, end_ids=(50256,))
    with pytest.raises(UsageError, match=r"names 50256 as its end token, and its vocabulary has \d+"):
        check_writer(replace(model, generation=beyond))


transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

SIZES = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 0, "decoder_start_token_id": 3,
}  # fmt: skip
CAUSAL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": [2, 4],
}  # fmt: skip


def marian(**settings: object) -> PreTrainedModel:
    sizes = SIZES | {"max_position_embeddings": 40} | settings
    return transformers.MarianMTModel(transformers.MarianConfig(**sizes))


def saved(network: PreTrainedModel, folder: Path, **settings: object) -> Path:
    """On disk, with more in generation_config.json."""
    network.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def loaded(folder: Path, **options: object) -> Model:
    return load_model(f"hf:{folder}", SourceOptions(**options))  # type: ignore[arg-type]


def generation(model: Model) -> Generation:
    assert model.generation is not None
    return model.generation


def test_the_settings_of_a_translator(tmp_path: Path) -> None:
    folder = saved(marian(), tmp_path / "net", eos_token_id=[2, 5], bad_words_ids=[[1], [7, 8]], forced_bos_token_id=9)
    (folder / "tokenizer.json").write_text("{}")
    model = loaded(folder)
    found = generation(model)
    assert (found.kind, found.task, found.layers, found.vocabulary) == ("encoder-decoder", "translation", 1, 60)
    assert (found.start_ids, found.end_ids, found.pad_id) == ((3, 9), (2, 5), 1)
    assert found.suppressed_ids == (1,)
    assert (found.max_source, found.max_target) == (40, 40)
    assert [(s.name, s.shape, s.padding) for s in model.inputs] == [
        ("input_ids", (1, Dim("source", 2, 40)), 1),
        ("attention_mask", (1, Dim("source", 2, 40)), 0),
        ("decoder_input_ids", (1, Dim("target", 2, 40)), 1),
    ]
    assert model.outputs == (TensorSpec("logits", (1, Dim("target", 2, 40), 60), "float32"),)
    assert model.preprocessing == TextPreprocessing(
        str(folder / "tokenizer.json"), 40, "none", ("source",), target_key="target", target_max_length=40,
        start_ids=(3, 9),
    )  # fmt: skip
    other = saved(marian(), tmp_path / "other", forced_bos_token_id=10)
    assert loaded(other).source_sha256 != model.source_sha256
    short = generation(loaded(folder, max_source_length=6, max_target_length=5))
    assert (short.max_source, short.max_target) == (6, 5)


def test_lengths_that_cannot_be(tmp_path: Path) -> None:
    folder = saved(marian(), tmp_path, forced_bos_token_id=9)
    with pytest.raises(UsageError, match="--max-source-length: 41 is more than the model reads"):
        loaded(folder, max_source_length=41)
    with pytest.raises(UsageError, match="--max-target-length: 2 is too short"):
        loaded(folder, max_target_length=2)
    with pytest.raises(UsageError, match="has the inputs that its loop gives it"):
        loaded(folder, inputs=(TensorSpec("input_ids", (1, 8), "int64"),))


def test_tasks_and_prefixes(tmp_path: Path) -> None:
    tasks = {
        "summarization": {"prefix": "summarize: "},
        "translation_en_to_de": {"prefix": "to German: "},
        "translation_en_to_fr": {"prefix": "to French: "},
    }
    config = transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    config.task_specific_params = tasks
    folder = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    (folder / "tokenizer.json").write_text("{}")

    def prefix(task: str | None) -> tuple[str, str]:
        model = loaded(folder, task=task)
        assert isinstance(model.preprocessing, TextPreprocessing)
        return generation(model).task, model.preprocessing.prefix

    assert prefix(None) == ("text2text-generation", "")
    assert prefix("summarization") == ("summarization", "summarize: ")
    assert prefix("translation") == ("translation", "")
    assert prefix("translation_en_to_fr") == ("translation", "to French: ")
    assert generation(loaded(folder)).max_source == 128


def test_the_prompt_of_whisper(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        **SIZES, num_mel_bins=8, max_source_positions=10, max_target_positions=16, suppress_tokens=[5, 6]
    )
    network = transformers.WhisperForConditionalGeneration(config)
    languages = {"<|en|>": 50, "<|de|>": 51}
    many = {
        "is_multilingual": True, "lang_to_id": languages, "task_to_id": {"transcribe": 52, "translate": 53},
        "no_timestamps_token_id": 54, "begin_suppress_tokens": [7],
    }  # fmt: skip
    model = loaded(saved(network, tmp_path / "many", **many))
    assert generation(model).start_ids == (3, 50, 52, 54)
    assert (generation(model).suppressed_ids, generation(model).begin_suppressed_ids) == ((5, 6), (7,))
    assert (generation(model).task, generation(model).max_source) == ("speech-recognition", 20)
    assert (model.inputs[0].name, model.inputs[0].shape) == ("input_features", (1, 8, 20))
    german = loaded(saved(network, tmp_path / "german", **many, language="de", task="translate"))
    assert generation(german).start_ids == (3, 51, 53, 54)
    forced = {"forced_decoder_ids": [[1, None], [2, 52]], "lang_to_id": languages, "no_timestamps_token_id": 54}
    assert generation(loaded(saved(network, tmp_path / "forced", **forced))).start_ids == (3, 50, 52, 54)
    with pytest.raises(UsageError, match="recordings of one length"):
        loaded(tmp_path / "many", max_source_length=10)


def test_a_language_model(tmp_path: Path) -> None:
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CAUSAL))
    folder = saved(network, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    model = loaded(folder, max_target_length=20)
    found = generation(model)
    assert (found.kind, found.task, found.end_ids) == ("decoder", "text-generation", (2, 4))
    assert (found.max_source, found.max_target) == (10, 20)
    assert [(s.name, s.shape) for s in model.inputs] == [("input_ids", (1, Dim("target", 2, 20)))]
    assert model.preprocessing == TextPreprocessing(
        str(folder / "tokenizer.json"), 20, "none", ("text",), target_key="text", target_max_length=20
    )
    with pytest.raises(UsageError, match="--max-source-length: 20 is more"):
        loaded(folder, max_target_length=20, max_source_length=20)


def test_what_no_cache_of_rows_holds(tmp_path: Path) -> None:
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**CAUSAL, rope_parameters=stretched)
    folder = saved(transformers.LlamaForCausalLM(config), tmp_path / "rope")
    with pytest.raises(ConversionError, match="'dynamic' rotary positions"):
        loaded(folder)
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    folder = saved(transformers.MambaForCausalLM(config), tmp_path / "mamba", eos_token_id=2)
    with pytest.raises((ConversionError, UsageError), match=r"mamba|token by token|keys and values"):
        loaded(folder)


def test_a_factory_may_return_the_network_alone() -> None:
    network = marian(attn_implementation="sdpa")
    model = load_model(ModelSpec(network), SourceOptions(name="net", max_source_length=8, max_target_length=6))
    assert (generation(model).max_source, generation(model).max_target, model.name) == (8, 6, "net")
    assert network.config._attn_implementation == "eager"
    assert model.history[0].config["source"] == "python"
    assert [*split(model)] == ["encoder", "decoder"]
    prepared = TextPreprocessing("tokenizer.json", target_key="target")
    assert load_model(ModelSpec(network, preprocessing=prepared), SourceOptions()).preprocessing == prepared


def test_lengths_are_for_writers(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="--max-source-length goes with a network that writes"):
        loaded(tmp_path, max_source_length=8)
