"""`edgeopt export` of networks that write: from a Hugging Face folder to a proven bundle, in every runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgeopt
from edgeopt.bundle.generation_reader import open_generation_bundle
from edgeopt.case_studies.teacher import TeacherConfig, train_teacher, train_tokenizer
from edgeopt.errors import UsageError

pytestmark = pytest.mark.e2e

PAIRS = [
    (f"{who} {does} {what} .", f"{wer} {tut} {was} .")
    for who, wer in (("a man", "ein mann"), ("a woman", "eine frau"), ("the dog", "der hund"))
    for does, tut in (("sees", "sieht"), ("likes", "mag"), ("finds", "findet"))
    for what, was in (("a ball", "einen ball"), ("the house", "das haus"), ("the red hat", "den roten hut"))
]
LENGTHS = {"max_source_length": 16, "max_target_length": 16}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator that knows its sentences, and the sentences beside it."""
    folder = tmp_path_factory.mktemp("translator")
    config = TeacherConfig(
        vocabulary=60, width=32, layers=1, heads=2, feed_forward=64, epochs=60, tokens_per_batch=120, warmup_steps=20,
        lr=5e-3, dropout=0.0,
    )  # fmt: skip
    train_teacher(PAIRS, config, folder / "net")
    lines = (json.dumps({"source": source, "target": target}) for source, target in PAIRS)
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("target", ["android-int8-dynamic", "android-onnx-int8", "android-executorch-int8-dynamic"])
def test_what_the_files_write_is_judged_and_packed(translator: Path, tmp_path: Path, target: str) -> None:
    bundle = edgeopt.export(
        f"hf:{translator / 'net'}",
        target=target,
        calibration=str(translator / "pairs.jsonl"),
        evaluation=str(translator / "pairs.jsonl"),
        num_calibration_samples=8,
        num_evaluation_samples=8,
        min_accuracy_kept=0.9,
        min_speedup="off",
        output_dir=tmp_path,
        **LENGTHS,
    )
    checks = {check.name: check for check in bundle.report.checks}
    assert checks["accuracy_kept"].passed, checks
    measured = {(m.name, m.subject): m.value for m in bundle.report.measurements}
    assert measured["bleu", "float"] > 0.5
    assert {"tokens_per_second", "time_to_first_token_ms", "cache_bytes"} <= {name for name, _ in measured}
    read = open_generation_bundle(bundle.path)
    assert set(read.parts) == {"encoder", "decoder"}
    replayed = subprocess.run([sys.executable, "check_generation.py"], cwd=bundle.path, capture_output=True, text=True)
    assert replayed.returncode == 0, replayed.stderr


def test_a_language_model_whose_texts_are_longer_than_its_prompts(tmp_path: Path) -> None:
    """Half of the cache is the prompt's; texts fill all of it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    text = " ".join(source for source, _ in PAIRS[:4])
    tokenizer = train_tokenizer([text], 60)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_embd=16, n_layer=1, n_head=2, n_positions=24,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "net")
    tokenizer.save(str(tmp_path / "net" / "tokenizer.json"))
    (tmp_path / "texts.jsonl").write_text(2 * (json.dumps({"text": text}) + "\n"))
    bundle = edgeopt.export(
        f"hf:{tmp_path / 'net'}",
        target="android-onnx-int8-dynamic",
        evaluation=str(tmp_path / "texts.jsonl"),
        min_speedup="off",
        output_dir=tmp_path / "dist",
    )
    measured = {(m.name, m.subject) for m in bundle.report.measurements}
    assert {("perplexity", "float"), ("perplexity", "quantized"), ("prefill_latency_ms", "quantized")} <= measured
    read = open_generation_bundle(bundle.path)
    assert set(read.parts) == {"prefill", "decoder"}
    assert len(read.golden()) == 2
    replayed = subprocess.run([sys.executable, "check_generation.py"], cwd=bundle.path, capture_output=True, text=True)
    assert replayed.returncode == 0, replayed.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"target": "ethosu55-int8"}, "is for an accelerator"),
        ({"target": "android-int8-dynamic", "recipe": "auto"}, "is not searched for networks that write"),
        ({"target": "android-int8-dynamic", "metric": "blue"}, "did you mean bleu"),
    ],
)
def test_what_is_not_done_is_refused_before_any_work(
    translator: Path, tmp_path: Path, options: dict[str, str], problem: str
) -> None:
    data = str(translator / "pairs.jsonl")
    with pytest.raises(UsageError) as refused:
        edgeopt.export(
            f"hf:{translator / 'net'}", calibration=data, evaluation=data, output_dir=tmp_path / "out", **options,
            **LENGTHS,
        )  # fmt: skip
    assert problem in refused.value.line()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
