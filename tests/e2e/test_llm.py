"""The runtimes' own generators write, with files made here, what transformers writes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from edgeopt.calibration.weights import quantize_weight
from edgeopt.config import RunConfig
from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.generation.llm_executorch import executorch_model
from edgeopt.generation.llm_executorch_folder import write_executorch_llm
from edgeopt.generation.llm_genai import genai_model
from edgeopt.generation.llm_genai_folder import write_genai
from edgeopt.generation.llm_litert import convert_litert_lm, quantize_litert_lm
from edgeopt.generation.llm_litert_file import write_litert_lm
from edgeopt.generation.llm_steps import LiteRtSteps, executorch_logits, prompt_length
from edgeopt.llm_layouts import write_layouts
from edgeopt.runtimes import load_runtime
from edgeopt.sources import SourceOptions, load_model
from edgeopt.types import Artifact, Model, Scheme

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.e2e

LONGEST = 24
TEXT = "a dog likes"
WORDS = ("the cat sees a dog .", "a dog likes the bird .", "the bird hears a fish .", "a fish finds the cat .")


@dataclass(frozen=True)
class Case:
    network: torch.nn.Module
    model: Model
    prompt: list[int]
    folder: Path

    def written(self, beams: int = 1) -> list[int]:
        """Prompt and continuation, up to LONGEST tokens, by transformers."""
        with torch.no_grad():
            found = self.network.generate(
                torch.tensor([self.prompt]), max_length=LONGEST, do_sample=False, num_beams=beams
            )
        return [int(token) for token in found[0]]

    def logits(self) -> np.ndarray:
        """Behind the prompt's last token."""
        with torch.no_grad():
            return self.network(input_ids=torch.tensor([self.prompt])).logits[0, -1].numpy()

    def text(self, ids: list[int]) -> str:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        return "".join(tokenizer.decode([token], skip_special_tokens=False) for token in ids)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random network, with weights so wide that its tokens vary, and a byte-pair tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=64, special_tokens=special, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config).eval()
    network.save_pretrained(folder)
    model = load_model(f"hf:{folder}", SourceOptions(max_source_length=8, max_target_length=LONGEST))
    return Case(network, model, tokenizer.encode(TEXT).ids, folder)


@pytest.fixture(scope="module")
def exported(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """For onnxruntime-genai."""
    return load_exporter("onnx").export_float(genai_model(llama.model), tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def converted(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For LiteRT-LM."""
    path = tmp_path_factory.mktemp("litert") / "network.tflite"
    convert_litert_lm(llama.model, path)
    return path


def sqnr(expected: np.ndarray, got: np.ndarray) -> float:
    """dB."""
    return float(10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum()))


def rounded(case: Case, scheme: Scheme) -> Case:
    """The network with the weights of its layers on the scheme's grid."""
    network = copy.deepcopy(case.network)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            weight = quantize_weight(layer.weight.detach().numpy(), scheme, 0).dequantize()
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight))
    return replace(case, network=network)


def quantized(kind: str, form: Model, artifact: Artifact, scheme: Scheme, folder: Path) -> Artifact:
    request = QuantizationRequest(scheme=scheme, calibration=None)
    return load_exporter(kind).export_quantized(form, artifact, request, folder)


class TestGenai:
    def opened(self, folder: Path, ids: list[int], beams: int = 1) -> object:
        genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
        network = genai.Model(str(folder))
        parameters = genai.GeneratorParams(network)
        parameters.set_search_options(max_length=LONGEST, num_beams=beams)
        generator = genai.Generator(network, parameters)
        generator.append_tokens(np.array([ids], dtype=np.int32))
        return generator

    @pytest.mark.parametrize("beams", [1, 3])
    def test_writes_the_same_tokens(self, llama: Case, exported: Artifact, tmp_path: Path, beams: int) -> None:
        write_genai(llama.model, exported, tmp_path)
        generator = self.opened(tmp_path, llama.prompt, beams)
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0)) == llama.written(beams)

    def test_tokenizer_is_found(self, llama: Case, exported: Artifact, tmp_path: Path) -> None:
        genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
        write_genai(llama.model, exported, tmp_path)
        tokenizer = genai.Tokenizer(genai.Model(str(tmp_path)))
        assert list(tokenizer.encode(TEXT)) == llama.prompt

    @pytest.mark.parametrize(
        "scheme",
        [Scheme("w8", "none"), Scheme("w4", "none", "per-group", weight_symmetric=False, weight_estimator="mse")],
        ids=["w8", "w4"],
    )
    def test_integer_weights(self, llama: Case, exported: Artifact, tmp_path: Path, scheme: Scheme) -> None:
        """Nothing is lost but what rounding the weights loses, which in a random network is much."""
        artifact = quantized("onnx", genai_model(llama.model), exported, scheme, tmp_path)
        assert artifact.size_bytes < 0.6 * exported.size_bytes
        folder = tmp_path / "folder"
        folder.mkdir()
        write_genai(llama.model, artifact, folder)
        logits = np.asarray(self.opened(folder, llama.prompt).get_logits())[0, -1]
        assert sqnr(rounded(llama, scheme).logits(), logits) > 80
        assert sqnr(llama.logits(), logits) < 60

    def test_whole_command(self, llama: Case, tmp_path: Path) -> None:
        config = RunConfig(
            model=f"hf:{llama.folder}", target=("android-onnx-w4",), output_dir=tmp_path, max_source_length=8,
            max_target_length=LONGEST,
        )  # fmt: skip
        # Twice: the second takes the first one's place.
        first, second = (write_layouts(config)[0] for _ in range(2))
        assert first == second
        assert first.path == tmp_path / f"{llama.model.name}-android-onnx-w4-llm"
        assert {file.name for file in first.files} >= {"model.onnx", "genai_config.json", "tokenizer.json"}
        network = next(file for file in first.files if file.name == "model.onnx")
        assert network.size_bytes < 0.6 * network.float_bytes
        assert first.proof.sqnr_db is not None
        assert first.proof.sqnr_db > 3
        assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
        assert len(list(self.written(first.path, llama))) > len(llama.prompt)

    def written(self, folder: Path, llama: Case) -> list[int]:
        generator = self.opened(folder, llama.prompt)
        generator.generate_next_token()
        return list(generator.get_sequence(0))


