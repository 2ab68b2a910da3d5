"""What Vela makes of edgeopt's LiteRT files and of ai-edge-quantizer's default ones: operators on the CPU, estimates.

    python benchmarks/ethos_u_vendor.py WORK_DIR

The vendor's route is litert_torch on the channel-last model, then static_wi8_ai8. Prints a Markdown table.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerator_models import mobilenet_v2, pictures
from vendor_routes import litert_channel_last

import edgeopt
from edgeopt.accelerators import load_accelerator
from edgeopt.bundle import open_bundle
from edgeopt.device_profiles import load_device
from edgeopt.examples.efficientnet_lite0 import model
from edgeopt.formats import summarize
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.sources import ModelSpec
from edgeopt.types import Artifact, EthosUKind

SAMPLES = 16
BOARDS: tuple[tuple[EthosUKind, str], ...] = (
    ("ethos-u55", "corstone-300"), ("ethos-u65", "corstone-300-u65-256"), ("ethos-u85", "corstone-320"),
)  # fmt: skip


def figures(path: Path, kind: EthosUKind, board: str, folder: Path) -> str:
    npu = load_device(board).npu(kind)
    assert npu is not None
    summary = summarize(path)
    artifact = Artifact(
        path, "litert", "w8a8", summary.signature, size_of(path), sha256_of(path), (), {}, unquantized_ops=()
    )
    folder.mkdir(parents=True, exist_ok=True)
    compiled = load_accelerator("litert", kind).compile(artifact, npu, folder)
    told = {m.name: m.value for m in compiled.measurements}
    ops = compiled.placement.ops
    return f"{len(compiled.placement.on_cpu)} of {len(ops)} | {told['cycles'] / 1e6:.2f} M | {told['latency_ms']:.2f}"


def main(work: Path) -> None:
    cases: tuple[tuple[str, ModelSpec], ...] = (
        ("EfficientNet-Lite0", model()), ("MobileNetV2-style", mobilenet_v2()[0]),
    )  # fmt: skip
    data = pictures(SAMPLES, 224)
    print("| network | NPU | ours: on the CPU | cycles | ms | vendor's: on the CPU | cycles | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, spec in cases:
        folder = work / name
        folder.mkdir(parents=True, exist_ok=True)
        spec = replace(spec, preprocessing=None)
        bundle = edgeopt.export(spec, target="ethosu55-int8", calibration=data, output_dir=folder / "ours")
        ours, theirs = open_bundle(bundle.path).runnable_path, folder / "vendor.tflite"
        feeds = [{"input": np.ascontiguousarray(picture[None])} for picture in data]
        litert_channel_last(spec.module, torch.from_numpy(feeds[0]["input"]), feeds, theirs)
        for kind, board in BOARDS:
            row = [figures(path, kind, board, folder / path.parent.name / board) for path in (ours, theirs)]
            print(f"| {name} | {kind}, {board} | {row[0]} | {row[1]} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/edgeopt-benchmark"))
