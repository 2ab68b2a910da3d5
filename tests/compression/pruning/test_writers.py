"""Pruning of networks that write: what is left must still be one network, token by token as well as teacher-forced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from edgeopt.compression.base import PassInputs
from edgeopt.compression.cost import parameters_of
from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.pruning.groups import Prunable
from edgeopt.compression.pruning.importance import unit_scores
from edgeopt.compression.pruning.removal import remove_units
from edgeopt.compression.pruning.statistics import ScoringData
from edgeopt.compression.sparsity.passes import Sparsification
from edgeopt.generation.parts import split
from edgeopt.layer_names import strip_wrapper
from edgeopt.progress import Silent
from edgeopt.sources.generative_huggingface import TextToText
from edgeopt.sources.structure import PassThrough, load_model, save_model
from edgeopt.targets import load_target
from edgeopt.tuning.students import Family, Shape, floors_of
from edgeopt.types import Dim, Generation, LayerRules, Model, TensorSpec

VOCABULARY, WIDTH, SLOTS = 40, 32, 12


def marian() -> nn.Module:
    return MarianMTModel(MarianConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        scale_embedding=True, static_position_embeddings=True, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, forced_eos_token_id=None,
    ))  # fmt: skip


def bart() -> nn.Module:
    return BartForConditionalGeneration(BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
    ))  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ))  # fmt: skip


FAMILIES = {"marian": marian, "bart": bart, "t5": t5}


def model_of(build: Callable[[], nn.Module]) -> Model:
    torch.manual_seed(0)
    network = build().eval()
    network.set_attn_implementation("eager")  # type: ignore[operator]
    source, target = Dim("source", 2, 24), Dim("target", 2, SLOTS)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, 9))
    return Model(
        name="writer",
        module=TextToText(network).eval(),
        native=None,
        inputs=(
            TensorSpec("input_ids", (1, source), "int64", padding=0),
            TensorSpec("attention_mask", (1, source), "int64", padding=0),
            TensorSpec("decoder_input_ids", (1, target), "int64", padding=0),
        ),
        outputs=(TensorSpec("logits", (1, target, VOCABULARY), "float32"),),
        example_inputs={"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": ids[:, :7]},
        preprocessing=None,
        labels=(),
        history=(),
        source_sha256="0" * 64,
        generation=Generation("encoder-decoder", "translation", VOCABULARY, (0,), (1,), 0, 24, SLOTS, 2),
    )


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> Model:
    return model_of(FAMILIES[request.param])


def step_by_step(model: Model, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a given target: all at once, and through the encoder, a memory and a cache."""
    adapter = model.module
    assert isinstance(adapter, TextToText)
    source = torch.from_numpy(np.random.default_rng(1).integers(3, VOCABULARY, (1, 9)))
    mask = torch.tensor([[1] * 7 + [0] * 2])
    with torch.no_grad():
        whole = adapter(source, mask, target)
        memory = adapter.encode(source, mask)
        past = tuple(
            rows.new_zeros(*rows.shape[:2], SLOTS, rows.shape[3]) for rows in adapter.rows(target, mask, memory)
        )
        steps = []
        for position in range(target.shape[1]):
            logits, present = adapter.decode(
                target[:, position : position + 1], torch.tensor([position]), mask, memory, past
            )
            for rows, row in zip(past, present, strict=True):
                rows[:, :, position : position + 1] = row
            steps.append(logits)
    return whole, torch.stack(steps, dim=1)


def whole_of(model: Model, target: torch.Tensor) -> torch.Tensor:
    assert model.module is not None
    with torch.no_grad():
        logits: torch.Tensor = model.module(target, torch.ones_like(target), target)
    return logits


def agree(model: Model) -> bool:
    whole, steps = step_by_step(model, torch.tensor([[0, 5, 9, 4, 30, 12]]))
    return torch.allclose(whole, steps, atol=1e-5)


def family_of(model: Model, prunable: Prunable) -> Family:
    layered = replace(prunable, groups=tuple(group for group in prunable.groups if group.kind != "blocks"))
    scores = unit_scores(model, layered, "l2", ScoringData(), 0, Silent())
    return Family(model, prunable, scores, 8, floors_of(prunable))


