"""Input signatures: the --input flag, specs from example arrays, and examples from specs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from edgeopt.errors import UsageError
from edgeopt.types import Array, Dim, DType, TensorSpec

DTYPES: dict[str, DType] = {name: name for name in get_args(DType)}

#: Sizes that a dynamic dimension gets in synthesised examples. Never 1, which tracers take for a constant.
BATCH_SIZE, OTHER_SIZE = 2, 16

_INPUT = re.compile(r"(?P<name>[A-Za-z_][\w.\-]*)=(?P<dtype>\w+)\[(?P<dims>[^\]]*)\](?:@(?P<layout>\w+))?")
_DIM = re.compile(r"(?P<name>[A-Za-z_]\w*):(?P<min>\d+)\.\.(?P<max>\d+)")


def parse_input(text: str) -> TensorSpec:
    """Read `NAME=DTYPE[d0,d1,...]`, each d a size or `name:min..max`, with an optional `@NCHW` or `@NHWC` behind.

    Example: `input_ids=int64[batch:1..8,seq:1..128]`. Raises UsageError.
    """
    match = _INPUT.fullmatch("".join(text.split()))
    if match is None:
        raise UsageError(
            "is not an input declaration", where=f"--input {text!r}", fix="write NAME=DTYPE[d0,d1,...], x=float32[1,3]"
        )
    if match["dtype"] not in DTYPES:
        raise UsageError(
            f"unknown type {match['dtype']!r}", where=f"--input {text!r}", fix=f"use one of {', '.join(DTYPES)}"
        )
    shape = tuple(_parse_dim(part, text) for part in match["dims"].split(",")) if match["dims"] else ()
    layout = _parse_layout(match["layout"], text)
    if layout is not None and len(shape) != 4:
        raise UsageError("a layout needs four dimensions", where=f"--input {text!r}")
    return TensorSpec(match["name"], shape, DTYPES[match["dtype"]], layout)


def _parse_layout(text: str | None, whole: str) -> Literal["NCHW", "NHWC"] | None:
    match text:
        case None:
            return None
        case "NCHW":
            return "NCHW"
        case "NHWC":
            return "NHWC"
        case _:
            raise UsageError(f"unknown layout {text!r}", where=f"--input {whole!r}", fix="use @NCHW or @NHWC")


def _parse_dim(part: str, text: str) -> int | Dim:
    if part.isdecimal() and int(part) > 0:
        return int(part)
    match = _DIM.fullmatch(part)
    if match is None:
        raise UsageError(
            f"{part!r} is no dimension", where=f"--input {text!r}", fix="write a size such as 224, or name:min..max"
        )
    dim = Dim(match["name"], int(match["min"]), int(match["max"]))
    if not 1 <= dim.min <= dim.max:
        raise UsageError(f"{part!r} is an empty range", where=f"--input {text!r}")
    return dim


def describe(specs: Iterable[TensorSpec]) -> str:
    """For messages: `x float32[1, 3, 224, 224], mask int64[batch, 128]`."""

    def dims(spec: TensorSpec) -> str:
        return ", ".join(d.name if isinstance(d, Dim) else str(d) for d in spec.shape)

    return ", ".join(f"{spec.name} {spec.dtype}[{dims(spec)}]" for spec in specs)


def dtype_of(name: str, where: str) -> DType:
    """A NumPy or torch type name as ours. Raises UsageError for those no runtime here takes (float64, bfloat16...)."""
    if name not in DTYPES:
        raise UsageError(f"has the type {name}", where=where, fix=f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def spec_of(name: str, array: Array) -> TensorSpec:
    """The static signature that an example has."""
    return TensorSpec(name, tuple(array.shape), dtype_of(array.dtype.name, f"example input {name!r}"))


def check_specs(specs: Iterable[TensorSpec]) -> None:
    """Raises UsageError for a name used twice, or a dynamic dimension declared with different bounds."""
    seen: set[str] = set()
    dims: dict[str, Dim] = {}
    for spec in specs:
        if spec.name in seen:
            raise UsageError("is declared twice", where=f"input {spec.name!r}")
        seen.add(spec.name)
        for dim in spec.shape:
            if isinstance(dim, Dim) and dims.setdefault(dim.name, dim) != dim:
                raise UsageError(
                    f"the dimension {dim.name!r} has different bounds in two places", where=f"input {spec.name!r}"
                )


def fits(spec: TensorSpec, array: Array) -> bool:
    """Whether the array is a value of this input."""
    return (
        array.dtype.name == spec.dtype
        and array.ndim == len(spec.shape)
        and all(_fits_dim(size, dim) for size, dim in zip(array.shape, spec.shape, strict=True))
    )


def _fits_dim(size: int, dim: int | Dim) -> bool:
    return dim.min <= size <= dim.max if isinstance(dim, Dim) else size == dim


def check_example(spec: TensorSpec, array: Array) -> None:
    """Raises UsageError unless the array is a value of this input."""
    if not fits(spec, array):
        raise UsageError(
            f"the example is {describe((spec_of(spec.name, array),))}, the signature is {describe((spec,))}",
            where=f"input {spec.name!r}",
        )


def example_sizes(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """A size for every dynamic dimension, within its bounds and not 1 where they allow."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, Dim) and dim.name not in sizes:
                sizes[dim.name] = min(dim.max, max(dim.min, BATCH_SIZE if axis == 0 else OTHER_SIZE))
    return sizes


def synthesize(specs: tuple[TensorSpec, ...], seed: int = 0) -> dict[str, Array]:
    """Examples that fit: seeded normal values for floats; for integers and booleans ones if a mask, else zeros."""
    rng = np.random.default_rng(seed)
    sizes = example_sizes(specs)
    examples: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(sizes[d.name] if isinstance(d, Dim) else d for d in spec.shape)
        if spec.dtype in ("float32", "float16"):
            examples[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            examples[spec.name] = np.full(shape, 1 if "mask" in spec.name.lower() else 0, dtype=spec.dtype)
    return examples


def resize(specs: tuple[TensorSpec, ...], examples: Mapping[str, Array], dim: str, size: int) -> dict[str, Array]:
    """The examples with one dynamic dimension at another size: cut, or repeated from the start."""
    resized: dict[str, Array] = {}
    for spec in specs:
        array = examples[spec.name]
        for axis, entry in enumerate(spec.shape):
            if isinstance(entry, Dim) and entry.name == dim:
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        resized[spec.name] = array
    return resized


def with_layout(specs: tuple[TensorSpec, ...], layout: Literal["NCHW", "NHWC"]) -> tuple[TensorSpec, ...]:
    """The layout for every 4-D float tensor that declares none."""
    return tuple(
        replace(s, layout=layout) if s.layout is None and len(s.shape) == 4 and s.dtype.startswith("float") else s
        for s in specs
    )
