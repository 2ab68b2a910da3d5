"""Handwritten digits: 1 797 real 8 x 8 scans (UCI, shipped by scikit-learn), a CNN trained in under a minute.

The scans are enlarged to 32 x 32 so that the network has the compute of a small real one, about 13 M MACs, and
int8 against float says something. Of the scans every fifth is held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import MissingError
from edgeopt.sources.base import ModelSpec
from edgeopt.types import Array, ImagePreprocessing, TensorSpec

if TYPE_CHECKING:
    from torch import nn

SIDE = 32
HELD_OUT_EVERY = 5
EPOCHS = 6
BATCH = 64

#: What `DigitSet` does to a scan, declared for the app: a grey picture, enlarged, scaled to -1..1.
PREPROCESSING = ImagePreprocessing(
    height=SIDE, width=SIDE, channels=1, interpolation="nearest", mean=(0.5,), std=(0.5,)
)


class DigitSet:
    """Digits as (image float32 (1, 32, 32) in -1..1, class index)."""

    def __init__(self, images: Array, labels: Array) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Array, int]:
        enlarged = np.kron(self.images[index], np.ones((SIDE // 8, SIDE // 8)))
        image = (enlarged / 8.0 - 1.0).astype(np.float32)[np.newaxis]
        return image, int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Array, int]]:
        return (self[i] for i in range(len(self)))


def training_set() -> DigitSet:
    """The four fifths that the network is trained and calibrated on."""
    return _digits(held_out=False)


def held_out_set() -> DigitSet:
    """The fifth that it never saw."""
    return _digits(held_out=True)


def model() -> ModelSpec:
    """Train the network, deterministically, and hand it over with its signature."""
    trained = train(training_set())
    spec = TensorSpec("image", (1, 1, SIDE, SIDE), "float32", layout="NCHW")
    return ModelSpec(
        module=trained,
        inputs=(spec,),
        outputs=("logits",),
        preprocessing=PREPROCESSING,
        labels=tuple(str(digit) for digit in range(10)),
        name="digits",
    )


def network() -> nn.Module:
    """Untrained: five conv-BN-ReLU blocks, global pooling and a linear classifier."""
    from torch import nn

    def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())

    return nn.Sequential(
        block(1, 16),
        block(16, 32, stride=2),
        block(32, 64),
        block(64, 64, stride=2),
        block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(data: DigitSet, seed: int = 0) -> nn.Module:
    """Adam with a one-cycle learning rate, cross-entropy; leaves torch's global random state as it was."""
    import torch
    from torch import nn

    images = torch.from_numpy(np.stack([image for image, _ in data]))
    labels = torch.from_numpy(data.labels.astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = network().train()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        steps = EPOCHS * (len(data) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        loss_function = nn.CrossEntropyLoss()
        for _ in range(EPOCHS):
            order = torch.randperm(len(data))
            for start in range(0, len(data) - BATCH + 1, BATCH):
                chosen = order[start : start + BATCH]
                optimizer.zero_grad()
                loss_function(net(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return net.eval()


def _digits(held_out: bool) -> DigitSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingError.extra("scikit-learn", "examples", "the example 'digits'") from error
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % HELD_OUT_EVERY == 0) == held_out
    return DigitSet(digits.images[chosen], digits.target[chosen])
