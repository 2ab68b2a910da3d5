"""The step of layer widths at which a device's kernels work on full tiles."""

from __future__ import annotations

from edgeopt.device_profiles.schema import DeviceProfile
from edgeopt.types import Precision

#: Output channels of one tile of the matrix kernels.
NARROW_TILE, WIDE_TILE = 8, 16
#: Schemes whose layers multiply int8 by int8 (or by int4); the others store integers and compute in float.
INTEGER_ARITHMETIC: frozenset[Precision] = frozenset({"w8a8", "8da4w"})


def channel_multiple(profile: DeviceProfile, precision: Precision) -> int:
    """Channels by which a layer's width should step on this device.

    Every width between two steps costs as much as the upper one: the kernel computes the whole tile. The profile's own
    `channel_multiple` wins; else it follows from the fastest cores and the arithmetic of the scheme:

    - int8 with dot products: 16, the columns of XNNPACK's 4x16c4 `neondot` and 4x16c8 `neoni8mm` kernels and of the
      packed matrices of ONNX Runtime's MLAS (aligned to 16 columns);
    - int8 without: 8, the columns of XNNPACK's 2x8c8 `neon_mlal` kernels;
    - fp16 arithmetic: 16, XNNPACK's 6x16 `neonfp16arith` kernels;
    - fp32: 8, XNNPACK's 4x8 and 6x8 `neonfma` kernels;
    - an Ethos-U beside them: 16, whose feature maps are stored in bricks of 16 channels (NHCWB16).

    Sources: github.com/google/XNNPACK, src/configs/gemm-config.c (`nr` of each configuration);
    github.com/microsoft/onnxruntime, onnxruntime/core/mlas; Vela's architecture_features.py (`brick_sizes`).
    """
    if profile.channel_multiple is not None:
        return profile.channel_multiple
    if any("ethos-u" in accelerator.lower() for accelerator in profile.accelerators):
        return WIDE_TILE
    fastest = profile.clusters[0].features
    if precision in INTEGER_ARITHMETIC:
        return WIDE_TILE if "dotprod" in fastest or "i8mm" in fastest else NARROW_TILE
    return WIDE_TILE if precision == "fp16" and "fp16" in fastest else NARROW_TILE