class TestExecuTorch:
    def test_runner_writes_the_same_text(self, llama: Case, tmp_path: Path) -> None:
        runner = pytest.importorskip("executorch.extension.llm.runner", reason="executorch has no text runner here")
        artifact = load_exporter("executorch").export_float(executorch_model(llama.model), tmp_path)
        folder = tmp_path / "folder"
        folder.mkdir()
        write_executorch_llm(llama.model, artifact, folder)
        written: list[str] = []
        generator = runner.TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
        count = LONGEST - len(llama.prompt)
        settings = runner.GenerationConfig(echo=False, temperature=0.0, max_new_tokens=count)
        # Twice: the second text must not see what the first one left in the cache.
        for _ in range(2):
            written.clear()
            generator.reset()
            generator.generate(TEXT, settings, written.append)
            assert "".join(written) == llama.text(llama.written()[len(llama.prompt) :])

    @pytest.mark.parametrize(
        ("scheme", "decibels"),
        [
            (Scheme("w8a8", "dynamic"), 15),
            (Scheme("8da4w", "dynamic", "per-group", weight_estimator="mse"), 2),
        ],
        ids=["int8-dynamic", "8da4w"],
    )
    def test_integer_weights(self, llama: Case, tmp_path: Path, scheme: Scheme, decibels: float) -> None:
        """XNNPACK's partitioner used to find cycles around the cache's buffers."""
        form = executorch_model(llama.model)
        request = QuantizationRequest(scheme=scheme, calibration=None)
        artifact = load_exporter("executorch").export_quantized(form, Mock(spec=Artifact), request, tmp_path)
        ids = np.array([llama.prompt])
        with load_runtime("executorch").open(artifact.path, artifact.signature) as session:
            logits = executorch_logits(session, ids, ids.shape[1] - 1)[0, -1]
        assert sqnr(llama.logits(), logits) > decibels


class TestLiteRtLm:
    def test_prompt_in_chunks_then_steps(self, llama: Case, converted: Path) -> None:
        """As the executor runs it: the prompt's chunk is filled up with zeros, and the last token is a step."""
        ids, generation = np.array([llama.written()]), llama.model.generation
        assert generation is not None
        prompt = prompt_length(ids.shape[1], generation)
        logits = LiteRtSteps(converted, generation).logits(ids, prompt)
        with torch.no_grad():
            expected = llama.network(input_ids=torch.from_numpy(ids)).logits[:, prompt - 1 :].numpy()
        assert sqnr(expected, logits) > 80

    @pytest.mark.parametrize("scheme", [None, Scheme("w8a8", "dynamic")], ids=["fp32", "int8-dynamic"])
    def test_runtime_writes(self, llama: Case, converted: Path, tmp_path: Path, scheme: Scheme | None) -> None:
        pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")
        litert_lm = pytest.importorskip("litert_lm", reason="litert-lm-api is not installed")
        network = converted
        if scheme is not None:
            network = tmp_path / "quantized.tflite"
            quantize_litert_lm(converted, scheme, network)
            assert network.stat().st_size < 0.6 * converted.stat().st_size
        path = write_litert_lm(llama.model, network, tmp_path)
        engine = litert_lm.Engine(str(path), cache_dir=str(tmp_path), max_num_tokens=LONGEST)
        with (
            engine,
            engine.create_session(
                apply_prompt_template=False, sampler_config=litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0)
            ) as session,
        ):
            session.run_prefill([TEXT])
            text = session.run_decode().texts[0]
        expected = llama.text(llama.written()[len(llama.prompt) :])
        if scheme is None:
            assert text.strip()
            assert expected.strip().startswith(text.strip())
        else:
            assert text.strip()[:1] == expected.strip()[:1]
