"""Well-known networks as lists of operators, for checking the Edge TPU's latency model where no file is at hand.

Only what `edgeopt.accelerators.edge_tpu.work.Work` holds is built: layer shapes as their papers and reference
implementations state them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from edgeopt.accelerators.edge_tpu.parameters import Activations
from edgeopt.accelerators.edge_tpu.work import Work


@dataclass
class Net:
    """A network under construction.

    Attributes:
        side, channels: of the last feature map, which is square.
        bytes_in, bytes_out: of the network.
        held: bytes that stay alive for a later skip connection while the largest operator runs.
        leaving: operators that write outputs of the network.
    """

    side: int
    channels: int = 3
    works: list[Work] = field(default_factory=list)
    bytes_in: int = 0
    bytes_out: int = 0
    held: int = 0
    leaving: set[Work] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.bytes_in = self.size

    @property
    def size(self) -> int:
        return self.side * self.side * self.channels

    @property
    def activations(self) -> Activations:
        """As `parameters.activations_of` finds them in a file."""
        peaks = [
            # A sum is accumulated where one of its operands is, and what leaves the chip takes no room.
            0
            if work.kind == "other" and work.bytes_in == 2 * work.bytes_out
            else self.held + work.bytes_in + (0 if work in self.leaving else work.bytes_out)
            for work in self.works
        ]
        maps = {i: w.positions for i, w in enumerate(self.works) if w.positions > 1}
        late = max(peaks[min(maps, key=lambda i: maps[i]) :])
        return Activations(max(peaks), late, any(work.kind == "depthwise" for work in self.works))

    def conv(self, channels: int, kernel: int = 1, stride: int = 1, pad: bool = True, width: int | None = None) -> Net:
        """`width`: of a non-square kernel (kernel x width)."""
        before = self.size
        taps = kernel * (kernel if width is None else width)
        depth, self.channels = self.channels, channels
        self._slide(kernel if width is None else max(kernel, width), stride, pad or width is not None)
        self.works.append(Work("dense", self.side**2, channels, taps, depth, before, self.size))
        return self

    def depthwise(self, kernel: int = 3, stride: int = 1) -> Net:
        before = self.size
        self._slide(kernel, stride, True)
        self.works.append(Work("depthwise", self.side**2, self.channels, kernel**2, 1, before, self.size))
        return self

    def up_conv(self, channels: int, kernel: int = 3) -> Net:
        """Transposed convolution, stride 2."""
        before, positions, depth = self.size, self.side**2, self.channels
        self.side, self.channels = self.side * 2, channels
        self.works.append(Work("dense", positions, channels, kernel**2, depth, before, self.size))
        return self

    def pool(self, kernel: int = 2, stride: int = 2, pad: bool = True) -> Net:
        before = self.size
        self._slide(kernel, stride, pad)
        return self.other(before)

    def upsample(self, factor: int = 2) -> Net:
        before = self.size
        self.side *= factor
        return self.other(before)

    def add(self) -> Net:
        return self.other(2 * self.size)

    def other(self, bytes_in: int | None = None) -> Net:
        """Any operator without weights that wrote the present feature map."""
        self.works.append(Work("other", 0, 0, 0, 0, self.size if bytes_in is None else bytes_in, self.size))
        return self

    def concat(self, *branches: Net) -> Net:
        """The end of parallel branches: their operators, and their channels side by side."""
        self.works += [work for branch in branches for work in branch.works]
        self.side, self.channels = branches[0].side, sum(branch.channels for branch in branches)
        return self.other()

    def branch(self) -> Net:
        return Net(self.side, self.channels)

    def classify(self, classes: int = 1000) -> Net:
        before = self.size
        self.side = 1
        self.other(before)
        return self.dense(classes)

    def dense(self, units: int) -> Net:
        inputs, self.side, self.channels = self.size, 1, units
        self.works.append(Work("dense", 1, units, 1, inputs, inputs, units))
        return self.ends()

    def ends(self) -> Net:
        self.bytes_out = self.size
        return self

    def _slide(self, kernel: int, stride: int, pad: bool) -> None:
        self.side = math.ceil(self.side / stride) if pad else (self.side - kernel) // stride + 1


def line_seg(widths: tuple[int, ...], side: int) -> Net:
    """The encoder-decoder of the pruning study's "base128" and "w96" series."""
    net, (c1, c2, c3, c4) = Net(side), widths
    for channels in (c1, c2, c3, c4):
        net.conv(channels, 3, 2)
    net.conv(c4, 3)
    for channels in (c3, c2, c1):
        net.upsample().conv(channels, 3)
    return net.conv(1).ends()


