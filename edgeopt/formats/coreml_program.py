"""The MIL program inside an .mlpackage (format: apple/coremltools, mlmodel/format/MIL.proto and Model.proto)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import MissingError, UsageError
from edgeopt.formats.coreml_weights import BYTE_TYPES, PACKED_TYPES, WeightFile, decode
from edgeopt.types import Array

if TYPE_CHECKING:
    from coremltools.proto import MIL_pb2, Model_pb2

#: User-defined metadata in which edgeopt keeps the source layers: JSON, layer path -> names of operators (that is, of
#: their first outputs).
LAYERS_KEY = "edgeopt.layers"

#: Where the parts of a package lie (`Manifest.json` names them; coremltools and Xcode write no other layout).
SPEC = Path("Data", "com.apple.CoreML", "model.mlmodel")
WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")
MANIFEST = Path("Manifest.json")

#: What reading a damaged package can raise, protobuf's DecodeError (a ValueError's cousin) aside.
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, OverflowError)

_DTYPES = {
    "FLOAT16": "fp16", "FLOAT32": "fp32", "FLOAT64": "fp64", "BOOL": "bool", "STRING": "string",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ValueType:
    """Element type in MIL's words ("fp16", "int32", "bool", ...) and shape; None for a size that is not fixed.

    A list (of a recurrent loop) has the type "list".
    """

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Constant:
    """A value in the program, read from the weight file when it is first asked for."""

    type: ValueType
    immediate: Array | str | None
    offset: int | None
    weights: WeightFile | None

    @cached_property
    def value(self) -> Array | str:
        """Values of 4 bits and fewer are spread to bytes. Raises ValueError where the file doesn't hold it."""
        if self.immediate is not None:
            return self.immediate
        if self.weights is None or self.offset is None:
            raise ValueError("the package has no weight file")
        return self.weights.read(self.offset, self.type.dtype, _fixed(self.type.shape))

    @property
    def stored_bytes(self) -> int:
        if self.offset is not None and self.weights is not None:
            return self.weights.stored_bytes(self.offset)
        return self.immediate.nbytes if isinstance(self.immediate, np.ndarray) else 0


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    type: ValueType


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator. Parameters are names of variables or constants written in place, one tuple per parameter."""

    type: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[Variable, ...]
    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """Unique in the program: that of its first output."""
        return self.outputs[0].name if self.outputs else self.type

    @property
    def is_constant(self) -> bool:
        """Whether it only holds or expands a weight."""
        return self.type == "const" or self.type.startswith("constexpr_")

    def read_names(self) -> Iterator[str]:
        """Variables that it reads, those of inner blocks included."""
        for values in self.inputs.values():
            yield from (value for value in values if isinstance(value, str))
        for block in self.blocks:
            for inner in block.operations:
                yield from inner.read_names()
            yield from block.outputs


@dataclass(frozen=True, slots=True)
class Block:
    inputs: tuple[Variable, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Feature:
    """An input or output as the app sees it. A string in `shape` names a size that is not fixed."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """The main function of an .mlpackage.

    Attributes:
        version: of the specification; `minimum_ios` says what it asks of the phone.
        layers: name of an operator -> path of its source layer, where edgeopt wrote it.
        metadata: user-defined entries, edgeopt's own apart, and what people see of the description.
    """

    version: int
    opset: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    main: Block
    layers: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def minimum_ios(self) -> int:
        """The oldest system that reads it: iOS 15 reads specification 6, iOS 18 reads 9, the next is iOS 26, which
        reads 10 (coremltools' `ct.target`)."""
        return self.version + 9 if self.version <= 9 else self.version + 16


def missing() -> str | None:
    """Why packages can't be read on this machine; None where they can."""
    return None if find_spec("coremltools") else "Core ML files need coremltools; pip install 'edgeopt[apple]'"


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[None]:
    """coremltools warns of every package version that it was not tested with, and draws its own progress bars."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # its errors come as exceptions, too
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def read_spec(path: Path) -> Model_pb2.Model:
    """The description of the model, without its weights.

    Raises MissingError without coremltools, UsageError when the package is not one or is damaged.
    """
    if (reason := missing()) is not None:
        raise MissingError(reason)
    with quiet_coremltools():
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    if not (path / SPEC).is_file() or not (path / MANIFEST).is_file():
        raise UsageError("is not a Core ML package, or it lacks its model", where=str(path), fix="export it again")
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString((path / SPEC).read_bytes())
    except DecodeError as error:
        raise damaged(path) from error
    return spec


def damaged(path: Path) -> UsageError:
    return UsageError("is corrupt or truncated", where=str(path), fix="export it again")


def read_program(path: Path) -> Program:
    """Read the main function of an .mlpackage without running it.

    Raises:
        MissingError: coremltools is not installed.
        UsageError: it is no .mlpackage, not an ML program (a neural network of an old Core ML), or damaged.
    """
    spec = read_spec(path)
    if spec.WhichOneof("Type") != "mlProgram":
        kind = spec.WhichOneof("Type") or "nothing"
        raise UsageError(f"holds a {kind}, not an ML program", where=str(path), fix="export it again with edgeopt")
    try:
        return _program(spec, path)
    except DAMAGE as error:
        raise damaged(path) from error


def _program(spec: Model_pb2.Model, path: Path) -> Program:
    weights = WeightFile(path / WEIGHTS) if (path / WEIGHTS).is_file() else None
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    metadata = dict(spec.description.metadata.userDefined)
    layers = json.loads(metadata.pop(LAYERS_KEY, "{}"))
    return Program(
        version=spec.specificationVersion,
        opset=function.opset,
        inputs=tuple(_feature(f) for f in spec.description.input),
        outputs=tuple(_feature(f) for f in spec.description.output),
        main=_block(block, weights),
        layers={str(name): str(layer) for layer, names in layers.items() for name in names},
        metadata=metadata,
    )


def _feature(description: Model_pb2.FeatureDescription) -> Feature:
    kind = description.type.WhichOneof("Type")
    if kind != "multiArrayType":
        raise ValueError(f"{description.name} is a {kind}, not a multi-array")
    array = description.type.multiArrayType
    dtype = {65568: "float32", 65552: "float16", 131104: "int32", 131080: "int8"}[array.dataType]
    sizes: list[int | str] = [int(size) for size in array.shape]
    for axis, size in enumerate(array.shapeRange.sizeRanges):
        if size.lowerBound != size.upperBound:
            sizes[axis] = f"{description.name}_dim{axis}"
    return Feature(description.name, dtype, tuple(sizes))


def _block(block: MIL_pb2.Block, weights: WeightFile | None) -> Block:
    return Block(
        inputs=tuple(Variable(v.name, _type(v.type)) for v in block.inputs),
        operations=tuple(_operation(op, weights) for op in block.operations),
        outputs=tuple(block.outputs),
    )


def _operation(op: MIL_pb2.Operation, weights: WeightFile | None) -> Operation:
    inputs: dict[str, tuple[str | Constant, ...]] = {}
    # The parameters of `const` and of iOS 16's `constexpr_` operators are attributes; "name" is for people.
    for key, value in op.attributes.items():
        if key != "name":
            inputs[key] = (_constant(value, weights),)
    for key, argument in op.inputs.items():
        inputs[key] = tuple(
            binding.name if binding.WhichOneof("binding") == "name" else _constant(binding.value, weights)
            for binding in argument.arguments
        )
    return Operation(
        type=op.type,
        inputs=inputs,
        outputs=tuple(Variable(v.name, _type(v.type)) for v in op.outputs),
        blocks=tuple(_block(block, weights) for block in op.blocks),
    )


def _type(type_: MIL_pb2.ValueType) -> ValueType:
    kind = type_.WhichOneof("type")
    if kind != "tensorType":
        return ValueType(kind.removesuffix("Type") if kind else "none", ())
    from coremltools.proto import MIL_pb2

    name = MIL_pb2.DataType.Name(type_.tensorType.dataType)
    sizes = (d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in type_.tensorType.dimensions)
    return ValueType(_DTYPES.get(name, name.lower()), tuple(None if s is None else int(s) for s in sizes))


def _constant(value: MIL_pb2.Value, weights: WeightFile | None) -> Constant:
    type_ = _type(value.type)
    if value.WhichOneof("value") == "blobFileValue":
        return Constant(type_, None, int(value.blobFileValue.offset), weights)
    if value.immediateValue.WhichOneof("value") != "tensor":
        raise ValueError("a list or dictionary as a parameter")
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind == "strings":
        return Constant(type_, str(tensor.strings.values[0]), None, None)
    shape = _fixed(type_.shape)
    if kind == "bytes":
        data = np.frombuffer(tensor.bytes.values, dtype=np.uint8)
        return Constant(type_, decode(data, type_.dtype, shape), None, None)
    # An empty tensor may leave out the field that would say its kind.
    values = getattr(tensor, kind).values if kind else ()
    if type_.dtype not in BYTE_TYPES and type_.dtype not in PACKED_TYPES and type_.dtype != "bool":
        raise ValueError(f"a constant of type {type_.dtype}")
    dtype = np.dtype(np.bool_ if type_.dtype == "bool" else BYTE_TYPES[type_.dtype])
    return Constant(type_, np.asarray(values, dtype=dtype).reshape(shape), None, None)


def _fixed(shape: tuple[int | None, ...]) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if size is not None)
    if len(sizes) != len(shape):
        raise ValueError("a constant without a fixed shape")
    return sizes
