"""int8 activations for a Core ML program: which tensors, in which ranges, as pairs of quantize and dequantize.

The Neural Engine computes in int8 where an operator stands between such pairs (coremltools' guide, "Quantization",
which names conv, linear, add and pooling, each with the activation that follows it). coremltools' own pass needs macOS
to see the activations, takes their extremes, and stops in front of a ReLU6; here ranges come from any estimator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.calibration.ranges import Range
from edgeopt.exporter.coreml_weights import Exempt
from edgeopt.formats.coreml_kinds import FUSED_ACTIVATIONS, INT8_KERNELS
from edgeopt.types import Scheme

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Block, Operation, Program, Var

#: They pass values through: input and output have one scale.
_SAME_RANGE = ("concat", "max_pool")
#: The finest step that an fp16 scale can hold without losing digits.
_FINEST = 2.0**-14


def name_relu6(program: Program) -> None:
    """`clip` to 0..6 -> `relu6`, which is one of the activations that the Neural Engine fuses."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813

    block = program.functions["main"]
    with block:
        for op in list(block.operations):
            if op.op_type != "clip" or op.alpha is None or op.beta is None or (op.alpha.val, op.beta.val) != (0, 6):
                continue
            with mb.set_before_op(op):
                new = mb.relu6(x=op.x, name=op.name)
            _swap(block, op, new)


def _swap(block: Block, op: Operation, new: Var) -> None:
    name = op.outputs[0].name
    block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
    block.remove_ops([op])
    new.name = name


def wanted(program: Program, exempt: Exempt) -> tuple[str, ...]:
    """Names of the variables that shall be int8, in program order."""
    block = program.functions["main"]
    outputs = {var.name for var in block.outputs}
    names: dict[str, None] = {}
    for op in block.operations:
        if op.op_type not in INT8_KERNELS or exempt(op):
            continue
        read = [var for var in (op.inputs[key] for key in INT8_KERNELS[op.op_type]) if _is_activation(var)]
        if len(read) < len(INT8_KERNELS[op.op_type]):
            continue  # a constant is added, which the kernel does not take
        names.update({var.name: None for var in read})
        last = _with_activation(op)
        if last.outputs[0].name not in outputs and not all(exempt(user) for user in last.outputs[0].child_ops):
            names[last.outputs[0].name] = None
    return tuple(names)


def _is_activation(var: Var) -> bool:
    from coremltools.converters.mil.mil import types

    constant = var.op is not None and (var.op.op_type == "const" or var.op.op_type.startswith("constexpr_"))
    return not constant and types.is_float(var.dtype)


def _with_activation(op: Operation) -> Operation:
    users = op.outputs[0].child_ops
    return users[0] if len(users) == 1 and users[0].op_type in FUSED_ACTIVATIONS else op


def share_ranges(program: Program, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges, with one for all that an operator passes through unchanged: the widest."""
    shared = dict(ranges)
    groups = [
        [name for name in (*_read(op), op.outputs[0].name) if name in shared]
        for op in program.functions["main"].operations
        if op.op_type in _SAME_RANGE
    ]
    changed = True
    while changed:
        changed = False
        for group in groups:
            parts = [shared[name] for name in group]
            if len(set(parts)) > 1:
                widest = Range(min(r.min for r in parts), max(r.max for r in parts))
                shared.update(dict.fromkeys(group, widest))
                changed = True
    return shared


def _read(op: Operation) -> Iterable[str]:
    for value in op.inputs.values():
        for var in value if isinstance(value, (list, tuple)) else (value,):
            if var is not None:
                yield var.name


def quantize_activations(program: Program, ranges: Mapping[str, Range], scheme: Scheme, exempt: Exempt) -> None:
    """Put a pair of quantize and dequantize behind each of these variables, in place; exempt operators read in front
    of it."""
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813

    block = program.functions["main"]
    with block:
        for var in _variables(block, ranges):
            users = [user for user in var.child_ops if user.enclosing_block is block and not exempt(user)]
            if not users:
                continue
            scale, zero_point, dtype = parameters(ranges[var.name], scheme)
            real = np.float16(scale) if var.dtype.__name__ == "fp16" else np.float32(scale)
            whole = np.uint8(zero_point) if dtype == "uint8" else np.int8(zero_point)
            with mb.set_before_op(_first(block, users)):
                stored = mb.quantize(
                    input=var, scale=real, zero_point=whole, output_dtype=dtype, name=f"{var.name}_quantized"
                )
                back = mb.dequantize(input=stored, scale=real, zero_point=whole, name=f"{var.name}_dequantized")
            for user in users:
                _read_instead(user, var, back)


def _variables(block: Block, names: Iterable[str]) -> list[Var]:
    found = dict(block.inputs)
    found.update({var.name: var for op in block.operations for var in op.outputs})
    return [found[name] for name in names if name in found]


def _first(block: Block, users: list[Operation]) -> Operation:
    return next(op for op in block.operations if op in users)


def _read_instead(user: Operation, old: Var, new: Var) -> None:
    changed = {
        key: [new if part is old else part for part in value] if isinstance(value, (list, tuple)) else new
        for key, value in user.inputs.items()
        if value is old or (isinstance(value, (list, tuple)) and any(part is old for part in value))
    }
    user.set_inputs(no_check_var_types=True, **changed)


def parameters(range_: Range, scheme: Scheme) -> tuple[float, int, str]:
    """Scale, zero point and type of a tensor with that range.

    A symmetric scheme has the zero point 0: tensors that are never negative are then uint8 over 0..255, the others
    int8 over -127..127, as in coremltools' own training-time quantizer. Otherwise int8 with a free zero point.
    """
    if scheme.activation_symmetric:
        one_sided = range_.min >= 0
        bound = range_.max if one_sided else max(-range_.min, range_.max)
        scale = _step(bound / (255 if one_sided else 127), scheme)
        return scale, 0, "uint8" if one_sided else "int8"
    scale = _step((range_.max - range_.min) / 255, scheme)
    return scale, int(np.clip(round(-128 - range_.min / scale), -128, 127)), "int8"


def _step(scale: float, scheme: Scheme) -> float:
    if scheme.scale == "power-of-two":
        scale = float(np.exp2(np.ceil(np.log2(scale))))
    return max(float(np.float16(scale)), _FINEST)
