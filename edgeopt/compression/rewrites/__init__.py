"""Operators in equivalent forms that more accelerators take. Each is proven on the float model before it is kept."""

from __future__ import annotations

from importlib import import_module

from edgeopt.compression.rewrites.base import Applied, Rewrite, Suggestion

__all__ = ["REWRITES", "Applied", "Rewrite", "Suggestion", "load_rewrite"]

#: In the order in which they are applied.
REWRITES: dict[str, str] = {
    "unroll-recurrent": "edgeopt.compression.rewrites.recurrent:UnrollRecurrent",
    "group-norm": "edgeopt.compression.rewrites.group_norm:GroupNorm",
    "gelu-tanh": "edgeopt.compression.rewrites.gelu:GeluTanh",
    "leaky-relu": "edgeopt.compression.rewrites.piecewise:LeakyRelu",
    "absolute": "edgeopt.compression.rewrites.piecewise:Absolute",
    "clamp": "edgeopt.compression.rewrites.piecewise:Clamp",
    "adaptive-pool": "edgeopt.compression.rewrites.pooling:AdaptivePool",
    "channel-mean": "edgeopt.compression.rewrites.pooling:ChannelMean",
    "align-corners": "edgeopt.compression.rewrites.resize:AlignCorners",
    "nearest-factor": "edgeopt.compression.rewrites.resize:NearestFactor",
    "mirror-pad": "edgeopt.compression.rewrites.padding:MirrorPad",
    "plain-transposed-conv": "edgeopt.compression.rewrites.convolution:PlainTransposedConv",
    "conv1d-as-2d": "edgeopt.compression.rewrites.convolution:Conv1dAs2d",
    "linear-as-conv": "edgeopt.compression.rewrites.convolution:LinearAsConv",
}


def load_rewrite(name: str) -> Rewrite:
    """A rewrite; imports its module now. The name must be a key of `REWRITES`."""
    module, _, attribute = REWRITES[name].partition(":")
    made: Rewrite = getattr(import_module(module), attribute)()
    return made
