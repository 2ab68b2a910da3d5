"""The networks of benchmarks/accelerators.py: what people put on NPUs, from pictures and sound to text.

Weights are seeded and random but for EfficientNet-Lite0; batch-norm statistics are set from the data, so that
activations have the spread of a trained network.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgeopt.sources import ModelSpec
from edgeopt.types import Array, TensorSpec

SAMPLES = 96
Case = tuple[ModelSpec, list[object]]


class InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        widen = [nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen,
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.has_skip = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.has_skip else y


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, width 1.0."""

    #: expansion, channels, repetitions, first stride
    PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        blocks, width = [], 32
        for expansion, channels, count, first in self.PLAN:
            for index in range(count):
                blocks.append(InvertedResidual(width, channels, first if index == 0 else 1, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        y: torch.Tensor = self.classifier(x.mean((2, 3)))
        return y


def two_convolutions(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Ronneberger et al. 2015 at quarter width, three levels, transposed convolutions on the way up."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.down = nn.ModuleList(two_convolutions(b, a) for b, a in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, 2) for b, a in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.merge = nn.ModuleList(two_convolutions(2 * a, a) for a in widths[-2::-1])
        self.classify = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for index, level in enumerate(self.down):
            x = level(x if index == 0 else self.pool(x))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        y: torch.Tensor = self.classify(x)
        return y


class KeywordDsCnn(nn.Module):
    """DS-CNN (Zhang et al. 2017, "Hello Edge") over 49 x 10 MFCC features."""

    def __init__(self, width: int = 64, classes: int = 12) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, width, (10, 4), (2, 2), (5, 1), bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(4):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classify(self.features(x).mean((2, 3)))
        return y


class KeywordGru(nn.Module):
    """1-D convolutions over 40 mel bands, then a GRU whose last state is classified."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            nn.Conv1d(40, 64, 5, 2, 2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Conv1d(64, 64, 5, 2, 2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
        )
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.classify = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.convolve(x).transpose(1, 2))
        y: torch.Tensor = self.classify(states[:, -1])
        return y


def pictures(count: int, side: int) -> list[Array]:
    """Smooth random pictures: noise at 1/16 of the resolution, enlarged, with a little fine noise."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, side // 16, side // 16, generator=random)
    smooth = nn.functional.interpolate(coarse, size=side, mode="bilinear", align_corners=False)
    return [x.numpy() for x in smooth + 0.1 * torch.randn(count, 3, side, side, generator=random)]


def spectra(count: int, *shape: int) -> list[Array]:
    """Random features that change slowly along time, as those of sound do: a moving average of noise."""
    random = np.random.default_rng(1)
    axis = -2 if len(shape) == 3 else -1  # (1, time, features) or (features, time)
    noise = random.standard_normal((count, *shape))
    smooth = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    return list(smooth.astype(np.float32))


def settled(net: nn.Module, data: list[Array]) -> nn.Module:
    """In eval mode, with batch-norm statistics of the data."""
    net.train()
    with torch.no_grad():
        for start in range(0, 64, 16):
            net(torch.from_numpy(np.stack(data[start : start + 16])))
    return net.eval()


def case(net: nn.Module, data: list[Array], name: str, shape: tuple[int, ...]) -> Case:
    layout = "NCHW" if len(shape) == 4 else None
    inputs = (TensorSpec("input", shape, "float32", layout=layout),)
    return ModelSpec(settled(net, data), inputs=inputs, name=name), list(data)


def mobilenet_v2() -> Case:
    torch.manual_seed(0)
    return case(MobileNetV2(), pictures(SAMPLES, 224), "mobilenet-v2-style", (1, 3, 224, 224))


def unet() -> Case:
    torch.manual_seed(0)
    return case(UNet(), pictures(SAMPLES, 128), "unet", (1, 3, 128, 128))


def keyword_ds_cnn() -> Case:
    torch.manual_seed(0)
    return case(KeywordDsCnn(), spectra(SAMPLES, 1, 49, 10), "keyword-ds-cnn", (1, 1, 49, 10))


def keyword_gru() -> Case:
    torch.manual_seed(0)
    return case(KeywordGru(), spectra(SAMPLES, 40, 100), "keyword-gru", (1, 40, 100))


def bert() -> Case:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = BertConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=512)
    shape._attn_implementation = "eager"
    random = np.random.default_rng(2)
    data: list[object] = []
    for _ in range(SAMPLES):
        length = int(random.integers(32, 65))
        mask = (np.arange(64) < length).astype(np.int64)
        data.append({"input_ids": random.integers(5, 30_000, 64) * mask, "attention_mask": mask})
    inputs = tuple(TensorSpec(name, (1, 64), "int64") for name in ("input_ids", "attention_mask"))
    return ModelSpec(BertModel(shape).eval(), inputs=inputs, name="bert-style"), data


CASES = {
    "mobilenet-v2": mobilenet_v2,
    "unet": unet,
    "keyword-ds-cnn": keyword_ds_cnn,
    "keyword-gru": keyword_gru,
    "bert": bert,
}
