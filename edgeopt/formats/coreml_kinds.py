"""What kind of work a MIL operator does, by its name."""

from __future__ import annotations

#: Only moves values: nothing is computed.
MOVEMENT = frozenset(
    {
        "batch_to_space", "concat", "crop", "depth_to_space", "expand_dims", "flatten2d", "gather",
        "gather_along_axis", "gather_nd", "identity", "pad", "pixel_shuffle", "pixel_unshuffle", "reshape", "reverse",
        "select", "slice_by_index", "slice_by_size", "slice_update", "sliding_windows", "space_to_batch",
        "space_to_depth", "split", "squeeze", "stack", "tile", "transpose",
    }
)  # fmt: skip
#: Goes from one number format to another.
CONVERSIONS = frozenset({"cast", "dequantize", "quantize"})
#: Operators that the Neural Engine has in int8 between `dequantize` and `quantize` (apple.github.io/coremltools,
#: "Quantization Overview" and the pattern passes of coremltools), with their inputs that are activations.
INT8_KERNELS = {"add": ("x", "y"), "avg_pool": ("x",), "conv": ("x",), "linear": ("x",), "max_pool": ("x",)}
#: Activations that it computes in the same step.
FUSED_ACTIVATIONS = frozenset({"leaky_relu", "relu", "relu6", "scaled_tanh", "sigmoid", "tanh"})
#: Loops and branches.
CONTROL = frozenset({"cond", "while_loop"})
