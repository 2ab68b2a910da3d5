"""A BERT-style encoder and a MobileNetV3-style network through all three formats: fidelity, speed, what stays float.

    python benchmarks/architectures.py [WORK_DIR]

Random weights (seeded), so fidelity is to the float model; batch-norm statistics are set from the data. Prints two
Markdown tables.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import edgeopt
from edgeopt.sources import ModelSpec
from edgeopt.types import Array, Bundle, TensorSpec

SAMPLES = 96
TARGETS = tuple(
    f"android{runtime}-{kind}" for runtime in ("", "-onnx", "-executorch") for kind in ("int8", "int8-dynamic")
)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.expand(torch.relu(self.reduce(self.pool(x))))
        return x * nn.functional.hardsigmoid(scale)


class InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, expansion: int, stride: int, kernel: int, se: bool) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            SqueezeExcite(wide) if se else nn.Identity(),
            nn.Conv2d(wide, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.has_skip = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.has_skip else y


def mobilenet_v3(classes: int = 100) -> nn.Module:
    """MobileNetV3-Large's kinds of layers at about half its depth (Howard et al. 2019)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        InvertedResidual(16, 24, 4, 2, 3, se=False),
        InvertedResidual(24, 24, 3, 1, 3, se=False),
        InvertedResidual(24, 40, 3, 2, 5, se=True),
        InvertedResidual(40, 40, 3, 1, 5, se=True),
        InvertedResidual(40, 80, 6, 2, 3, se=False),
        InvertedResidual(80, 112, 6, 1, 3, se=True),
        InvertedResidual(112, 112, 6, 1, 3, se=True),
        InvertedResidual(112, 160, 6, 2, 5, se=True),
        nn.Conv2d(160, 960, 1, bias=False),
        nn.BatchNorm2d(960),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(960, 1280),
        nn.Hardswish(),
        nn.Linear(1280, classes),
    )


def pictures(count: int) -> list[Array]:
    """Smooth random pictures: noise at 1/16 of the resolution, enlarged, with a little fine noise."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 14, 14, generator=random)
    smooth = nn.functional.interpolate(coarse, size=224, mode="bilinear", align_corners=False)
    return [x.numpy() for x in smooth + 0.1 * torch.randn(count, 3, 224, 224, generator=random)]


def convolutional() -> tuple[ModelSpec, list[object]]:
    torch.manual_seed(0)
    data = pictures(SAMPLES)
    net = mobilenet_v3().train()
    with torch.no_grad():
        for start in range(0, 64, 16):
            net(torch.from_numpy(np.stack(data[start : start + 16])))
    inputs = (TensorSpec("image", (1, 3, 224, 224), "float32"),)
    return ModelSpec(net.eval(), inputs=inputs, name="mobilenet-v3-style"), list(data)


def transformer() -> tuple[ModelSpec, list[object]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    shape._attn_implementation = "eager"
    random = np.random.default_rng(2)
    data: list[object] = []
    for _ in range(SAMPLES):
        length = int(random.integers(32, 129))
        mask = (np.arange(128) < length).astype(np.int64)
        data.append({"input_ids": random.integers(5, 30_000, 128) * mask, "attention_mask": mask})
    inputs = tuple(TensorSpec(name, (1, 128), "int64") for name in ("input_ids", "attention_mask"))
    return ModelSpec(BertModel(shape).eval(), inputs=inputs, name="bert-style"), data


@dataclass(frozen=True)
class Case:
    title: str
    make: Callable[[], tuple[ModelSpec, list[object]]]


CASES = (
    Case("BERT-style encoder, 4 layers, hidden 256, sequence 128 (transformers)", transformer),
    Case("MobileNetV3-style: hardswish, squeeze-excite, 224 x 224", convolutional),
)


def main(work: Path) -> None:
    for case in CASES:
        spec, data = case.make()
        print(f"\n**{case.title}**\n")
        print("| target | status | SQNR | ms, 1 thread | float ms | speed-up | size | operators that stay float |")
        print("|---|---|---|---|---|---|---|---|")
        for target in TARGETS:
            print(
                _row(edgeopt.export(spec, target=target, calibration=data, output_dir=work / "architectures")),
                flush=True,
            )


def _row(bundle: Bundle) -> str:
    report = bundle.report
    figures = {(m.name, m.subject): m.value for m in report.measurements}
    sqnr = min(m.value for m in report.measurements if m.name.startswith("sqnr_db") and m.subject == "quantized")
    kinds = Counter(op.type for op in report.unquantized_ops)
    missed = ", ".join(check.name for check in report.checks if not check.passed)
    stays = ", ".join(f"{kind} x{count}" for kind, count in kinds.most_common()) or "none"
    return (
        f"| {bundle.target} | {report.status}{f' ({missed})' if missed else ''} | {sqnr:.1f} dB "
        f"| {figures['latency_ms', 'quantized']:.2f} | {figures['latency_ms', 'float']:.2f} "
        f"| {figures['speedup', 'quantized']:.2f}x "
        f"| {figures['size_bytes', 'quantized'] / figures['size_bytes', 'float']:.2f} of float | {stays} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/edgeopt-benchmark"))
