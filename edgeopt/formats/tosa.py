"""What a TOSA flatbuffer holds, read without running it (schema: serialization_lib/schema/tosa.fbs, TOSA 1.x)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError
from edgeopt.types import DType

if TYPE_CHECKING:
    from tosa.TosaBasicBlock import TosaBasicBlock
    from tosa.TosaGraph import TosaGraph
    from tosa.TosaTensor import TosaTensor

_IDENTIFIER = b"TOSA"
#: What reading a damaged FlatBuffer can raise.
_DAMAGE = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class TosaIO:
    """One input or output of a TOSA graph."""

    name: str
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class TosaFile:
    """A TOSA graph. `operators` counts those of all its blocks; `version` is that of the specification."""

    version: tuple[int, int]
    inputs: tuple[TosaIO, ...]
    outputs: tuple[TosaIO, ...]
    operators: int


def read(data: bytes, where: str) -> TosaFile:
    """Look through a whole TOSA flatbuffer.

    The reference model ends the process on a truncated one, so everything is touched here first.

    Raises UsageError naming `where` when it is no TOSA flatbuffer, corrupt, or has a type that no array here has.
    """
    from tosa.TosaGraph import TosaGraph

    if data[4:8] != _IDENTIFIER:
        raise UsageError("is not a TOSA flatbuffer, or it is truncated", where=where, fix="export it again")
    try:
        graph = TosaGraph.GetRootAs(data)
        blocks = list(_blocks(graph))
        for block in blocks:
            _touch(block, len(data))
        main = blocks[0]
        tensors = {t.Name(): t for t in (main.Tensors(i) for i in range(main.TensorsLength()))}
        version = graph.Version()
        return TosaFile(
            version=(version._Major(), version._Minor()),
            inputs=tuple(_io(tensors[main.Inputs(i)]) for i in range(main.InputsLength())),
            outputs=tuple(_io(tensors[main.Outputs(i)]) for i in range(main.OutputsLength())),
            operators=sum(block.OperatorsLength() for block in blocks),
        )
    except _DAMAGE as error:
        raise UsageError("is corrupt or truncated", where=where, fix="export it again") from error


def read_file(path: Path) -> TosaFile:
    """See `read`."""
    return read(path.read_bytes(), str(path))


def _blocks(graph: TosaGraph) -> Iterator[TosaBasicBlock]:
    for number in range(graph.RegionsLength()):
        region = graph.Regions(number)
        yield from (region.Blocks(i) for i in range(region.BlocksLength()))


def _touch(block: TosaBasicBlock, size: int) -> None:
    """Raises one of `_DAMAGE` where a name or the data of a tensor lies beyond the end."""
    for i in range(block.TensorsLength()):
        tensor = block.Tensors(i)
        tensor.Name().decode()
        if tensor.DataLength() and tensor.DataAsNumpy().nbytes > size:
            raise ValueError("data beyond the end")
    for i in range(block.OperatorsLength()):
        operator = block.Operators(i)
        for j in range(operator.InputsLength()):
            operator.Inputs(j).decode()
        for j in range(operator.OutputsLength()):
            operator.Outputs(j).decode()


def _io(tensor: TosaTensor) -> TosaIO:
    shape = tuple(int(n) for n in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()
    return TosaIO(tensor.Name().decode(), shape, _dtypes()[tensor.Type()])


def _dtypes() -> dict[int, DType]:
    from tosa.DType import DType as Code

    return {
        Code.BOOL: "bool",
        Code.INT8: "int8",
        Code.INT16: "int16",
        Code.INT32: "int32",
        Code.INT64: "int64",
        Code.FP16: "float16",
        Code.FP32: "float32",
    }
