"""A .tflite file as the Edge TPU's compiler sees it: operators, options, shapes, and which tensors are constant.

`edgeopt.formats.litert` tells people what is in a file; the rules of the compiler need more of it (options of every
operator, values of small constants, versions), and they need it from files of any converter.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from edgeopt.errors import UsageError
from edgeopt.formats.litert import layer_of, readable

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_IDENTIFIER = b"TFL3"
_MOST_ELEMENTS = 2**48
#: What reading a damaged FlatBuffer can raise.
_DAMAGE = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, UnicodeDecodeError)
#: Custom operator that the compiler puts in the place of everything that it took.
COMPILED = "edgetpu-custom-op"

Option = int | float | bool | None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the graph.

    Attributes:
        shape: as stored, dynamic dimensions as 1; they are -1 in `signature`.
        dtype: in lower case: "int8", "float32".
        content: "activation", "constant" (bytes inside the FlatBuffer), "external" (a constant behind it, where the
            compiler's parser does not look) or "state" (kept from one inference to the next).
        integers: the values of a constant of int32 or int64.
        is_zero: whether a quantized constant is zero throughout.
        buffer: number of the buffer; constants that share one share it.
    """

    name: str
    shape: tuple[int, ...]
    signature: tuple[int, ...]
    dtype: str
    content: Literal["activation", "constant", "external", "state"]
    integers: tuple[int, ...] | None
    is_zero: bool
    buffer: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes, where it is quantized to 8 bits or has a known wider type."""
        return self.elements * _WIDTHS.get(self.dtype, 1)


_WIDTHS = {"float32": 4, "int32": 4, "uint32": 4, "float16": 2, "int16": 2, "int64": 8, "float64": 8}


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator: `name` is unique in the file, `code` the builtin's number, `options` the builtin options' fields.

    `inputs` keeps None for an optional input that is left out.
    """

    name: str
    layer: str | None
    type: str
    code: int
    version: int
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Option]
    is_custom: bool


@dataclass(frozen=True, slots=True)
class Graph:
    """The main graph of a file. `inputs` and `outputs` are tensor numbers."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def inputs_of(self, operator: Operator) -> tuple[Tensor | None, ...]:
        return tuple(None if i is None else self.tensors[i] for i in operator.inputs)

    def outputs_of(self, operator: Operator) -> tuple[Tensor, ...]:
        return tuple(self.tensors[i] for i in operator.outputs)

    def activations_of(self, operator: Operator) -> Iterator[Tensor]:
        """What the operator reads and writes at run time, without constants and state."""
        yield from (t for t in self.inputs_of(operator) if t is not None and t.content == "activation")
        yield from self.outputs_of(operator)


def read(path: Path) -> Graph:
    """Read the main graph of a .tflite file without running it.

    Raises:
        UsageError: the file is not a .tflite file, or it is corrupt or truncated.
    """
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    if data[4:8] != _IDENTIFIER:
        raise UsageError("is not a LiteRT file, or it is truncated", where=str(path), fix="export it again")
    try:
        return _graph(schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0)))
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=str(path), fix="export it again") from error


def _graph(model: schema.ModelT) -> Graph:
    main = model.subgraphs[0]
    stored, listed = main.tensors or [], main.operators or []
    inputs, outputs = (_indices(vector, len(stored)) for vector in (main.inputs, main.outputs))
    computed = {i for operator in listed for i in _indices(operator.outputs, len(stored))} | set(inputs)
    tensors = tuple(
        _tensor(tensor, model.buffers[tensor.buffer], number in computed) for number, tensor in enumerate(stored)
    )
    names: Counter[str] = Counter()
    operators = tuple(_operator(operator, model, tensors, names) for operator in listed)
    return Graph(tensors, operators, inputs, outputs)


def _list(vector: object) -> list[int]:
    return [] if vector is None else list(cast("list[int]", vector))


def _indices(vector: object, count: int) -> tuple[int, ...]:
    """Numbers of tensors, which a damaged file can put anywhere."""
    numbers = tuple(int(i) for i in _list(vector))
    if not all(0 <= i < count for i in numbers):
        raise ValueError("a tensor that is not there")
    return numbers


def _tensor(tensor: schema.TensorT, buffer: schema.BufferT, is_computed: bool) -> Tensor:
    stored = tuple(int(d) for d in _list(tensor.shape))
    signature = tuple(int(d) for d in _list(tensor.shapeSignature)) or stored
    shape = tuple(d if d >= 0 else 1 for d in stored)  # files of old converters have -1 here, too
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError("a tensor that no machine can hold")
    dtype = _constant_name("TensorType", tensor.type).lower()
    values = None if buffer.data is None or is_computed else np.asarray(buffer.data, dtype=np.uint8)
    content: Literal["activation", "constant", "external", "state"] = "activation"
    if tensor.isVariable:
        content = "state"
    elif values is not None and values.size:
        content = "constant"
    elif buffer.offset > 1 and not is_computed:
        content = "external"
    integers = None
    if content == "constant" and dtype in ("int32", "int64") and values is not None:
        integers = tuple(int(v) for v in values.view(f"<i{8 if dtype == 'int64' else 4}"))
    return Tensor(
        name=(tensor.name or b"").decode(),
        shape=shape,
        signature=signature,
        dtype=dtype,
        content=content,
        integers=integers,
        is_zero=content == "constant" and values is not None and _is_zero(values, tensor),
        buffer=int(tensor.buffer),
    )


def _is_zero(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], tensor: schema.TensorT) -> bool:
    points = tensor.quantization.zeroPoint if tensor.quantization is not None else None
    zero = int(points[0]) if points is not None and len(points) else 0
    return bool(np.all(values == zero % 256))


def _operator(
    operator: schema.OperatorT, model: schema.ModelT, tensors: tuple[Tensor, ...], names: Counter[str]
) -> Operator:
    code = model.operatorCodes[operator.opcodeIndex]
    # The second field exists since there are more than 127 operators.
    number = max(int(code.builtinCode), int(code.deprecatedBuiltinCode))
    builtin = _builtin(number)
    is_custom = builtin == "CUSTOM"
    kind = (code.customCode or b"").decode() if is_custom else builtin
    inputs, outputs = _list(operator.inputs), _indices(operator.outputs, len(tensors))
    _indices([i for i in inputs if i >= 0], len(tensors))
    base = readable(tensors[outputs[0]].name) if outputs else ""
    base = base or kind
    fields = vars(operator.builtinOptions) if operator.builtinOptions is not None else {}
    return Operator(
        name=_unique(base, names),
        layer=layer_of(base) if base != kind else None,
        type=kind,
        code=number,
        version=int(code.version),
        inputs=tuple(int(i) if i >= 0 else None for i in inputs),
        outputs=outputs,
        options={name: value for name, value in fields.items() if isinstance(value, int | float | bool)},
        is_custom=is_custom,
    )


def _builtin(number: int) -> str:
    """The operator's name; one for numbers that came after our own schema, too."""
    try:
        return _constant_name("BuiltinOperator", number)
    except ValueError:
        return f"BUILTIN_{number}"


def _unique(base: str, names: Counter[str]) -> str:
    """As `edgeopt.formats.litert` numbers operators that share a tensor name."""
    name = base
    while names[name]:
        name = f"{base}:{names[base]}"
        names[base] += 1
    names[name] += 1
    return name


def _constant_name(enumeration: str, number: int) -> str:
    from ai_edge_litert import schema_py_generated as schema

    for name, value in vars(getattr(schema, enumeration)).items():
        if not name.startswith("_") and value == number:
            return str(name)
    raise ValueError(f"{enumeration} has no {number}")
