"""A causal transformer with attention heads and feed-forward neurons pruned, measured as dynamic int8 in LiteRT.

    python benchmarks/pruning_transformer.py WORK_DIR [CUT ...]

WORK_DIR as for caption_lm.py, which trains the network. CUT: see CUTS; all by default. Prints rows of a Markdown table;
accuracy is that of the next token.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from caption_lm import HEADS, LENGTH, PADDING, WIDTH, load, token_ids, tokenizer_of

from edgeopt.compression.steps import Goal, Prune
from edgeopt.config import config_of
from edgeopt.pipeline import export
from edgeopt.sources import ModelSpec
from edgeopt.training.config import TrainingConfig
from edgeopt.types import Array, TensorSpec

TRAINING, VALIDATION, TESTS = 12_000, 500, 500
METRIC = f"{Path(__file__).resolve()}:next_token"
STEP = Prune(
    schedule="one-shot",
    training=TrainingConfig(epochs=2, batch_size=32, learning_rate=5e-4, mixed_precision="bf16"),
)  # fmt: skip
CUTS = {
    # Embedding and output layer, and with them the residual stream, keep their width in the first two.
    "0.7x": replace(STEP, to=Goal("latency", 0.7, is_share=True), protect=("tokens", "head")),
    "heads": replace(STEP, to=Goal("ratio", 0.25), remove=("heads",), scope="per-layer"),
    "0.5x": replace(STEP, to=Goal("latency", 0.5, is_share=True)),
}
HEADER = """\
| asked for | heads and neurons left, by layer | MACs | parameters | file | next token, fp32 -> shipped | time by unpruned int8 | made in |
|---|---|---|---|---|---|---|---|"""  # noqa: E501  (a row of a table)


def next_token(outputs: dict[str, Array], label: Array) -> float:
    """Share of the words of one caption that are predicted."""
    return float((outputs["logits"][0].argmax(-1) == label)[label >= 0].mean())


class Captions:
    """Token ids by index, with the tokens that follow them; padding counts for nothing."""

    def __init__(self, tokens: Array) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> tuple[dict[str, Array], Array]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._tokens[index]
        return {"tokens": row[np.newaxis, :-1]}, np.where(row[1:] == PADDING, -100, row[1:])


def main(work: Path, cuts: list[str]) -> None:
    tokenizer = tokenizer_of(work)
    train = token_ids("train", tokenizer).numpy()
    spec = ModelSpec(
        module=load(work), inputs=(TensorSpec("tokens", (1, LENGTH), "int64"),), outputs=("logits",), name="caption-lm"
    )
    base = replace(
        config_of({"target": ["android-int8-dynamic"], "metric": METRIC}),
        model=spec,
        train=Captions(train[:TRAINING]),
        validation=Captions(train[-VALIDATION:]),
        evaluation=Captions(token_ids("test_2016_flickr", tokenizer)[:TESTS].numpy()),
    )
    print(HEADER)
    for name in cuts:
        start = time.monotonic()
        weights = work / f"pruned-{name}.safetensors"
        (bundle,) = export(replace(base, step=(CUTS[name],), output_dir=work / f"pruned-{name}", save_weights=weights))
        before, after = bundle.report.steps[0], bundle.report.steps[-1]
        assert before.macs
        assert after.macs
        assert before.parameters
        assert after.parameters
        figures = {m.subject: m.value for m in bundle.report.measurements if m.name.endswith("next_token")}
        print(
            f"| {name} | {left(weights)} | {after.macs / before.macs:.2f}x | "
            f"{after.parameters / before.parameters:.2f}x | {after.size_bytes / 2**20:.2f} MiB | "
            f"{100 * figures['float']:.2f} -> {100 * figures['quantized']:.2f} % | "
            f"{after.latency_ms / before.latency_ms:.2f}x ({after.latency_ms:.2f} ms) | "
            f"{(time.monotonic() - start) / 60:.0f} min |",
            flush=True,
        )


def left(weights: Path) -> str:
    """ "256: 4/1024 3/800": the residual stream's width, then heads and neurons of each layer."""
    from safetensors.torch import load_file

    state = load_file(weights)
    width = next(tensor.shape[1] for name, tensor in state.items() if name.endswith("query.weight"))
    size = WIDTH // HEADS
    layers = sorted({name.split(".")[1] for name in state if name.startswith("layers.")})
    return f"{width}: " + " ".join(
        f"{state[f'layers.{n}.query.weight'].shape[0] // size}/{state[f'layers.{n}.up.weight'].shape[0]}"
        for n in layers
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [*CUTS])