def link_resnet34(side: int, width: float = 1.0) -> Net:
    """The study's "link_r34": ResNet-34 encoder, LinkNet decoder; `width` scales all channels."""
    net = Net(side).conv(_scaled(64, width), 7, 2)
    skips = [(net.side, net.channels)]
    net.held = net.size
    net.pool(3)
    for channels, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            first = stride if block == 0 else 1
            if first == 2:
                shortcut = net.branch().conv(_scaled(channels, width), 1, 2)
                net.works += shortcut.works
            net.conv(_scaled(channels, width), 3, first).conv(_scaled(channels, width), 3).add()
        skips.append((net.side, net.channels))
    for (at, skip), channels in zip(reversed(skips[:-1]), (512, 256, 128, 64), strict=True):
        net.upsample().conv(_scaled(channels, width), 3)
        net.works += Net(at, skip).conv(_scaled(channels, width)).works
        net.add().conv(_scaled(channels, width), 3)
    return net.conv(1).ends()


def mobilenet_v1(side: int, width: float = 1.0) -> Net:
    net = Net(side).conv(int(32 * width), 3, 2)
    plan = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5), (1024, 2), (1024, 1))
    for channels, stride in plan:
        net.depthwise(3, stride).conv(int(channels * width))
    return net.classify(1001)


def inverted(net: Net, channels: int, expansion: int, stride: int, kernel: int, fused: bool = False) -> None:
    """MobileNetV2's block; `fused`: one dense kernel in place of the first two (EfficientNet-EdgeTPU)."""
    before = (net.side, net.channels)
    if fused:
        net.conv(net.channels * expansion, kernel, stride)
    else:
        if expansion > 1:
            net.conv(net.channels * expansion)
        net.depthwise(kernel, stride)
    net.conv(channels)
    if (net.side, net.channels) == before:
        net.add()


def mobile(
    side: int, stem: int, plan: tuple[tuple[int, int, int, int, int], ...], head: int, width: float = 1.0,
    depth: float = 1.0, scale_ends: bool = True, separable: int | None = None,
) -> Net:  # fmt: skip
    """Networks of inverted bottlenecks. `plan`: (expansion, channels, repeats, stride, kernel), kernel < 0 for fused.

    `separable`: channels of a depthwise-separable convolution behind the stem. `scale_ends` applies `width` to stem
    and head, and `depth` to the first and last stage.
    """
    net = Net(side).conv(_eight(stem * width) if scale_ends else stem, 3, 2)
    if separable is not None:
        net.depthwise().conv(separable)
    for index, (expansion, channels, repeats, stride, kernel) in enumerate(plan):
        inner = scale_ends or index not in (0, len(plan) - 1)
        for repeat in range(math.ceil(repeats * depth) if inner else repeats):
            first = stride if repeat == 0 else 1
            inverted(net, _eight(channels * width), expansion, first, abs(kernel), fused=kernel < 0)
    return net.conv(_eight(head * width) if scale_ends else head)