def test_heads_that_differ_by_layer_write_as_the_whole_network_does(model: Model) -> None:
    prunable = analyse(model, ("heads",), ())
    plan = {group.name: (0,) if index % 2 else (0, 2) for index, group in enumerate(prunable.groups)}
    pruned = remove_units(model, prunable, plan)
    assert agree(pruned)
    assert parameters_of(pruned) < parameters_of(model)


def test_feed_forward_channels_go(model: Model) -> None:
    prunable = analyse(model, ("channels",), ())
    narrow = {group.name: tuple(range(0, 64, 2)) for group in prunable.groups if group.units == 64}
    assert len(narrow) == 4, "one in each layer"
    assert agree(remove_units(model, prunable, narrow))


def test_a_narrower_student_keeps_its_embeddings_tied(model: Model) -> None:
    prunable = analyse(model, ("channels", "heads"), ())
    student = family_of(model, prunable).student(Shape(0.5, 1.0))
    assert agree(student)
    assert student.module is not None
    network = student.module.edgeopt_model
    assert network.lm_head.weight.shape == (VOCABULARY, WIDTH // 2)
    tables = [network.get_encoder().embed_tokens, network.get_decoder().embed_tokens, network.lm_head]
    assert len({id(table.weight) for table in tables}) == 1


def test_a_shallower_student_has_a_smaller_cache(model: Model, tmp_path: Path) -> None:
    student = family_of(model, analyse(model, ("channels", "heads", "blocks"), ())).student(Shape(0.75, 0.5))
    assert agree(student)
    decoder = split(student)["decoder"]
    assert [spec.name for spec in decoder.outputs] == ["logits", "present_key_0", "present_value_0"]
    assert student.module is not None
    assert model.module is not None
    save_model(student.module, model.module, tmp_path / "student.safetensors")
    again = copy.deepcopy(model.module)
    load_model(again, tmp_path / "student.safetensors")
    target = torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        assert torch.equal(again(target, torch.ones_like(target), target), whole_of(student, target))


def test_the_heads_of_one_position_bias_go_from_all_layers() -> None:
    model = model_of(t5)
    heads = analyse(model, ("heads",), ()).groups
    assert [strip_wrapper(group.name).rpartition(".")[0] for group in heads] == [
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
    ]
    layers = {strip_wrapper(layer) for layer in heads[0].layers}
    assert "encoder.block.1.layer.0.SelfAttention.q" in layers
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias" in layers


def test_a_removed_block_hands_on_what_others_made() -> None:
    """T5's later layers get the position bias from the first one, through all those between."""
    model = model_of(t5)
    blocks = [group for group in analyse(model, ("blocks",), ()).groups if group.name.endswith("decoder.block.1")]
    pruned = remove_units(model, Prunable(tuple(blocks), ()), {blocks[0].name: (0,)})
    assert pruned.module is not None
    passing = pruned.module.edgeopt_model.decoder.block[1]
    assert isinstance(passing, PassThrough)
    hidden, bias, cross = torch.ones(1), torch.ones(2), torch.ones(3)
    assert passing(hidden, None, bias, None, None, cross) == (hidden, bias, cross)


def test_a_protected_layer_of_a_shared_bias_keeps_all_heads() -> None:
    groups = analyse(model_of(t5), ("heads",), ("encoder.block.1.*",)).groups
    assert not any(strip_wrapper(group.name).startswith("encoder") for group in groups)


def test_position_tables_that_never_learn_become_narrower_too() -> None:
    """Marian looks its positions up under no_grad, where no gradient tells that they share the width."""
    prunable = analyse(model_of(marian), ("channels",), ())
    layers = {strip_wrapper(layer) for layer in prunable.groups[0].layers}
    assert {"model.encoder.embed_positions", "model.decoder.embed_positions"} <= layers


def test_zeros_spare_the_embeddings(model: Model) -> None:
    """A row of the table is one word: that of the output is the same tensor, and has no weights to spare."""
    target = load_target("android-fp32")
    inputs = PassInputs(target.scheme, None, 0, 0, Silent(), target.estimator, LayerRules())
    sparse = Sparsification(to=0.4).apply(model, inputs)
    assert sparse.module is not None
    assert bool((sparse.module.edgeopt_model.lm_head.weight[1:] != 0).all()), "row 0 is the padding"
    assert sparse.history[-1].config["zeros"] == pytest.approx(0.4, abs=1e-3)
    assert agree(sparse)
