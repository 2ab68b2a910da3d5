"""Accuracy against measured int8 latency: latency-aware pruning, plain L1 in one shot, and random channels.

    python benchmarks/pruning.py DATA WORK_DIR [METHOD ...]

DATA and WORK_DIR as for fashion_resnet.py, which trains the network. METHOD: ours, l1 or random; all by default. Every
method trains for as many epochs in total, on the same pictures. Prints rows of a Markdown table, each as it is done.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from fashion_net import TRAINED_ON, Rows, pictures
from fashion_resnet import spec

from edgeopt.compression.steps import Goal, Prune
from edgeopt.config import RunConfig, config_of
from edgeopt.pipeline import export
from edgeopt.training.config import TrainingConfig
from edgeopt.types import Report

TRAINING, VALIDATION = 20_000, 2_000
TRAINING_CONFIG = TrainingConfig(
    epochs=3, batch_size=64, learning_rate=1e-3, freeze_batch_norm_after=0.7, mixed_precision="bf16"
)
LATENCIES = (0.8, 0.65, 0.5, 0.4, 0.3)
RATIOS = (0.15, 0.3, 0.45, 0.55, 0.65)
HEADER = """\
| method | asked for | MACs | parameters | int8 file | top-1, fp32 -> shipped | time by unpruned int8 | made in |
|---|---|---|---|---|---|---|---|"""


def steps(method: str) -> list[Prune]:
    if method == "ours":
        return [
            Prune(to=Goal("latency", share, is_share=True), schedule="one-shot", training=TRAINING_CONFIG)
            for share in LATENCIES
        ]
    importance = "l1" if method == "l1" else "random"
    return [
        Prune(
            to=Goal("ratio", ratio), importance=importance, scope="per-layer", multiple=1, schedule="one-shot",
            training=TRAINING_CONFIG,
        )
        for ratio in RATIOS
    ]  # fmt: skip


def main(data: Path, work: Path, methods: list[str]) -> None:
    images, labels = pictures(data, "train")
    held_out = slice(TRAINED_ON, TRAINED_ON + VALIDATION)
    base = replace(
        config_of({"target": ["android-int8"], "num_calibration_samples": 256}),
        model=spec(work),
        calibration=Rows(images[:1000], labels[:1000]),
        train=Rows(images[:TRAINING], labels[:TRAINING]),
        validation=Rows(images[held_out], labels[held_out]),
        evaluation=Rows(*pictures(data, "t10k")),
    )
    print(HEADER)
    for method in methods:
        for index, step in enumerate(steps(method)):
            start = time.monotonic()
            config = replace(base, step=(step,), output_dir=work / f"{method}-{index}")
            print(row(method, step, run(config), time.monotonic() - start), flush=True)


def run(config: RunConfig) -> Report:
    (bundle,) = export(config)
    return bundle.report


def row(method: str, step: Prune, report: Report, seconds: float) -> str:
    before, after = report.steps[0], report.steps[-1]
    top1 = {m.subject: m.value for m in report.measurements if m.name == "top1"}
    assert before.macs
    assert after.macs
    assert before.parameters
    assert after.parameters
    return (
        f"| {method} | {step.to.what} {step.to.value:g} | {after.macs / before.macs:.2f}x | "
        f"{after.parameters / before.parameters:.2f}x | {after.size_bytes / 1024:.0f} KiB | "
        f"{100 * top1['float']:.2f} -> {100 * top1['quantized']:.2f} % | {after.latency_ms / before.latency_ms:.2f}x "
        f"({after.latency_ms:.3f} ms) | {seconds / 60:.1f} min |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or ["ours", "l1", "random"])
