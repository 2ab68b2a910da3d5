from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from edgeopt.generation.search import Beam, Forced, Greedy, Replay, Rules, Search, search_for

Scores = Callable[[tuple[int, ...]], np.ndarray]


def rules(**changes: object) -> Rules:
    return replace(Rules(end_ids=(0,), suppressed_ids=(), begin_suppressed_ids=(), max_new=8), **changes)


def random_scores(vocabulary: int, seed: int = 0, end_bias: float = 0.0) -> Scores:
    """Scores that depend on everything that was written before."""

    def scores(prefix: tuple[int, ...]) -> np.ndarray:
        values = np.random.default_rng([seed, *prefix]).normal(0, 2, vocabulary).astype(np.float32)
        values[0] += end_bias
        return values

    return scores


def run(search: Search, scores: Scores) -> tuple[tuple[int, ...], list]:
    """Write without a cache: each row's whole sequence is kept here, moved as the search says."""
    sequences = [()] * search.width
    steps = []
    while True:
        steps.append(search.advance(np.stack([scores(sequence) for sequence in sequences])))
        if search.done:
            return search.ids, steps
        last = steps[-1]
        sequences = [(*sequences[parent], token) for token, parent in zip(last.tokens, last.parents, strict=True)]


def every_sequence(scores: Scores, vocabulary: int, most: int) -> list[tuple[float, tuple[int, ...]]]:
    """(log probability, ids) of all that end with 0 or have `most` tokens."""
    found, open_ones = [], [(0.0, ())]
    while open_ones:
        total, prefix = open_ones.pop()
        values = scores(prefix).astype(np.float64)
        likely = values - np.log(np.exp(values).sum())
        for token in range(vocabulary):
            sequence = (total + likely[token], (*prefix, token))
            (found if token == 0 or len(prefix) + 1 == most else open_ones).append(sequence)
    return found


def test_greedy_takes_the_likeliest_token_until_the_end() -> None:
    wanted = [3, 1, 2, 0]
    ids, steps = run(Greedy(rules()), lambda prefix: np.eye(5, dtype=np.float32)[wanted[len(prefix)]])
    assert ids == (3, 1, 2, 0)
    assert [step.choices for step in steps] == [(3,), (1,), (2,), (0,)]


def test_of_equal_tokens_the_lower_id_is_written() -> None:
    assert run(Greedy(rules(max_new=1)), lambda _: np.array([0, 1, 1], np.float32))[0] == (1,)


def test_the_most_tokens_are_kept() -> None:
    assert run(Greedy(rules(max_new=3)), lambda _: np.array([0, 1], np.float32))[0] == (1, 1, 1)
    assert len(run(Beam(rules(max_new=3), 2), random_scores(9, end_bias=-50))[0]) == 3


