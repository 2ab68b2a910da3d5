"""Networks of Coral's model zoo, as lists of operators, with the latencies that coral.ai/models/all states for them.

"Latency is the time to perform one inference, as measured with a Coral USB Accelerator on a desktop CPU." The table is
read from its copy in github.com/ricardodeazambuja/EdgeTPUModelZoo (README.md). No constant of the latency model is
fitted to it. Networks of which much stays on the CPU are left out, as their time is that of an unknown host's CPU.
"""

from __future__ import annotations

import math

from edge_tpu_networks import (
    EFFICIENTNET_EDGETPU,
    MOBILENET_V2,
    Net,
    inception_v1,
    mobile,
    mobilenet_v1,
    resnet,
    unet_mobilenet_v2,
)

_SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5))
_MOBILENET_V3_EDGETPU = (
    (1, 16, 1, 1, 3), (8, 32, 1, 2, -3), (4, 32, 3, 1, -3), (8, 48, 1, 2, -3), (4, 48, 3, 1, -3), (8, 96, 1, 2, 3),
    (4, 96, 3, 1, 3), (8, 96, 1, 1, 3), (4, 96, 3, 1, 3), (8, 160, 1, 2, 5), (4, 160, 3, 1, 5), (8, 192, 1, 1, 3),
)  # fmt: skip
_COCO_CLASSES = 91


def zoo() -> dict[str, tuple[Net, float]]:
    """Name -> network, milliseconds."""
    return {
        "mobilenet_v1_0.25_128": (mobilenet_v1(128, 0.25), 0.9),
        "mobilenet_v1_0.5_160": (mobilenet_v1(160, 0.5), 1.4),
        "mobilenet_v1_0.75_192": (mobilenet_v1(192, 0.75), 1.8),
        "mobilenet_v1_1.0_224": (mobilenet_v1(224), 2.8),
        "mobilenet_v2_1.0_224": (mobile(224, 32, MOBILENET_V2, 1280).classify(), 2.9),
        "mobilenet_v3_edgetpu": (mobile(224, 32, _MOBILENET_V3_EDGETPU, 1280).classify(), 3.0),
        "efficientnet-edgetpu-S": (mobile(224, 32, EFFICIENTNET_EDGETPU, 1280).classify(), 5.0),
        "efficientnet-edgetpu-M": (mobile(240, 32, EFFICIENTNET_EDGETPU, 1280, 1.0, 1.1).classify(), 7.3),
        "efficientnet-edgetpu-L": (mobile(300, 32, EFFICIENTNET_EDGETPU, 1280, 1.2, 1.4).classify(), 21.3),
        "inception_v1": (inception_v1(224), 3.4),
        "inception_v3": (inception_v3(299), 42.8),
        "inception_v4": (inception_v4(299), 84.7),
        "resnet_50": (resnet(224, (3, 4, 6, 3)), 42.2),
        "ssd_mobilenet_v1": (ssd_mobilenet_v1(300), 6.5),
        "ssd_mobilenet_v2": (ssd_mobilenet_v2(300), 7.3),
        "posenet_353x481": (posenet(353, 481), 5.8),
        "posenet_481x641": (posenet(481, 641), 10.3),
        "posenet_721x1281": (posenet(721, 1281), 32.4),
        "unet_mv2_128": (unet_mobilenet_v2(128), 2.7),
        "unet_mv2_256": (unet_mobilenet_v2(256), 29.0),
    }


def inception_v3(side: int) -> Net:
    net = Net(side).conv(32, 3, 2, False).conv(32, 3, 1, False).conv(64, 3).pool(3, 2, False)
    net.conv(80, 1, 1, False).conv(192, 3, 1, False).pool(3, 2, False)
    for pooled in (32, 64, 64):
        net.concat(
            net.branch().conv(64),
            net.branch().conv(48).conv(64, 5),
            net.branch().conv(64).conv(96, 3).conv(96, 3),
            net.branch().pool(3, 1).conv(pooled),
        )
    doubled = net.branch().conv(64).conv(96, 3).conv(96, 3, 2, False)
    net.concat(net.branch().conv(384, 3, 2, False), doubled, net.branch().pool(3, 2, False))
    for inner in (128, 160, 160, 192):
        long = tall(wide(tall(net.branch().conv(inner), inner), inner), inner)
        net.concat(
            net.branch().conv(192),
            tall(wide(net.branch().conv(inner), inner), 192),
            wide(long, 192),
            net.branch().pool(3, 1).conv(192),
        )
    reduced = tall(wide(net.branch().conv(192), 192), 192).conv(192, 3, 2, False)
    net.concat(net.branch().conv(192).conv(320, 3, 2, False), reduced, net.branch().pool(3, 2, False))
    for _ in range(2):
        forks = (net.branch().conv(384), net.branch().conv(448).conv(384, 3))
        ends = [end for stem in forks for end in forked(stem, 384)]
        net.concat(net.branch().conv(320), *ends, net.branch().pool(3, 1).conv(192))
    return net.classify(1001)


