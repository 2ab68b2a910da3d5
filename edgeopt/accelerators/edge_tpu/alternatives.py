"""What to write instead of operators that the Edge TPU has no place for."""

from __future__ import annotations

#: Operator -> what computes the same, or nearly, with operators of the published table.
INSTEAD = {
    "ABS": "maximum(x, -x)",
    "BATCH_MATMUL": "products of two computed tensors have no place on the Edge TPU: use convolutions",
    "DEPTH_TO_SPACE": "a transposed convolution",
    "DIV": "multiply by the reciprocal",
    "ELU": "ReLU, or PReLU with one slope per channel",
    "GELU": "ReLU, or x * sigmoid(1.702 * x)",
    "HARD_SWISH": "x * ReLU6(x + 3) / 6 spelled out, or ReLU6",
    "LEAKY_RELU": "PReLU with one slope per channel",
    "MIRROR_PAD": "zero padding",
    "NEG": "multiply by -1",
    "PADV2": "PAD, with zeros",
    "POW": "MUL for squares",
    "SPLIT_V": "SPLIT into equal parts, or SLICE",
    "SQRT": "RSQRT and MUL",
    "UNPACK": "SPLIT and RESHAPE",
}
