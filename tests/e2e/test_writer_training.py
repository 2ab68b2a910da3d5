"""Training a real encoder-decoder on pairs of different lengths: distillation, sequences of the teacher, QAT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeopt.compression.base import PassInputs, run_pass
from edgeopt.compression.distil.distil import Distillation
from edgeopt.compression.fine_tune import FineTuning
from edgeopt.compression.qat import QuantizationAwareTraining
from edgeopt.datasets import open_dataset
from edgeopt.datasets.base import Dataset
from edgeopt.progress import Silent
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.tuning.sequences import teacher_sequences
from edgeopt.types import (
    WRAPPED_ATTRIBUTE,
    Dim,
    EstimatorSpec,
    Format,
    Generation,
    LayerRules,
    Model,
    Sample,
    Scheme,
    TensorSpec,
)

pytestmark = pytest.mark.e2e

TOKENS, PAD, END = 40, 0, 1
SOURCE, TARGET = Dim("source", 2, 16), Dim("target", 2, 16)
INPUTS = (
    TensorSpec("input_ids", (1, SOURCE), "int64", padding=PAD),
    TensorSpec("attention_mask", (1, SOURCE), "int64", padding=0),
    TensorSpec("decoder_input_ids", (1, TARGET), "int64", padding=PAD),
)


def translator(width: int, layers: int, seed: int) -> Model:
    from transformers import MarianConfig, MarianMTModel

    from edgeopt.sources.generative_huggingface import TextToText

    torch.manual_seed(seed)
    network = MarianMTModel(
        MarianConfig(
            vocab_size=TOKENS, d_model=width, encoder_layers=layers, decoder_layers=layers,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            max_position_embeddings=32, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
            forced_eos_token_id=None, dropout=0.0, attn_implementation="eager", init_std=0.3,
        )
    )  # fmt: skip
    generation = Generation("encoder-decoder", "translation", TOKENS, (PAD,), (END,), PAD, 16, 16, layers)
    output = TensorSpec("logits", (1, TARGET, TOKENS), "float32")
    return Model(
        "translator", TextToText(network).eval(), None, INPUTS, (output,), dict(pairs()[0].inputs), None, (), (),
        "0" * 64, generation=generation,
    )  # fmt: skip


def pairs() -> Dataset:
    random = np.random.default_rng(0)
    items = []
    for length in random.integers(2, 12, 24):
        source = np.append(random.integers(3, TOKENS, length), END)
        target = source[::-1].copy()
        items.append(
            {"input_ids": source, "attention_mask": np.ones_like(source), "decoder_input_ids": target}
            | {"label": np.append(target[1:], END)[np.newaxis]}
        )
    return open_dataset(items, INPUTS, None)


def inputs(scheme: Scheme) -> PassInputs:
    data = pairs()

    def samples() -> Iterator[Sample]:
        return iter(data)

    return PassInputs(scheme, samples, len(data), 0, Silent(), EstimatorSpec("min-max"), LayerRules())


CONFIG = TrainingConfig(epochs=6, batch_size=8, learning_rate=1e-2)


def test_a_student_learns_from_layers_and_attention() -> None:
    student, data = translator(8, 1, 0), pairs()
    teaching = Teaching(
        loss="cross-entropy",
        features=("model.encoder.layers.0=model.encoder.layers.1", "model.decoder.layers.0=model.decoder.layers.1"),
        attention=True,
        label_smoothing=0.1,
    )
    pass_ = Distillation(translator(16, 2, 1), data, data, teaching, replace(CONFIG, mixed_precision="bf16"))
    made = run_pass(pass_, student, inputs(Scheme("fp32", "none")))
    assert made.generation == student.generation
    record = made.history[-1].config
    assert record["attention_maps"] == 3
    assert record["feature_pairs"] == 2
    assert record["label_smoothing"] == 0.1
    assert record["best_epoch"]


def test_fine_tuning_keeps_what_it_takes_to_write() -> None:
    model, data = translator(8, 1, 0), pairs()
    made = run_pass(
        FineTuning(data, data, CONFIG, Teaching(loss="cross-entropy", alpha=1.0)), model, inputs(Scheme("fp32", "none"))
    )
    assert made.generation == model.generation
    assert made.history[-1].config["best_epoch"]


def test_the_teacher_writes_what_transformers_would(tmp_path: Path) -> None:
    teacher, data = translator(16, 2, 1), pairs()
    assert teacher.module is not None
    network = teacher.module.get_submodule(WRAPPED_ATTRIBUTE)
    assert isinstance(network, nn.Module)
    for given, sample in zip(data, teacher_sequences(teacher, data, tmp_path, 5, Silent()), strict=True):
        ids, mask = (torch.from_numpy(given.inputs[name]) for name in ("input_ids", "attention_mask"))
        expected = network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False)  # type: ignore[operator]
        assert isinstance(sample.label, np.ndarray)
        assert sample.label[sample.label >= 0].tolist() == expected[0, 1:].tolist()


@pytest.mark.parametrize("format_", ["onnx", "litert", "executorch"])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_quantization_is_learned_on_pairs(format_: Format, activations: str) -> None:
    model, data = translator(8, 1, 0), pairs()
    scheme = Scheme("w8a8", "static" if activations == "static" else "dynamic")
    pass_ = QuantizationAwareTraining(
        format_, data, replace(CONFIG, epochs=1), data, loss="cross-entropy", learned=True, label_smoothing=0.1
    )
    made = run_pass(pass_, model, inputs(scheme))
    assert made.generation == model.generation
    layers = set(made.input_ranges)
    if activations == "static":
        assert {"model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.out_proj"} <= layers
    else:
        assert not layers