def inception_v4(side: int) -> Net:
    net = Net(side).conv(32, 3, 2, False).conv(32, 3, 1, False).conv(64, 3)
    net.concat(net.branch().pool(3, 2, False), net.branch().conv(96, 3, 2, False))
    net.concat(
        net.branch().conv(64).conv(96, 3, 1, False), tall(wide(net.branch().conv(64), 64), 64).conv(96, 3, 1, False)
    )
    net.concat(net.branch().conv(192, 3, 2, False), net.branch().pool(3, 2, False))
    for _ in range(4):
        net.concat(
            net.branch().conv(96),
            net.branch().conv(64).conv(96, 3),
            net.branch().conv(64).conv(96, 3).conv(96, 3),
            net.branch().pool(3, 1).conv(96),
        )
    doubled = net.branch().conv(192).conv(224, 3).conv(256, 3, 2, False)
    net.concat(net.branch().conv(384, 3, 2, False), doubled, net.branch().pool(3, 2, False))
    for _ in range(7):
        net.concat(
            net.branch().conv(384),
            tall(wide(net.branch().conv(192), 224), 256),
            wide(tall(wide(tall(net.branch().conv(192), 192), 224), 224), 256),
            net.branch().pool(3, 1).conv(128),
        )
    reduced = tall(wide(net.branch().conv(256), 256), 320).conv(320, 3, 2, False)
    net.concat(net.branch().conv(192).conv(192, 3, 2, False), reduced, net.branch().pool(3, 2, False))
    for _ in range(3):
        forks = (net.branch().conv(384), tall(wide(net.branch().conv(384), 448, 3), 512, 3))
        ends = [end for stem in forks for end in forked(stem, 256)]
        net.concat(net.branch().conv(256), *ends, net.branch().pool(3, 1).conv(256))
    return net.classify(1001)


def wide(net: Net, channels: int, length: int = 7) -> Net:
    return net.conv(channels, 1, width=length)


def tall(net: Net, channels: int, length: int = 7) -> Net:
    return net.conv(channels, length, width=1)


def forked(stem: Net, channels: int) -> tuple[Net, Net]:
    """One stem, then a wide and a tall kernel side by side."""
    other = stem.branch()
    return wide(stem, channels, 3), tall(other, channels, 3)


def ssd_mobilenet_v1(side: int) -> Net:
    net = Net(side).conv(32, 3, 2)
    for channels, stride in _SEPARABLE:
        net.depthwise(3, stride).conv(channels)
    first = (net.side, net.channels)
    net.depthwise(3, 2).conv(1024).depthwise().conv(1024)
    return detector(net, first)


def ssd_mobilenet_v2(side: int) -> Net:
    return detector(mobile(side, 32, MOBILENET_V2, 1280), (math.ceil(side / 16), 576))


def detector(net: Net, first: tuple[int, int]) -> Net:
    """SSD: four smaller maps behind the last one, and boxes and classes from all six."""
    levels = [first, (net.side, net.channels)]
    for inner, outer in ((256, 512), (128, 256), (128, 256), (64, 128)):
        net.conv(inner).conv(outer, 3, 2)
        levels.append((net.side, net.channels))
    for (side, channels), anchors in zip(levels, (3, 6, 6, 6, 6, 6), strict=True):
        heads(net, Net(side, channels), (anchors * 4, anchors * _COCO_CLASSES))
    return net


def posenet(height: int, width: int) -> Net:
    """MobileNet v1, 0.75 wide, stride 16; a square image of the same area stands for the real one."""
    net = Net(round(math.sqrt(height * width))).conv(24, 3, 2)
    for channels, stride in (*_SEPARABLE, (1024, 1), (1024, 1)):
        net.depthwise(3, stride).conv(channels * 3 // 4)
    heads(net, net.branch(), (17, 34, 64))
    return net


def heads(net: Net, features: Net, channels: tuple[int, ...]) -> None:
    """Kernels side by side that all write outputs of the network."""
    for count in channels:
        head = features.branch().conv(count, 1)
        net.works += head.works
        net.leaving |= set(head.works)
        net.bytes_out += head.size
