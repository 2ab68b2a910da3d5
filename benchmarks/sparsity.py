"""Zeros in a network of 1x1 and depthwise convolutions: accuracy, storage and latency at 0, 40, 60 and 80 %.

    python benchmarks/sparsity.py DATA WORK_DIR [SHARE ...]

DATA as for fashion_net.py. Trains WORK_DIR/mobilenet.safetensors where it is not there. Prints rows of a Markdown
table. The fp32 files that it leaves in WORK_DIR show what LiteRT's sparse kernels do: see litert_sparse.py.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from fashion_net import TRAINED_ON, Rows, pictures
from safetensors.torch import load_file, save_file
from torch import nn

from edgeopt.bundle import open_bundle
from edgeopt.bundle.sparse_storage import compare
from edgeopt.compression.steps import Sparsify
from edgeopt.config import config_of
from edgeopt.formats.sparsity import zeros_of
from edgeopt.pipeline import export
from edgeopt.sources import ModelSpec
from edgeopt.training.config import TrainingConfig
from edgeopt.types import Array, Bundle, TensorSpec

TRAINING, VALIDATION = 20_000, 2_000
#: width, stride
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 1))
STEP = Sparsify(
    rounds=2,
    training=TrainingConfig(
        epochs=2, batch_size=64, learning_rate=1e-3, freeze_batch_norm_after=0.7, mixed_precision="bf16"
    ),
)
HEADER = """\
| zeros asked for | file | zeros in it | top-1, fp32 -> shipped | KiB: plain | deflated | packed | time by dense file of its kind | made in |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501  (a row of a table)


class MobileNet(nn.Sequential):
    """(N, 3, 32, 32) -> (N, 10), after MobileNetV1 (Howard et al. 2017)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        before = 32
        for after, stride in BLOCKS:
            layers += [nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False), nn.BatchNorm2d(before)]
            layers += [nn.ReLU6(), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU6()]
            before = after
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def coloured(data: Path, part: Literal["train", "t10k"]) -> tuple[Array, Array]:
    """The grey pictures in three channels: XNNPACK's sparse kernels begin behind a stem of three."""
    images, labels = pictures(data, part)
    return images.repeat(3, axis=1), labels


def train(data: Path, path: Path, epochs: int = 8) -> None:
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(a[:TRAINED_ON]) for a in coloured(data, "train"))
    net, batch = MobileNet().to(memory_format=torch.channels_last), 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(images) // batch))
    for epoch in range(epochs):
        start, order = time.monotonic(), torch.randperm(len(images))
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            x = images[chosen]
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            dy, dx = (int(d) for d in torch.randint(-2, 3, (2,)))
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x.roll((dy, dx), (2, 3)).contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
        )
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)


def main(data: Path, work: Path, shares: list[float]) -> None:
    weights = work / "mobilenet.safetensors"
    if not weights.exists():
        train(data, weights)
    net = MobileNet()
    net.load_state_dict(load_file(weights))
    inputs = (TensorSpec("image", (1, 3, 32, 32), "float32", "NCHW"),)
    images, labels = coloured(data, "train")
    held_out = slice(TRAINED_ON, TRAINED_ON + VALIDATION)
    base = replace(
        config_of({"num_calibration_samples": 256, "min_speedup": "off"}),
        model=ModelSpec(module=net.eval(), inputs=inputs, outputs=("logits",), name="fashion-mobilenet"),
        calibration=Rows(images[:1000], labels[:1000]),
        evaluation=Rows(*coloured(data, "t10k")),
    )
    trained = replace(
        base,
        train=Rows(images[:TRAINING], labels[:TRAINING]),
        validation=Rows(images[held_out], labels[held_out]),
    )
    print(HEADER, flush=True)
    for share in shares:
        for target in ("android-int8", "android-fp32"):
            start = time.monotonic()
            config = replace(base, target=(target,), output_dir=work / "zeros-0")
            if share > 0:
                step = replace(STEP, to=share)
                config = replace(trained, target=(target,), step=(step,), output_dir=work / f"zeros-{share:g}")
            (bundle,) = export(config)
            print(row(share, target, bundle, time.monotonic() - start), flush=True)


def row(share: float, target: str, bundle: Bundle, seconds: float) -> str:
    path, report = open_bundle(bundle.path).model_path, bundle.report
    top1 = {m.subject: m.value for m in report.measurements if m.name == "top1"}
    sizes = compare(path)
    kib = " | ".join(f"{size / 1024:.0f}" for size in (sizes.plain, sizes.deflated, sizes.packed_deflated))
    ratio = f"{report.steps[-1].latency_ms / report.steps[0].latency_ms:.2f}x" if report.steps else "1"
    return (
        f"| {share:.0%} | {target} | {zeros_of(path).share:.1%} | {100 * top1['float']:.2f} -> "
        f"{100 * top1.get('quantized', top1['float']):.2f} % | {kib} | {ratio} | {seconds / 60:.1f} min |"
    )


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), Path(sys.argv[2]), [float(share) for share in sys.argv[3:]] or [0.0, 0.4, 0.6, 0.8])
