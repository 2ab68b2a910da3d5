"""Pruning to half the MACs on architectures that edgeopt's tests do not use: what goes, what is kept and why.

    python benchmarks/pruning_unseen.py

Random weights: shapes, function and latency are looked at, not accuracy. Prints a Markdown table.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from edgeopt import export
from edgeopt.compression.pruning.analysis import analyse
from edgeopt.compression.steps import Goal, Prune
from edgeopt.errors import EdgeoptError
from edgeopt.progress import Silent
from edgeopt.sources import ModelSpec, load_model
from edgeopt.sources.base import SourceOptions
from edgeopt.types import TensorSpec


class DoubleConv(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        layers = (nn.Conv2d(w, after, 3, padding=1, bias=False) for w in (before, after))
        super().__init__(*(m for conv in layers for m in (conv, nn.BatchNorm2d(after), nn.ReLU())))


class UNet(nn.Module):
    """Three levels; transposed convolutions up, skips joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([DoubleConv(3, 24), DoubleConv(24, 48), DoubleConv(48, 96)])
        self.bottom = DoubleConv(96, 192)
        self.rise = nn.ModuleList([nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in (96, 48, 24)])
        self.up = nn.ModuleList([DoubleConv(2 * w, w) for w in (96, 48, 24)])
        self.out = nn.Conv2d(24, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for rise, block, skip in zip(self.rise, self.up, reversed(skips), strict=True):
            x = block(torch.cat([skip, rise(x)], 1))
        y: torch.Tensor = self.out(x)
        return y


class Attention(nn.Module):
    """One fused projection for query, key and value, as timm has it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        y: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))
        return y


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 128, 8, stride=8)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 128)), nn.Parameter(torch.randn(1, 65, 128))
        self.blocks = nn.Sequential(*(ViTBlock(128, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.position
        y: torch.Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return y


class GRUEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 64))
        self.gru = nn.GRU(64, 96, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.gru(self.front(x))[0][:, -1])
        return y


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "U-Net": (UNet(), (1, 3, 64, 64), "android-int8"),
    "ViT, fused qkv": (ViT(), (1, 3, 64, 64), "android-int8-dynamic"),
    "GRU encoder": (GRUEncoder(), (1, 20, 40), "android-onnx-int8-dynamic"),
}
PRUNE = Prune(
    to=Goal("macs", 0.5, is_share=True), remove=("channels", "heads"), importance="l2", schedule="one-shot", rounds=1
)


def main() -> None:
    print("| network | groups, units | kept | MACs | parameters | time by unpruned |")
    print("|---|---|---|---|---|---|")
    for name, (net, shape, target) in NETWORKS.items():
        layout = "NCHW" if len(shape) == 4 else None
        spec = ModelSpec(module=net.eval(), inputs=(TensorSpec("x", shape, "float32", layout),), name="unseen")
        print(f"| {name} | {row(spec, target)} |", flush=True)


def row(spec: ModelSpec, target: str) -> str:
    try:
        found = analyse(load_model(spec, SourceOptions()), PRUNE.remove, PRUNE.protect)
        reasons = "; ".join(f"{kept.layer}: {kept.reason}" for kept in found.kept)
        with TemporaryDirectory() as folder:
            samples = [({"x": torch.randn(spec.inputs[0].shape).numpy()}, None) for _ in range(16)]
            report = export(
                spec, target=target, steps=(PRUNE,), calibration=[x for x, _ in samples], output_dir=Path(folder),
                progress=Silent(),
            ).report  # fmt: skip
    except EdgeoptError as error:
        return f"refused: {error.line()}"
    before, after = report.steps
    assert before.macs
    assert after.macs
    assert before.parameters
    assert after.parameters
    groups = f"{len(found.groups)}, {sum(group.units for group in found.groups)}"
    return (
        f"{groups} | {reasons} | {after.macs / before.macs:.2f}x | {after.parameters / before.parameters:.2f}x | "
        f"{after.latency_ms / before.latency_ms:.2f}x"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
