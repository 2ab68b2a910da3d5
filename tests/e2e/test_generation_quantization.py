"""The decoder of a network that writes, quantized: near the float one in each runtime, and without slow detours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeopt.exporter import load_exporter
from edgeopt.exporter.base import CalibrationRun, QuantizationRequest
from edgeopt.formats import summarize
from edgeopt.generation.parts import split
from edgeopt.generation.samples import part_dataset
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.sources.generative_huggingface import TextToText
from edgeopt.types import Artifact, Dim, EstimatorSpec, Format, Generation, Model, Sample, Scheme, TensorSpec

pytestmark = pytest.mark.e2e
transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

VOCABULARY, SOURCE, TARGET = 400, 8, 8
DYNAMIC, STATIC = Scheme("w8a8", "dynamic"), Scheme("w8a8", "static")


class Sentences:
    """Any words; the network does not mind."""

    is_labelled = False
    class_names = ()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng(index)
        source, target = (random.integers(3, VOCABULARY, (1, random.integers(3, 8))) for _ in range(2))
        target[0, 0] = 0
        mask = np.ones_like(source)
        return Sample({"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}, None, f"{index}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        return "sentences"


@pytest.fixture(scope="module")
def decoder() -> tuple[Model, list[Sample]]:
    """Of a small Marian, whose embedding table is its last layer's weight too."""
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=16, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None, init_std=0.2,
    )  # fmt: skip
    source, target = Dim("source", 2, SOURCE), Dim("target", 2, TARGET)
    specs = (("input_ids", source), ("attention_mask", source), ("decoder_input_ids", target))
    inputs = tuple(TensorSpec(name, (1, dim), "int64", padding=0) for name, dim in specs)
    model = Model(
        "marian", TextToText(transformers.MarianMTModel(config).eval()), None, inputs,
        (TensorSpec("logits", (1, target, VOCABULARY), "float32"),), Sentences()[0].inputs, None, (), (), "0" * 64, {},
        Generation("encoder-decoder", "translation", VOCABULARY, (0,), (1,), 0, SOURCE, TARGET, 1),
    )  # fmt: skip
    parts = split(model)
    samples = list(part_dataset(model, "decoder", parts, Sentences(), 0))
    return replace(parts["decoder"], example_inputs=samples[0].inputs), samples


def sqnr_db(one: Artifact, other: Artifact, samples: list[Sample], tensor: str = "logits") -> float:
    """Of `other` against `one`, over all samples."""
    outputs = []
    for artifact in (one, other):
        with load_runtime(HOST_RUNTIMES[artifact.format]).open(artifact.path, artifact.signature, 1) as session:
            outputs.append(np.stack([session.run(sample.inputs)[tensor] for sample in samples]))
    return float(10 * np.log10((outputs[0] ** 2).sum() / ((outputs[0] - outputs[1]) ** 2).sum()))


@pytest.mark.parametrize("format_", ["litert", "onnx", "executorch"])
def test_int8_decoders_are_near_the_float_one(
    format_: Format, decoder: tuple[Model, list[Sample]], tmp_path: Path
) -> None:
    model, samples = decoder
    exporter = load_exporter(format_)
    twin = exporter.export_float(model, tmp_path)
    for scheme in (DYNAMIC, STATIC):
        run = CalibrationRun(lambda: iter(samples), len(samples), EstimatorSpec(), lambda _: None)
        request = QuantizationRequest(scheme, run if scheme.needs_calibration else None)
        directory = tmp_path / scheme.activations
        directory.mkdir()
        made = exporter.export_quantized(model, twin, request, directory)
        assert sqnr_db(twin, made, samples) > 20
        assert sqnr_db(twin, made, samples, "present_value_0") > 20
        assert made.size_bytes < 0.6 * twin.size_bytes
        slow = {op.type for op in summarize(made.path).ops if op.dtype == "float32"}
        assert not {"aten.expand_copy.out", "aten.full_like.out", "aten.mul.Scalar_out"} & slow
    if format_ == "onnx":
        table = VOCABULARY * 32 * 4
        assert twin.size_bytes < sum(p.nbytes for p in _own_parameters(model)) + table // 2


def _own_parameters(model: Model) -> list[torch.Tensor]:
    """What the decoder reads of the network's weights, each once."""
    assert model.module is not None
    named = {parameter.data_ptr(): (name, parameter) for name, parameter in model.module.named_parameters()}
    return [parameter for name, parameter in named.values() if ".encoder.layers" not in name]
