"""Runs a MIL program with torch, operator by operator, from the weights that the file holds.

It models what the file says: weights are expanded from their 8-bit, 4-bit or table form as Core ML does at load time,
`quantize` and `dequantize` round and saturate, and every result that the program types as fp16 is rounded to fp16. It
does not model how a device orders its sums: products are accumulated in float32, as the Neural Engine is not
documented to do, so results differ from a device's in the last bits of fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from edgeopt.errors import ConversionError
from edgeopt.formats.coreml_kinds import CONTROL, MOVEMENT
from edgeopt.formats.coreml_ops_math import MATH
from edgeopt.formats.coreml_ops_nn import NETWORK
from edgeopt.formats.coreml_ops_sequence import SEQUENCE
from edgeopt.formats.coreml_ops_shape import SHAPE
from edgeopt.formats.coreml_program import Block, Constant, Operation, Program
from edgeopt.formats.coreml_values import Arguments, Operator, Results, Value, as_tensor, round_half
from edgeopt.formats.coreml_weights import decode
from edgeopt.types import Array

OPERATORS: dict[str, Operator] = {**MATH, **NETWORK, **SEQUENCE, **SHAPE}

#: Told the name and the value of a floating-point variable as soon as it is computed.
Observer = Callable[[str, Array], None]


class Interpreter:
    """One program, ready to run. Not thread-safe.

    Args:
        program: what `edgeopt.formats.coreml_program.read_program` returned.
        rounding: whether results that the program types as fp16 are rounded to it. Off, it computes the network that
            the file stands for in float32, which calibration wants.

    Raises:
        ConversionError: the program has an operator that is unknown here; it is named with its layer.
    """

    def __init__(self, program: Program, *, rounding: bool = True) -> None:
        self._program = program
        self._rounding = rounding
        self._constants: dict[str, Value] = {}
        self._in_place: dict[int, Value] = {}
        self._prepare(program.main)
        self._last = _last_readers(program.main)

    def run(self, inputs: Mapping[str, Array], observe: Observer | None = None) -> dict[str, Array]:
        """Run once. Keys are the program's own names; float16 inputs and outputs are float16 arrays.

        Raises ConversionError naming the operator that could not be run.
        """
        values: dict[str, Value] = {}
        for feature, variable in zip(self._program.inputs, self._inputs(), strict=True):
            values[variable] = as_tensor(inputs[feature.name], _MIL_NAMES[feature.dtype])
            if observe is not None and feature.dtype.startswith("float"):
                observe(variable, np.asarray(inputs[feature.name], dtype=np.float32))
        with torch.inference_mode():
            self._execute(self._program.main, values, self._last, observe)
        return {
            feature.name: _as_array(values[name] if name in values else self._constants[name], feature.dtype)
            for feature, name in zip(self._program.outputs, self._program.main.outputs, strict=True)
        }

    def _inputs(self) -> Sequence[str]:
        """Variables of the function's inputs: they carry the names that the app sees."""
        return [feature.name for feature in self._program.inputs]

    def _prepare(self, block: Block) -> None:
        for op in block.operations:
            if op.is_constant:
                self._constants[op.name] = _expand(op, self._constants)
                continue
            if op.type not in OPERATORS and op.type not in CONTROL:
                raise ConversionError(
                    f"the Core ML reference does not know the operator {op.type}", where=_where(op, self._program)
                )
            for inner in op.blocks:
                self._prepare(inner)

    def _execute(
        self, block: Block, values: dict[str, Value], last: Mapping[int, Iterable[str]], observe: Observer | None
    ) -> None:
        for place, op in enumerate(block.operations):
            if op.is_constant:
                continue
            results = self._apply(op, values, observe)
            for variable, result in zip(op.outputs, results, strict=False):
                values[variable.name] = result
                if observe is not None and isinstance(result, torch.Tensor) and result.is_floating_point():
                    observe(variable.name, result.numpy())
            for name in last.get(place, ()):
                values.pop(name, None)

    def _apply(self, op: Operation, values: dict[str, Value], observe: Observer | None) -> Results:
        if op.type in CONTROL:
            return self._control(op, values, observe)
        arguments = Arguments(op, {key: self._values(given, values) for key, given in op.inputs.items()})
        try:
            results = OPERATORS[op.type](arguments)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ConversionError(
                f"the Core ML reference can't run {op.type}: {str(error).strip().partition(chr(10))[0]}",
                where=_where(op, self._program),
            ) from error
        outputs = results if isinstance(results, tuple) else (results,)
        if not self._rounding or op.type in MOVEMENT:
            return outputs
        typed = zip(op.outputs, outputs, strict=False)
        return tuple(
            round_half(value) if variable.type.dtype == "fp16" and isinstance(value, torch.Tensor) else value
            for variable, value in typed
        )

    def _values(self, given: Sequence[str | Constant], values: Mapping[str, Value]) -> list[Value]:
        found: list[Value] = []
        for item in given:
            if isinstance(item, str):
                found.append(values[item] if item in values else self._constants[item])
            else:
                if id(item) not in self._in_place:
                    self._in_place[id(item)] = _constant(item)
                found.append(self._in_place[id(item)])
        return found

    def _control(self, op: Operation, values: dict[str, Value], observe: Observer | None) -> Results:
        if op.type == "cond":
            (predicate,) = self._values(op.inputs["pred"], values)
            return self._run_block(op.blocks[0] if bool(predicate) else op.blocks[1], (), values, observe)
        condition, body = op.blocks
        state: Results = tuple(self._values(op.inputs["loop_vars"], values))
        while bool(self._run_block(condition, state, values, None)[0]):
            state = self._run_block(body, state, values, observe)
        return state

    def _run_block(self, block: Block, given: Results, outer: Mapping[str, Value], observe: Observer | None) -> Results:
        values = {**outer, **{v.name: value for v, value in zip(block.inputs, given, strict=True)}}
        self._execute(block, values, {}, observe)
        return tuple(self._values(block.outputs, values))


