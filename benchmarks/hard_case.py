"""Channels rescaled by up to 100, function unchanged: plain int8 against recipes, per-tensor and per-channel.

    python benchmarks/hard_case.py DATA WORK_DIR

EfficientNet-Lite0 on ImageNet pictures (../shared/data) and the ReLU network of fashion_net.py (DATA and WORK_DIR as
there). Prints a Markdown table.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fashion_net import Rows, pictures, spec
from imagenet_halves import split
from measure import Figures, measure, model_file
from rescaling import rescale_efficientnet_lite, rescale_fashion_v2
from vendor_routes import build

from edgeopt.config import config_of
from edgeopt.datasets import DataSource
from edgeopt.examples.efficientnet_lite0 import model as efficientnet
from edgeopt.pipeline import export
from edgeopt.plan import load, open_data, plan_jobs
from edgeopt.sources import ModelSpec
from edgeopt.types import Bundle, Sample

PER_TENSOR = """\
extends = "android-onnx-int8"
summary = "per-tensor weights"
[scheme]
weight-granularity = "per-tensor"
"""
RECIPES = ("none", "equalize", "equalize, correct-bias", "equalize, round-adaptively", "auto")
HEADER = """\
| network | weights | file | top-1 | fp32 | agrees with fp32 | SQNR | time, float / int8 |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Case:
    name: str
    healthy: ModelSpec
    rescaled: ModelSpec
    calibration: DataSource
    evaluation: DataSource


def cases(data: Path, work: Path) -> tuple[Case, Case]:
    even, odd = split(work / "pictures")
    lite = efficientnet()
    images, labels = pictures(data, "train")
    tests, answers = pictures(data, "t10k")
    v2 = spec("v2", work)
    return (
        Case(
            "EfficientNet-Lite0",
            lite,
            replace(lite, module=rescale_efficientnet_lite(lite.module)),
            str(even),
            str(odd),
        ),
        Case(
            "MobileNetV2-style",
            v2,
            replace(v2, module=rescale_fashion_v2(v2.module)),
            Rows(images[:512], labels[:512]),
            Rows(tests[:2000], answers[:2000]),
        ),
    )


def main(data: Path, work: Path) -> None:
    per_tensor = work / "onnx-int8-per-tensor.toml"
    per_tensor.write_text(PER_TENSOR)
    print(HEADER)
    for case in cases(data, work):
        for weights, target in (("per-tensor", str(per_tensor)), ("per-channel", "android-onnx-int8")):
            for recipe in RECIPES if weights == "per-tensor" else ("none", "equalize"):
                bundle, samples = _export(case, case.rescaled, target, recipe, work)
                name = "plain" if recipe == "none" else recipe
                _print(case, weights, f"rescaled, {name}", measure(model_file(bundle), bundle, samples))
                if recipe == "none":
                    _vendor(case, weights, bundle, samples, work)
            bundle, samples = _export(case, case.healthy, target, "none", work)
            _print(case, weights, "healthy, plain", measure(model_file(bundle), bundle, samples))


def _export(case: Case, network: ModelSpec, target: str, recipe: str, work: Path) -> tuple[Bundle, list[Sample]]:
    given = {
        "target": [target],
        "recipe": [recipe],
        "max_accuracy_drop": "off",
        "output_dir": work / "hard" / case.name / recipe.replace(", ", "-"),
    }
    config = replace(config_of(given), model=network, calibration=case.calibration, evaluation=case.evaluation)
    (bundle,) = export(config)
    return bundle, list(open_data(config, load(config), plan_jobs(config)).evaluation)


def _vendor(case: Case, weights: str, bundle: Bundle, samples: list[Sample], work: Path) -> None:
    route = "onnx" if weights == "per-tensor" else "onnx per-channel U8S8"
    given = {"target": ["android-onnx-int8"]}
    config = replace(config_of(given), model=case.rescaled, calibration=case.calibration)
    chosen = open_data(config, load(config), plan_jobs(config)).calibration
    assert chosen is not None
    feeds = [dict(sample.inputs) for sample in chosen]
    path = work / f"{case.name}-{route.replace(' ', '-')}.onnx"
    build(route, case.rescaled.module, torch.from_numpy(next(iter(feeds[0].values()))), feeds, path)
    _print(case, weights, f"rescaled, vendor: {route}", measure(path, bundle, samples))


def _print(case: Case, weights: str, name: str, figures: Figures) -> None:
    print(
        f"| {case.name} | {weights} | {name} | {100 * figures.metric:.2f} % | {100 * figures.float_metric:.2f} % "
        f"| {100 * figures.agreement:.1f} % | {figures.sqnr_db:.1f} dB | {figures.speedup:.2f}x |",
        flush=True,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
