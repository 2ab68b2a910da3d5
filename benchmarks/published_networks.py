"""Networks whose latencies others have published, as lists of operators, for fitting the CPU latency model.

Built from the layer tables of their papers and reference implementations. The counts of multiply-accumulates that those
state are checked by `benchmarks/prediction.py --networks`. Left out, because what was measured is not certain:
hosted "densenet" and "inception_resnet_v2" (file sizes that fit no published variant), SSD heads and DeepLab.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_tpu_networks import (
    EFFICIENTNET,
    EFFICIENTNET_EDGETPU,
    MNASNET,
    MOBILENET_V2,
    Net,
    efficientdet,
    inception_v1,
    mobile,
    mobilenet_v1,
    resnet,
    squeezenet,
    unet_mobilenet_v2,
    vgg,
)
from edge_tpu_zoo import inception_v3, inception_v4

from edgeopt.accelerators.edge_tpu.work import Work
from edgeopt.prediction.work import Kind, OpWork

#: (kernel, expanded, channels, squeeze-and-excite, stride), table 1 and 2 of arxiv.org/abs/1905.02244.
_V3_LARGE = (
    (3, 16, 16, False, 1), (3, 64, 24, False, 2), (3, 72, 24, False, 1), (5, 72, 40, True, 2), (5, 120, 40, True, 1),
    (5, 120, 40, True, 1), (3, 240, 80, False, 2), (3, 200, 80, False, 1), (3, 184, 80, False, 1),
    (3, 184, 80, False, 1), (3, 480, 112, True, 1), (3, 672, 112, True, 1), (5, 672, 160, True, 2),
    (5, 960, 160, True, 1), (5, 960, 160, True, 1),
)  # fmt: skip
_V3_SMALL = (
    (3, 16, 16, True, 2), (3, 72, 24, False, 2), (3, 88, 24, False, 1), (5, 96, 40, True, 2), (5, 240, 40, True, 1),
    (5, 240, 40, True, 1), (5, 120, 48, True, 1), (5, 144, 48, True, 1), (5, 288, 96, True, 2), (5, 576, 96, True, 1),
    (5, 576, 96, True, 1),
)  # fmt: skip


def mobilenet_v3(rows: tuple[tuple[int, int, int, bool, int], ...], last: int, head: int) -> Net:
    net = Net(224).conv(16, 3, 2).other()
    for kernel, expanded, channels, squeeze, stride in rows:
        before = (net.side, net.channels)
        if expanded != net.channels:
            net.conv(expanded)
        net.depthwise(kernel, stride)
        if squeeze:
            squeeze_and_excite(net, max(8, (expanded // 4 + 4) // 8 * 8))
        net.conv(channels)
        if (net.side, net.channels) == before:
            net.add()
    net.conv(last).other()
    before_pool, net.side = net.size, 1
    net.other(before_pool)
    return net.conv(head).other().dense(1001)


def squeeze_and_excite(net: Net, squeezed: int) -> None:
    side, channels, size = net.side, net.channels, net.size
    net.side = 1
    net.other(size).conv(squeezed).conv(channels).other()
    net.side = side
    net.other(size + channels)


def resnet_v2(side: int, blocks: tuple[int, ...]) -> Net:
    """Pre-activation: each block begins with a normalization that can't be folded away, two operators (MUL, ADD)."""
    net = resnet(side, blocks)
    extra = Net(-(-side // 4), 64)
    for stage, count in enumerate(blocks):
        for block in range(count):
            if stage and block == 0:
                extra.channels = 256 * 2 ** (stage - 1)
            extra.other().other()
            if block == 0:
                extra.side, extra.channels = -(-side // 2 ** (stage + 2)), 256 * 2**stage
    net.works += extra.works
    return net


def nasnet(side: int, stem: int, filters: int, cells: int) -> Net:
    """NASNet-A (arxiv.org/abs/1707.07012, figure 4): `cells` normal ones between reductions; `filters` of the first."""
    net = Net(side).conv(stem, 3, 2, False)
    older, newer = (net.side, net.channels), (net.side, net.channels)
    plan = [("reduce", filters / 4), ("reduce", filters / 2)]
    for stage in range(3):
        plan += [("reduce", filters * 2**stage)] if stage else []
        plan += [("normal", filters * 2**stage)] * cells
    for kind, width in plan:
        older, newer = newer, _nasnet_cell(net, older, newer, int(width), kind == "reduce")
    net.side, net.channels = newer
    return net.classify(1001)


def _nasnet_cell(
    net: Net, older: tuple[int, int], newer: tuple[int, int], width: int, reduces: bool
) -> tuple[int, int]:
    side = newer[0]
    net.works += Net(side, newer[1]).other().conv(width).works
    net.works += Net(side, older[1]).other().conv(width).works  # a larger older map is subsampled first
    to = -(-side // 2) if reduces else side
    stride = 2 if reduces else 1

    def separable(kernel: int, first: int = stride, at: int = side) -> None:
        net.works.extend(Net(at, width).depthwise(kernel, first).conv(width).depthwise(kernel).conv(width).works)

    def pool(at: int = side, first: int = stride) -> None:
        net.works.extend(Net(at, width).pool(3, first).works)

    if reduces:
        for kernel in (5, 7, 7, 5):
            separable(kernel)
        pool(), pool(), pool(to, 1)
        separable(3, 1, to)
        parts = 4
    else:
        for kernel in (3, 3, 5, 5, 3):
            separable(kernel)
        pool(), pool(), pool()
        parts = 6
    for _ in range(5):
        net.works.extend(Net(to, width).add().works)
    end = Net(to, width * parts).other()
    net.works.extend(end.works)
    return end.side, end.channels


def _lite(side: int, width: float, depth: float) -> Net:
    return mobile(side, 32, EFFICIENTNET, 1280, width, depth, scale_ends=False).classify()


def _det(side: int, width: float, depth: float, channels: int, cells: int, heads: int) -> Net:
    """With the sigmoid of the class scores; suppressing overlapping boxes depends on the picture and is left out."""
    net = efficientdet(side, width, depth, channels, cells, heads)
    anchors = 9 * sum((-(-side // 2**level)) ** 2 for level in range(3, 8))
    net.works.append(Work("other", 0, 0, 0, 0, anchors * 90, anchors * 90))
    return net


def _mnasnet(side: int, width: float) -> Net:
    return mobile(side, 32, MNASNET, 1280, width, separable=round(16 * width)).classify(1001)


def _names() -> dict[str, Callable[[], Net]]:
    networks: dict[str, Callable[[], Net]] = {
        "mobilenet_v2_1.0_224": lambda: mobile(224, 32, MOBILENET_V2, 1280).classify(1001),
        "mobilenet_v3_large": lambda: mobilenet_v3(_V3_LARGE, 960, 1280),
        "mobilenet_v3_small": lambda: mobilenet_v3(_V3_SMALL, 576, 1024),
        "inception_v1": lambda: inception_v1(224),
        "inception_v3": lambda: inception_v3(299),
        "inception_v4": lambda: inception_v4(299),
        "squeezenet": lambda: squeezenet(224, "1.0"),
        "nasnet_mobile": lambda: nasnet(224, 32, 44, 4),
        "nasnet_large": lambda: nasnet(331, 96, 168, 6),
        "resnet_v2_101": lambda: resnet_v2(299, (3, 4, 23, 3)),
        "resnet-50_v1_299": lambda: resnet(299, (3, 4, 6, 3)),
        "resnet-50_v2_299": lambda: resnet_v2(299, (3, 4, 6, 3)),
        "resnet-152_v2_299": lambda: resnet_v2(299, (3, 8, 36, 3)),
        "vgg16_224": lambda: vgg(224, (2, 2, 3, 3, 3)),
        "vgg19_224": lambda: vgg(224, (2, 2, 4, 4, 4)),
        "unet_mobilenet_v2_128": lambda: unet_mobilenet_v2(128),
        "efficientnet-edgetpu-s": lambda: mobile(224, 32, EFFICIENTNET_EDGETPU, 1280).classify(),
        "efficientnet-edgetpu-m": lambda: mobile(240, 32, EFFICIENTNET_EDGETPU, 1280, 1.0, 1.1).classify(),
        "efficientnet-lite0": lambda: _lite(224, 1.0, 1.0),
        "efficientnet-lite1": lambda: _lite(240, 1.0, 1.1),
        "efficientnet-lite2": lambda: _lite(260, 1.1, 1.2),
        "efficientnet-lite3": lambda: _lite(280, 1.2, 1.4),
        "efficientnet-lite4": lambda: _lite(300, 1.4, 1.8),
        "efficientdet-lite0": lambda: _det(320, 1.0, 1.0, 64, 3, 3),
        "efficientdet-lite1": lambda: _det(384, 1.0, 1.1, 88, 4, 3),
        "efficientdet-lite2": lambda: _det(448, 1.1, 1.2, 112, 5, 3),
        "efficientdet-lite3": lambda: _det(512, 1.2, 1.4, 160, 6, 4),
        "efficientdet-lite4": lambda: _det(640, 1.4, 1.8, 224, 7, 4),
    }
    for width in (0.25, 0.5, 0.75, 1.0):
        for side in (128, 160, 192, 224):
            name = f"mobilenet_v1_{width:.2f}_{side}" if width != 1.0 else f"mobilenet_v1_1.0_{side}"
            networks[name] = lambda side=side, width=width: mobilenet_v1(side, width)
    for width, side in ((0.5, 224), (0.75, 224), (1.0, 96), (1.0, 128), (1.0, 160), (1.0, 192), (1.0, 224), (1.3, 224)):
        name = f"mnasnet_{width:.2f}_{side}" if width in (0.5, 0.75) else f"mnasnet_{width:.1f}_{side}"
        networks[name] = lambda side=side, width=width: _mnasnet(side, width)
    aliases = {"inception_v1_224": "inception_v1", "inception_v4_299": "inception_v4", "squeezenet_224": "squeezenet",
               "mobilenet_v1_224": "mobilenet_v1_1.0_224", "mobilenet_v2_224": "mobilenet_v2_1.0_224"}  # fmt: skip
    return networks | {alias: networks[name] for alias, name in aliases.items()}


#: Name in the device profiles -> the network.
NETWORKS = _names()


def family(name: str) -> str:
    """Networks that are variants of one design: "mobilenet_v2", "efficientdet", "inception"."""
    words = name.replace("-", "_").split("_")
    return "_".join(words[:2]) if words[0] == "mobilenet" else words[0].rstrip("0123456789")


def works(name: str, precision: str) -> list[OpWork]:
    """The network's operators as files of that precision hold them."""
    size = 1 if precision == "w8a8" else 4
    ops = []
    for index, work in enumerate(NETWORKS[name]().works):
        kind = _kind(work)
        ops.append(
            OpWork(
                name=str(index),
                type=kind,
                kind=kind,
                arithmetic="int8" if precision == "w8a8" else "fp32",
                macs=work.macs if work.kind != "other" else work.bytes_in,
                channels=work.channels,
                elements=work.bytes_out,
                weight_bytes=work.weights * size,
                activation_bytes=(work.bytes_in + work.bytes_out) * size,
            )
        )
    return ops


def _kind(work: Work) -> Kind:
    if work.kind == "dense":
        return "matmul" if work.positions == 1 else "conv"
    if work.kind == "depthwise":
        return "depthwise"
    if work.bytes_in == 2 * work.bytes_out:
        return "elementwise"
    return "pool" if work.bytes_in > work.bytes_out else "elementwise"
