"""Weights of a Core ML program -> integers or tables that Core ML expands when it loads the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.codebooks import code_weight
from edgeopt.calibration.weights import QuantizedWeight, quantize_weight, rows_to_shape, to_rows
from edgeopt.exporter.coreml_scheme import BLOCKWISE, minimum_ios
from edgeopt.types import Array, Scheme

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Operation, Program, Var

#: Operator -> parameters that are weights, each with the axis of the output channels.
_WEIGHTS: dict[str, tuple[tuple[str, int], ...]] = {
    "conv": (("weight", 0),),
    "conv_transpose": (("weight", 1),),
    "gather": (("x", 0),),
    "linear": (("weight", 0),),
    "lstm": (("weight_ih", 0), ("weight_hh", 0), ("weight_ih_back", 0), ("weight_hh_back", 0)),
    "matmul": (("x", -2), ("y", -1)),
    "rnn": (("weight_ih", 0), ("weight_hh", 0)),
}
#: Smaller ones cost more in scales and tables than they save.
_MIN_WEIGHTS = 64
#: Weights that a 16-entry table should serve at least: its 32 bytes are then 6 % of their codes.
_PER_TABLE = 1024
#: Channels that share a table at least: Apple found groups of 8 and 16 accurate and no slower, finer ones slower
#: (apple.github.io/coremltools/docs-guides/source/opt-palettization-perf.html).
_MIN_CHANNELS = 8

#: With fewer weights per output channel than this, a layer (depthwise convolutions, most first ones) gets 8-bit
#: integers instead of codes: these are few per cent of a network's weights, and its greatest loss.
_FEWEST_FOR_TABLES = 32

Exempt = Callable[["Operation"], bool]


def compress_weights(program: Program, scheme: Scheme, exempt: Exempt) -> dict[str, str]:
    """Replace the float weights of a program in place.

    A weight that an exempt operator reads stays as it is. Where the scheme's form does not fit a weight (groups that
    do not divide it), it stays float.

    Returns: name of an operator whose weight stayed float -> why.
    """
    kept: dict[str, str] = {}
    for const, readers, axis in list(_weights(program)):
        reason = _why_not(const, readers, scheme, exempt)
        if reason is None:
            new = _compressed(const, scheme, axis)
            reason = None if new is not None else f"its weights don't divide into groups of {scheme.group_size}"
            if new is not None:
                _replace(const, new)
        if reason is not None:
            kept.update({reader.outputs[0].name: reason for reader in readers})
    return kept


def _weights(program: Program) -> Iterator[tuple[Operation, list[Operation], int]]:
    """Every constant that is somewhere a weight, all operators that read it, and its channels' axis."""
    seen: set[str] = set()
    for function in program.functions.values():
        for op in _all_operations(function.operations):
            for parameter, axis in _WEIGHTS.get(op.op_type, ()):
                var = op.inputs.get(parameter)
                const = var.op if var is not None else None
                if const is None or const.op_type != "const" or var.name in seen:
                    continue
                seen.add(var.name)
                yield const, list(var.child_ops), axis


def _all_operations(operations: list[Operation]) -> Iterator[Operation]:
    for op in operations:
        yield op
        for block in op.blocks:
            yield from _all_operations(block.operations)


def _why_not(const: Operation, readers: list[Operation], scheme: Scheme, exempt: Exempt) -> str | None:
    values = const.outputs[0].val
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.ndim < 2:
        return "its weight is no floating-point matrix"
    if any(exempt(reader) for reader in readers):
        return "kept in float as asked"
    if values.size < _MIN_WEIGHTS and scheme.activations == "none":
        return f"its {values.size} weights are too few to save anything"
    if not np.isfinite(values).all():
        return "its weights are not all finite"
    return None


