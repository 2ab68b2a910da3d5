"""A trained MobileNetV3-style network on Fashion-MNIST: vendor default, plain int8, recipe auto and QAT, all formats.

    python benchmarks/fashion.py DATA WORK_DIR [TARGET ...]

DATA and WORK_DIR as for fashion_net.py, which trains the network. Prints a Markdown table.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from fashion_net import TRAINED_ON, Rows, pictures, spec
from measure import Figures, measure, model_file
from vendor_routes import build

from edgeopt.compression.steps import Qat
from edgeopt.config import RunConfig, config_of
from edgeopt.pipeline import export
from edgeopt.training.config import TrainingConfig
from edgeopt.types import Bundle, Sample

CALIBRATION, TUNING, TRAINING, VALIDATION = 256, 512, 10_000, 2_000
VENDOR = {
    "android-int8": ("litert", ".tflite"),
    "android-onnx-int8": ("onnx", ".onnx"),
    "android-executorch-int8": ("executorch", ".pte"),
}
#: One scale per weight tensor, which hardware without per-channel requantization needs.
PER_TENSOR = """\
extends = "android-onnx-int8"
summary = "per-tensor weights"
[scheme]
weight-granularity = "per-tensor"
"""
HEADER = """\
| target | file | top-1 (fp32 {fp32:.2f} %) | agrees with fp32 | SQNR | time, float / int8 | MiB | made in |
|---|---|---|---|---|---|---|---|"""


def main(data: Path, work: Path, targets: list[str]) -> None:
    images, labels = pictures(data, "train")
    calibration = Rows(images[: CALIBRATION + TUNING], labels[: CALIBRATION + TUNING])
    training = Rows(images[1000 : 1000 + TRAINING], labels[1000 : 1000 + TRAINING])
    held_out = slice(TRAINED_ON, TRAINED_ON + VALIDATION)
    validation = Rows(images[held_out], labels[held_out])
    tests = Rows(*pictures(data, "t10k"))
    samples = [Sample(*tests[i], str(i)) for i in range(len(tests))]
    network = spec("v3", work)
    per_tensor = work / "onnx-int8-per-tensor.toml"
    per_tensor.write_text(PER_TENSOR)

    def config(target: str, name: str, recipe: str) -> RunConfig:
        given = {
            "target": [target],
            "recipe": [recipe],
            "num_calibration_samples": CALIBRATION,
            "output_dir": work / name,
            "num_evaluation_samples": 1000,
        }
        return replace(config_of(given), model=network, calibration=calibration, evaluation=tests)

    step = Qat(training=TrainingConfig(epochs=2, batch_size=64, learning_rate=2e-4, freeze_batch_norm_after=0.0))

    def trained(target: str) -> RunConfig:
        return replace(config(target, "qat", "none"), step=(step,), train=training, validation=validation)

    print(HEADER.format(fp32=90.85))
    for target in targets or (*VENDOR, str(per_tensor)):
        name = Path(target).stem
        plain = _timed(lambda: export(config(target, "plain", "none"))[0])  # noqa: B023
        if target in VENDOR:
            route, suffix = VENDOR[target]
            path = work / (route + suffix)
            feeds = [{"image": images[i : i + 1]} for i in range(CALIBRATION)]
            build(route, network.module, torch.zeros(1, 1, 32, 32), feeds, path)
            print(_row(name, f"vendor: {route}", measure(path, plain[0], samples), None), flush=True)
        print(_row(name, "plain", measure(model_file(plain[0]), plain[0], samples), plain[1]), flush=True)
        for file, made in (
            ("--recipe auto", lambda: export(config(target, "auto", "auto"))[0]),  # noqa: B023
            ("QAT", lambda: export(trained(target))[0]),  # noqa: B023
        ):
            bundle, seconds = _timed(made)
            print(_row(name, file, measure(model_file(bundle), bundle, samples), seconds), flush=True)


def _timed(make: object) -> tuple[Bundle, float]:
    start = time.monotonic()
    assert callable(make)
    return make(), time.monotonic() - start


def _row(target: str, file: str, figures: Figures, seconds: float | None) -> str:
    return (
        f"| {target} | {file} | {100 * figures.metric:.2f} % | {100 * figures.agreement:.2f} % | {figures.sqnr_db:.1f} "
        f"dB | {figures.speedup:.2f}x | {figures.mib:.2f} | {'' if seconds is None else f'{seconds:.0f} s'} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
