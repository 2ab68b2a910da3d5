"""EfficientNet-Lite0 pruned without labels: a latency-aware cut against an L1 cut of as many MACs.

    python benchmarks/pruning_efficientnet.py WORK_DIR [MACS]

Needs ../shared/data. The pictures of even classes train (their labels are not used), the others score. Prints rows of
a Markdown table. With MACS only the L1 cut to so many is made.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from imagenet_halves import split

from edgeopt.compression.steps import Goal, Prune
from edgeopt.config import RunConfig, config_of
from edgeopt.examples import EXAMPLES
from edgeopt.pipeline import export
from edgeopt.training.config import Teaching, TrainingConfig
from edgeopt.types import Report

LATENCY = 0.75
TRAINING = TrainingConfig(
    epochs=6, batch_size=16, learning_rate=3e-4, freeze_batch_norm_after=1.0, mixed_precision="bf16"
)
HEADER = """\
| cut | MACs | parameters | file | top-1, fp32 -> shipped | agrees with fp32 | SQNR | time by unpruned int8 | made in |
|---|---|---|---|---|---|---|---|---|"""


def main(work: Path, macs: int | None) -> None:
    even, odd = split(work)
    base = replace(
        config_of({"target": ["android-int8"], "num_calibration_samples": 128}),
        model=EXAMPLES["efficientnet-lite0"].model,
        calibration=str(even),
        train=str(even),
        evaluation=str(odd),
    )
    teaching = Teaching(loss="distillation", teacher_cache=work / "teacher")
    print(HEADER)
    aware = Prune(
        to=Goal("latency", LATENCY, is_share=True), schedule="one-shot", rounds=1, training=TRAINING, teaching=teaching
    )
    if macs is None:
        macs = run("latency-aware, Taylor", aware, base, work).steps[-1].macs
    assert macs is not None
    plain = replace(aware, to=Goal("macs", macs), importance="l1", scope="per-layer", multiple=1)
    run("plain L1, as many MACs", plain, base, work)


def run(name: str, step: Prune, base: RunConfig, work: Path) -> Report:
    start = time.monotonic()
    (bundle,) = export(replace(base, step=(step,), output_dir=work / name.split()[0].strip(",")))
    report, minutes = bundle.report, (time.monotonic() - start) / 60
    before, after = report.steps[0], report.steps[-1]
    figures = {(m.name, m.subject): m.value for m in report.measurements}
    assert before.macs
    assert after.macs
    assert before.parameters
    assert after.parameters
    print(
        f"| {name} | {after.macs / before.macs:.2f}x | {after.parameters / before.parameters:.2f}x | "
        f"{after.size_bytes / 2**20:.2f} MiB | {100 * figures['top1', 'float']:.1f} -> "
        f"{100 * figures['top1', 'quantized']:.1f} % | {100 * (after.agreement or 0):.1f} % | "
        f"{after.sqnr_db or 0:.1f} dB | "
        f"{after.latency_ms / before.latency_ms:.2f}x ({after.latency_ms:.2f} ms) | {minutes:.0f} min |",
        flush=True,
    )
    return report


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