def _compressed(const: Operation, scheme: Scheme, axis: int) -> Var | None:
    """The operator that stands for the weight from now on; None where the scheme does not fit."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813  (its own name in every example)

    values = const.outputs[0].val
    weight, axis = values.astype(np.float32), axis % values.ndim
    name, ios = f"{const.name}_compressed", minimum_ios(scheme)
    with const.enclosing_block, mb.set_before_op(const):
        if scheme.weight_values != "linear" and weight.size // weight.shape[axis] >= _FEWEST_FOR_TABLES:
            return _tabled(weight, scheme, axis, values.dtype, name)
        if scheme.weight_values != "linear":
            scheme = replace(scheme, precision="w8", weight_values="linear", weight_granularity="per-channel")
        if ios < BLOCKWISE:
            coded = quantize_weight(weight, scheme, axis)
            return mb.constexpr_affine_dequantize(
                quantized_data=coded.values,
                zero_point=coded.zero_point,
                scale=coded.scale.astype(values.dtype),
                axis=np.int32(axis),
                name=name,
            )
        return _blockwise(weight, scheme, axis, values.dtype, name)


def _blockwise(weight: Array, scheme: Scheme, axis: int, dtype: np.dtype[np.float32], name: str) -> Var | None:
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil.types.type_mapping import np_int4_dtype

    grouped = scheme.weight_granularity == "per-group"
    if grouped and (axis != 0 or weight.shape[1] % scheme.group_size or weight.ndim != 2):
        return None
    coded = quantize_weight(weight, scheme, axis)
    shape = _scale_shape(coded, weight.shape)
    stored = coded.values.astype(np_int4_dtype) if scheme.weight_bits == 4 else coded.values
    zero_point = coded.zero_point.reshape(shape)
    offset = zero_point.astype(np_int4_dtype) if scheme.weight_bits == 4 else zero_point
    return mb.constexpr_blockwise_shift_scale(
        data=stored,
        scale=coded.scale.astype(dtype).reshape(shape),
        offset=None if scheme.weight_symmetric else offset,
        name=name,
    )


def _scale_shape(coded: QuantizedWeight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Scales with the rank of the weight, 1 along the axes that share one."""
    if coded.group_size is not None:
        return shape[0], shape[1] // coded.group_size
    return tuple(size if axis == coded.axis else 1 for axis, size in enumerate(shape))


def _tabled(weight: Array, scheme: Scheme, axis: int, dtype: np.dtype[np.float32], name: str) -> Var:
    """Codes with one table per weight, as iOS 16 has it; or (iOS 18) one per group of channels, whose values each
    channel scales by its largest magnitude, so that channels of different size can share a table."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil.types.type_mapping import np_uint4_dtype
    from coremltools.optimize._utils import pack_elements_into_bits

    if scheme.weight_granularity == "per-tensor":
        coded = code_weight(weight, scheme, None)
        return mb.constexpr_lut_to_dense(
            indices=pack_elements_into_bits(coded.codes, scheme.weight_bits),
            lut=coded.table.astype(dtype).reshape(-1),
            shape=np.array(weight.shape, dtype=np.uint32),
            name=name,
        )
    rows = to_rows(weight, axis)
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(dtype)
    scale = np.where(largest > 0, largest, np.ones_like(largest))
    shared = _channels_per_table(*rows.shape)
    coded = code_weight((rows / scale).reshape(rows.shape[0] // shared, -1), scheme, 0)
    codes = rows_to_shape(coded.codes.reshape(rows.shape), weight.shape, axis)
    along_channels = [1] * weight.ndim
    along_channels[axis] = -1
    table = mb.constexpr_lut_to_dense(
        indices=codes.astype(np_uint4_dtype) if scheme.weight_bits == 4 else codes,
        lut=coded.table.astype(dtype).reshape(*along_channels, coded.table.shape[-1], 1),
        name=f"{name}_table",
    )
    return mb.constexpr_blockwise_shift_scale(data=table, scale=scale.reshape(along_channels), name=name)


def _channels_per_table(channels: int, weights: int) -> int:
    """The smallest divisor of the channels with which a table serves enough weights; all of them where none does."""
    fitting = (n for n in range(_MIN_CHANNELS, channels) if channels % n == 0 and n * weights >= _PER_TABLE)
    return next(fitting, channels)


def _replace(const: Operation, new: Var) -> None:
    block = const.enclosing_block
    block.replace_uses_of_var_after_op(
        anchor_op=const, old_var=const.outputs[0], new_var=new, no_check_var_types=True, force_replace=True
    )
    block.remove_ops([const])