@pytest.mark.parametrize("beams", [1, 3])
def test_suppressed_tokens_are_not_written(beams: int) -> None:
    limited = rules(suppressed_ids=(3,), begin_suppressed_ids=(4,), max_new=3)
    ids, _ = run(search_for(limited, beams), lambda _: np.array([0, 1, 2, 9, 8], np.float32))
    assert ids[0] == 2
    assert 3 not in ids
    assert ids[1:] == (4, 4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beams_find_the_best_of_all_sequences(length_penalty: float, seed: int) -> None:
    """With as many beams as there are prefixes nothing is pruned, and the search is exhaustive."""
    vocabulary, most = 4, 3
    scores = random_scores(vocabulary, seed)
    ids, _ = run(Beam(rules(max_new=most, length_penalty=length_penalty), 27), scores)
    worth = {ids: total / len(ids) ** length_penalty for total, ids in every_sequence(scores, vocabulary, most)}
    assert ids == max(worth, key=worth.__getitem__)


def test_beams_may_beat_greedy() -> None:
    """The likeliest first token leads nowhere."""

    def scores(prefix: tuple[int, ...]) -> np.ndarray:
        match prefix:
            case ():
                return np.log(np.array([1e-6, 0.6, 0.4], np.float32))
            case (2,):
                return np.log(np.array([0.98, 0.01, 0.01], np.float32))
            case _:
                return np.log(np.array([0.34, 0.33, 0.33], np.float32))

    assert run(Greedy(rules()), scores)[0][0] == 1
    assert run(Beam(rules(), 2), scores)[0] == (2, 0)


def test_early_stopping_ends_no_later() -> None:
    for seed in range(5):
        scores = random_scores(12, seed, end_bias=1.0)
        patient = run(Beam(rules(max_new=20), 3), scores)[1]
        hasty = run(Beam(rules(max_new=20, early_stopping=True), 3), scores)[1]
        assert len(hasty) <= len(patient)


def test_a_vocabulary_smaller_than_the_beams() -> None:
    ids, _ = run(Beam(rules(max_new=4), 5), random_scores(2))
    assert 1 <= len(ids) <= 4


def test_equal_runs_give_equal_steps() -> None:
    scores = random_scores(30, 7)
    assert run(Beam(rules(), 4), scores) == run(Beam(rules(), 4), scores)


def test_replay_takes_the_same_steps_and_tells_other_choices() -> None:
    first, second = random_scores(10, 1), random_scores(10, 2)
    _, steps = run(Beam(rules(), 3), first)
    same, other = Replay(Beam(rules(), 3), steps), Replay(Beam(rules(), 3), steps)
    assert run(same, first)[1] == steps
    assert run(other, second)[1] == steps
    assert same.choices == [step.choices for step in steps]
    assert other.choices != same.choices


@pytest.mark.parametrize("beams", [1, 3])
def test_replay_forbids_at_the_first_token_only_what_may_not_begin_a_text(beams: int) -> None:
    limited = rules(begin_suppressed_ids=(0,))  # Whisper's end token among them
    scores = random_scores(6, 4, end_bias=3)
    _, steps = run(search_for(limited, beams), scores)
    again = Replay(search_for(limited, beams), steps)
    run(again, scores)
    assert again.choices == [step.choices for step in steps]
    assert 0 in {choice for choices in again.choices for choice in choices}


def test_forced_gives_the_likelihood_of_a_text() -> None:
    scores = random_scores(6, 3)
    search = Forced((2, 5, 0))
    run(search, scores)
    expected = []
    for length, token in enumerate((2, 5, 0)):
        values = scores((2, 5, 0)[:length]).astype(np.float64)
        expected.append(values[token] - np.log(np.exp(values).sum()))
    np.testing.assert_allclose(search.log_likelihoods, expected, atol=1e-5)


def marian() -> tuple[object, Callable]:
    import torch
    from transformers import MarianConfig, MarianMTModel

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.6}
    tokens = {"pad_token_id": 39, "eos_token_id": 0, "decoder_start_token_id": 39, "forced_eos_token_id": None}
    model = MarianMTModel(MarianConfig(vocab_size=40, max_position_embeddings=32, **sizes, **heads, **tokens)).eval()
    with torch.no_grad():
        model.final_logits_bias[0, 0] = 5  # so that sequences end here and there
    return model, lambda source, prefix: {"input_ids": source, "decoder_input_ids": torch.tensor([[39, *prefix]])}


def llama() -> tuple[object, Callable]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"pad_token_id": 39, "eos_token_id": 0, "bos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.8, **sizes, **tokens)).eval()
    return model, lambda source, prefix: {"input_ids": torch.cat([source, torch.tensor([prefix]).long()], 1)}


@pytest.mark.parametrize("network", [marian, llama])
@pytest.mark.parametrize(
    ("beams", "options"),
    [
        (1, {}),
        (4, {}),
        (4, {"length_penalty": 0.6, "early_stopping": True}),
        (3, {"length_penalty": 2.0, "suppress_tokens": [5, 6], "begin_suppress_tokens": [7]}),
        (2, {"eos_token_id": [0, 11, 12]}),
    ],
)
def test_agrees_with_transformers(network: Callable, beams: int, options: dict) -> None:
    """Small random networks, whose scores are computed anew from the whole prefix at each step."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = network()
    ours = rules(
        end_ids=tuple(options.get("eos_token_id", (0,))),
        suppressed_ids=(*options.get("suppress_tokens", ()), 39),
        begin_suppressed_ids=tuple(options.get("begin_suppress_tokens", ())),
        max_new=12,
        length_penalty=options.get("length_penalty", 1.0),
        early_stopping=options.get("early_stopping", False),
    )
    lengths = set()
    for seed in range(5):
        source = torch.randint(1, 38, (1, 6), generator=torch.Generator().manual_seed(seed))

        def scores(prefix: tuple[int, ...], source: object = source) -> np.ndarray:
            with torch.no_grad():
                return model(**inputs(source, prefix)).logits[0, -1].numpy()

        theirs = options | {"suppress_tokens": [*options.get("suppress_tokens", ()), 39]}
        mask = torch.ones_like(source)
        written = model.generate(
            source, attention_mask=mask, num_beams=beams, do_sample=False, max_new_tokens=12, **theirs
        )
        ids, _ = run(search_for(ours, beams), scores)
        start = 1 if network is marian else source.shape[1]
        assert list(ids) == written[0, start:].tolist()
        lengths.add(len(ids))
    assert min(lengths) < 12
