"""A residual network on Fashion-MNIST, the model of the pruning benchmarks.

    python benchmarks/fashion_resnet.py DATA WORK_DIR [EPOCHS]

DATA as for fashion_net.py. Writes WORK_DIR/resnet.safetensors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from fashion_net import TRAINED_ON, pictures
from safetensors.torch import load_file, save_file
from torch import nn

from edgeopt.sources import ModelSpec
from edgeopt.types import TensorSpec

WIDTHS = (32, 64, 128)
BLOCKS = 2  # per width


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.skip(x))


class FashionResNet(nn.Module):
    """(N, 1, 32, 32) in -1..1 -> (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        first = WIDTHS[0]
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        layers: list[nn.Module] = []
        before = first
        for width in WIDTHS:
            for index in range(BLOCKS):
                layers.append(Block(before, width, 2 if index == 0 and width != first else 1))
                before = width
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(self.layers(self.pool(self.stem(x))).mean((2, 3)))
        return y


def spec(work: Path) -> ModelSpec:
    net = FashionResNet()
    net.load_state_dict(load_file(work / "resnet.safetensors"))
    inputs = (TensorSpec("image", (1, 1, 32, 32), "float32", "NCHW"),)
    return ModelSpec(module=net.eval(), inputs=inputs, outputs=("logits",), name="fashion-resnet")


def train(data: Path, work: Path, epochs: int) -> None:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a[:TRAINED_ON]) for a in pictures(data, "train"))
    tests, truth = (torch.from_numpy(a) for a in pictures(data, "t10k"))
    net, batch = FashionResNet().to(memory_format=torch.channels_last), 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    for epoch in range(epochs):
        net.train()
        start, order = time.monotonic(), torch.randperm(len(images))
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            x = images[chosen]
            mirrored = torch.rand(len(x)) < 0.5
            x[mirrored] = x[mirrored].flip(3)
            dy, dx = (int(d) for d in torch.randint(-2, 3, (2,)))
            logits = net(x.roll((dy, dx), (2, 3)).contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            found = torch.cat([net(x).argmax(1) for x in tests.split(500)])
        top1 = float((found == truth).float().mean())
        print(f"epoch {epoch + 1}: test top-1 {top1:.4f}, {time.monotonic() - start:.0f} s", flush=True)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, work / "resnet.safetensors")


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 12)
