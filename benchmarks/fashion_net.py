"""MobileNet-style classifiers trained on Fashion-MNIST (Debian package dataset-fashion-mnist, MIT licence).

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb DATA
    python benchmarks/fashion_net.py DATA WORK_DIR [EPOCHS]

Writes WORK_DIR/{v2,v3}.safetensors: v3 has hardswish and squeeze-excite, v2 ReLU and neither.
"""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeopt.sources import ModelSpec
from edgeopt.types import Array, TensorSpec

FOLDER = Path("usr/share/datasets/fashion-mnist")
TRAINED_ON = 55_000  # of the 60 000; the rest is for validation
Style = Literal["v2", "v3"]
#: expansion, channels, stride, kernel, squeeze-excite
BLOCKS = ((1, 16, 2, 3, True), (4, 24, 2, 3, False), (4, 24, 1, 3, False), (4, 40, 2, 5, True), (6, 40, 1, 5, True))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * nn.functional.hardsigmoid(self.expand(torch.relu(self.reduce(self.pool(x)))))


def activation(style: Style) -> nn.Module:
    return nn.Hardswish() if style == "v3" else nn.ReLU()


class Block(nn.Module):
    def __init__(
        self, style: Style, before: int, expansion: int, after: int, stride: int, kernel: int, squeeze: bool
    ) -> None:
        super().__init__()
        wide = before * expansion
        self.layers = nn.Sequential(
            nn.Conv2d(before, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            activation(style),
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            activation(style),
            SqueezeExcite(wide) if squeeze and style == "v3" else nn.Identity(),
            nn.Conv2d(wide, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.has_skip = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.has_skip else y


class FashionNet(nn.Module):
    """(N, 1, 32, 32) in -1..1 -> (N, 10) logits."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), activation(style))
        widths = (16, *(block[1] for block in BLOCKS))
        self.blocks = nn.Sequential(*(Block(style, w, *block) for w, block in zip(widths, BLOCKS, strict=False)))
        self.head = nn.Sequential(nn.Conv2d(40, 160, 1, bias=False), nn.BatchNorm2d(160), activation(style))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(160, 256), activation(style), nn.Dropout(0.2), nn.Linear(256, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))
        return y


def pictures(data: Path, part: Literal["train", "t10k"]) -> tuple[Array, Array]:
    """(N, 1, 32, 32) float32 in -1..1, padded by two, and (N,) int64 labels."""
    raw = gzip.decompress((data / FOLDER / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data / FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    grey = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 127.5 - 1
    padded = np.pad(grey, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1.0)
    return padded, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


class Rows:
    """Pictures by index, as edgeopt takes a data set from Python."""

    def __init__(self, images: Array, labels: Array) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[dict[str, Array], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"image": self._images[index : index + 1]}, int(self._labels[index])


def spec(style: Style, work: Path) -> ModelSpec:
    net = FashionNet(style)
    net.load_state_dict(load_file(work / f"{style}.safetensors"))
    inputs = (TensorSpec("image", (1, 1, 32, 32), "float32", "NCHW"),)
    return ModelSpec(module=net.eval(), inputs=inputs, outputs=("logits",), name=f"fashion-{style}")


def train(style: Style, data: Path, work: Path, epochs: int) -> None:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a[:TRAINED_ON]) for a in pictures(data, "train"))
    net, batch = FashionNet(style), 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        net.train()
        start, order = time.monotonic(), torch.randperm(len(images))
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            x = images[chosen]
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            dy, dx = (int(d) for d in torch.randint(-2, 3, (2,)))
            logits = net(x.roll((dy, dx), (2, 3)))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{style} epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
        save_file(net.state_dict(), work / f"{style}.safetensors")
    net.eval()
    images, labels = (torch.from_numpy(a) for a in pictures(data, "t10k"))
    with torch.no_grad():
        found = torch.cat([net(x).argmax(1) for x in images.split(500)])
    print(f"{style} test top-1 {(found == labels).float().mean():.4f}", flush=True)


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    for wanted in ("v3", "v2"):
        train(wanted, Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 12)
