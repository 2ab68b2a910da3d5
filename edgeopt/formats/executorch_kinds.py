"""What the operators of a .pte file do to values."""

from __future__ import annotations

#: Delegated operators that move or convert values and compute nothing.
MOVEMENT = {
    "Convert", "StaticTranspose", "StaticReshape", "StaticSlice", "StaticConstantPad", "Copy", "Concatenate2",
    "Concatenate3", "Concatenate4", "Concatenate5",
}  # fmt: skip
#: The same for portable kernels, overloads left out.
PORTABLE_MOVEMENT = {
    "aten.view_copy", "aten.permute_copy", "aten.transpose_copy", "aten.t_copy", "aten.expand_copy", "aten.cat",
    "aten.slice_copy", "aten.select_copy", "aten.squeeze_copy", "aten.unsqueeze_copy", "aten.split_copy",
    "aten.split_with_sizes_copy", "aten.unbind_copy", "aten.clone", "aten._to_copy", "aten.stack", "aten.full",
    "aten.full_like", "aten.scalar_tensor", "aten.constant_pad_nd", "aten.index", "aten.index_select", "aten.gather",
    "aten.copy", "aten.repeat", "aten.flip", "aten.detach_copy", "aten.alias_copy", "aten.as_strided_copy",
    "aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.roll", "aten.empty", "aten.arange", "executorch_prim.et_view",
    "dim_order_ops._to_dim_order_copy", "dim_order_ops._clone_dim_order", "dim_order_ops._empty_dim_order",
    "quantized_decomposed.quantize_per_tensor", "quantized_decomposed.dequantize_per_tensor",
}  # fmt: skip