_MIL_NAMES = {"float32": "fp32", "float16": "fp16", "int32": "int32", "int8": "int8"}


def _as_array(value: Value, dtype: str) -> Array:
    if not isinstance(value, torch.Tensor):
        raise TypeError("an output that is no tensor")
    array: Array = value.numpy().astype(dtype)
    return array


def _last_readers(block: Block) -> dict[int, list[str]]:
    """Place of an operator -> variables that nothing reads after it."""
    last: dict[str, int] = {}
    for place, op in enumerate(block.operations):
        last.update(dict.fromkeys(op.read_names(), place))
    freed: dict[int, list[str]] = {}
    for name, place in last.items():
        if name not in block.outputs:
            freed.setdefault(place, []).append(name)
    return freed


def _where(op: Operation, program: Program) -> str:
    layer = program.layers.get(op.name)
    return f"operator {op.name!r}" + (f" of layer {layer!r}" if layer else "")


# --- constants -------------------------------------------------------------------------------------------------------


def _constant(constant: Constant) -> Value:
    value = constant.value
    return value if isinstance(value, str) else as_tensor(value, constant.type.dtype)


def _expand(op: Operation, known: Mapping[str, Value]) -> Value:
    """The value of a `const` or `constexpr_` operator, as Core ML expands it when it loads the file."""
    if op.type == "const":
        (given,) = op.inputs["val"]
        return known[given] if isinstance(given, str) else _constant(given)
    parts: dict[str, Array] = {}
    for key, (given, *_) in op.inputs.items():
        value = known[given] if isinstance(given, str) else _constant(given)
        if isinstance(value, torch.Tensor):
            parts[key] = value.numpy()
    if op.type not in _EXPANSIONS:
        raise ConversionError(f"the Core ML reference does not know {op.type}", where=f"operator {op.name!r}")
    shape = tuple(size for size in op.outputs[0].type.shape if size is not None)
    expanded = _EXPANSIONS[op.type](parts, shape)
    return as_tensor(np.ascontiguousarray(expanded), op.outputs[0].type.dtype)


def _affine(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    broadcast = [1] * len(shape)
    axis = int(parts["axis"])
    scale, zero_point = (
        part.reshape([*broadcast[:axis], -1, *broadcast[axis + 1 :]]) if part.ndim else part
        for part in (parts["scale"], parts["zero_point"])
    )
    real: Array = (parts["quantized_data"].astype(np.float32) - zero_point.astype(np.float32)) * scale
    return real


def _blockwise(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    data = parts["data"].astype(np.float32)
    offset = parts.get("offset")
    if offset is not None:
        data = data - _repeated(offset.astype(np.float32), shape)
    real: Array = data * _repeated(parts["scale"], shape)
    return real


def _repeated(values: Array, shape: tuple[int, ...]) -> Array:
    """Each value once for every element of its block."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis=axis)
    return values


def _table(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    indices, table = parts["indices"], parts["lut"]
    if table.ndim == 1:  # iOS 16: one table, codes packed
        bits = int(table.size).bit_length() - 1
        real: Array = table[decode(indices, f"uint{bits}" if bits < 8 else "uint8", shape)]
        return real
    if table.shape[-1] != 1:
        raise ConversionError("the Core ML reference does not know tables of vectors", where="constexpr_lut_to_dense")
    grid = np.indices(indices.shape)
    blocks = tuple(grid[axis] // (size // table.shape[axis]) for axis, size in enumerate(indices.shape))
    picked: Array = table[(*blocks, indices, 0)]
    return picked


def _cast(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    del shape
    return parts["source_val"]


def _sparse(parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    mask = parts["mask"]
    if mask.shape != shape:  # iOS 16 packs it
        mask = decode(mask, "uint1", shape)
    real = np.zeros(shape, dtype=parts["nonzero_data"].dtype)
    real[mask.astype(bool)] = parts["nonzero_data"]
    return real


_EXPANSIONS: dict[str, Callable[[Mapping[str, Array], tuple[int, ...]], Array]] = {
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _table,
    "constexpr_sparse_to_dense": _sparse,
}