MOBILENET_V2 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)  # fmt: skip
MNASNET = (
    (3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENTNET = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENTNET_EDGETPU = (
    (4, 24, 1, 1, -3), (8, 32, 2, 2, -3), (8, 48, 4, 2, -3), (8, 96, 5, 2, 5), (8, 144, 4, 1, 5), (8, 192, 2, 2, 5),
)  # fmt: skip


def squeezenet(side: int, version: str) -> Net:
    late = version == "1.0"
    net = Net(side).conv(96 if late else 64, 7 if late else 3, 2, pad=False).pool(3)
    pools = (2, 6) if late else (1, 3)
    for index, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
        net.conv(squeeze)
        net.concat(net.branch().conv(4 * squeeze), net.branch().conv(4 * squeeze, 3))
        if index in pools:
            net.pool(3)
    net.conv(1000)
    before = net.size
    net.side = 1
    return net.other(before).ends()


def resnet(side: int, blocks: tuple[int, ...]) -> Net:
    net = Net(side).conv(64, 7, 2).pool(3)
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and block == 0 else 1
            if block == 0:
                net.works += net.branch().conv(256 * 2**stage, 1, stride).works
            net.conv(64 * 2**stage).conv(64 * 2**stage, 3, stride).conv(256 * 2**stage).add()
    return net.classify()


def vgg(side: int, blocks: tuple[int, ...]) -> Net:
    net = Net(side)
    for count, channels in zip(blocks, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            net.conv(channels, 3)
        net.pool()
    return net.dense(4096).dense(4096).dense(1000)


def densenet121(side: int) -> Net:
    net = Net(side).conv(64, 7, 2).pool(3)
    for stage, count in enumerate((6, 12, 24, 16)):
        for _ in range(count):
            # The batch norm in front of a kernel stays two operators: MUL and ADD.
            grown = net.branch().other().other().conv(128).conv(32, 3)
            net.works += grown.works
            net.channels += 32
            net.other()
        if stage < 3:
            net.other().other().conv(net.channels // 2).pool()
    return net.classify()


def inception_v1(side: int) -> Net:
    net = Net(side).conv(64, 7, 2).pool(3).conv(64).conv(192, 3).pool(3)
    plan = (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    )  # fmt: skip
    for row in plan:
        if row is None:
            net.pool(3)
            continue
        a, b0, b1, c0, c1, d = row
        net.concat(
            net.branch().conv(a),
            net.branch().conv(b0).conv(b1, 3),
            net.branch().conv(c0).conv(c1, 3),
            net.branch().pool(3, 1).conv(d),
        )
    return net.classify(1001)


def unet_mobilenet_v2(side: int) -> Net:
    """The segmentation tutorial's network: a MobileNetV2 encoder, transposed convolutions up to the input's size."""
    net = mobile(side, 32, MOBILENET_V2, 1280)
    net.works.pop()
    net.channels = 320
    for channels, skip in ((512, 576), (256, 192), (128, 144), (64, 96)):
        net.up_conv(channels)
        net.channels += skip
        net.other()
    return net.up_conv(3).ends()


def efficientdet(side: int, width: float, depth: float, channels: int, cells: int, heads: int) -> Net:
    """EfficientDet-Lite: EfficientNet-Lite backbone, BiFPN, box and class heads over five levels; raw outputs."""
    net = mobile(side, 32, EFFICIENTNET, 1280, width, depth, scale_ends=False)
    net.works.pop()
    for source in (_eight(40 * width), _eight(112 * width), _eight(320 * width)):
        net.works += Net(side // 8, source).conv(channels).works
    levels = [math.ceil(side / 2**level) for level in range(3, 8)]
    for _ in range(cells):
        for at in (*levels[-2::-1], *levels[1:]):
            net.works += Net(at, channels).add().add().depthwise().conv(channels).other().works
    for outputs in (36, 810):
        for at in levels:
            head = Net(at, channels)
            for _ in range(heads):
                head.depthwise().conv(channels)
            head.depthwise().conv(outputs)
            net.leaving.add(head.works[-1])
            net.works += head.works
    net.bytes_out = sum(at * at * (36 + 810) for at in levels)
    return net


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _eight(channels: float) -> int:
    """Rounded to a multiple of 8, but not down by more than a tenth, as the MobileNet family does."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
