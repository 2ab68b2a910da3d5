"""What an .mlpackage holds: operators with their types, weights and source layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgeopt.formats.coreml_kinds import CONVERSIONS, FUSED_ACTIVATIONS, INT8_KERNELS, MOVEMENT
from edgeopt.formats.coreml_program import DAMAGE, Feature, Operation, Program, damaged, read_program
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.types import DType, FileSummary, OpInfo, Signature, SignatureTensor

_DTYPES: dict[str, DType] = {"float32": "float32", "float16": "float16", "int32": "int32", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class ProgramOp:
    """One operator that runs. `variable` is its name in the program; `layer` is empty where the file keeps none."""

    info: OpInfo
    variable: str
    layer: str
    operation: Operation

    @property
    def is_computation(self) -> bool:
        return self.info.type not in MOVEMENT and self.info.type not in CONVERSIONS

    @property
    def why_float(self) -> str:
        """Why it computes in floating point in a file whose activations are int8."""
        if self.info.type in INT8_KERNELS:
            return "it stands among float operators: an operand or its weight has no int8 form"
        return f"the Neural Engine has no int8 {self.info.type}"


def summarize(path: Path) -> FileSummary:
    """Read one .mlpackage without running it.

    Operators are named after their source layer, "features.0.conv", "features.0.conv:1", or else as in the program.
    `dtype` is what it computes in: "fp16", "fp32", "int32", "bool", or "int8" for an operator of the Neural Engine that
    stands between `dequantize` and `quantize`.

    Raises:
        MissingError: coremltools is not installed.
        UsageError: the package is none, or damaged.
    """
    program = read_program(path)
    try:
        return FileSummary(
            format="coreml",
            size_bytes=size_of(path),
            sha256=sha256_of(path),
            signature=Signature(
                tuple(_tensor(feature) for feature in program.inputs),
                tuple(_tensor(feature) for feature in program.outputs),
            ),
            ops=tuple(op.info for op in operators(program)),
            metadata={
                **program.metadata,
                "specification_version": str(program.version),
                "operator_set": program.opset,
                "minimum_ios": str(program.minimum_ios),
            },
        )
    except DAMAGE as error:
        raise damaged(path) from error


def computes(path: Path) -> tuple[ProgramOp, ...]:
    """The operators that do more than move or convert values."""
    return tuple(op for op in operators(read_program(path)) if op.is_computation)


def operators(program: Program) -> tuple[ProgramOp, ...]:
    """All operators that run, in program order, without constants; a loop counts once, whatever is in it."""
    producers = {name.name: op for op in program.main.operations for name in op.outputs}
    readers = Counter(name for op in program.main.operations for name in set(op.read_names()))
    named: list[ProgramOp] = []
    int8: set[str] = set()
    seen: Counter[str] = Counter()
    for op in program.main.operations:
        if op.is_constant:
            continue
        layer = program.layers.get(op.name, "")
        dtype = _compute_dtype(op, producers, int8)
        if dtype == "int8":
            int8.add(op.name)
        info = OpInfo(_unique(layer or op.name, seen), op.type, dtype, None, _weight_bytes(op, producers, readers))
        named.append(ProgramOp(info, op.name, layer, op))
    return tuple(named)


def _tensor(feature: Feature) -> SignatureTensor:
    dtype = _DTYPES[feature.dtype]
    return SignatureTensor(feature.name, feature.name, feature.shape, dtype, dtype)


def _unique(base: str, seen: Counter[str]) -> str:
    name = base
    while seen[name]:
        name = f"{base}:{seen[base]}"
        seen[base] += 1
    seen[name] += 1
    return name


def _compute_dtype(op: Operation, producers: dict[str, Operation], int8: set[str]) -> str:
    dtype = op.outputs[0].type.dtype if op.outputs else "none"
    if op.type in FUSED_ACTIVATIONS and _source(op, "x") in int8:
        return "int8"
    if op.type in INT8_KERNELS:
        activations = [producers.get(_source(op, key) or "") for key in INT8_KERNELS[op.type]]
        if all(source is not None and source.type == "dequantize" for source in activations):
            return (
                "int8" if "weight" not in op.inputs or _is_int8(producers.get(_source(op, "weight") or "")) else dtype
            )
    return dtype


def _source(op: Operation, parameter: str) -> str | None:
    (given, *_) = op.inputs.get(parameter) or (None,)
    return given if isinstance(given, str) else None


def _is_int8(weight: Operation | None) -> bool:
    return weight is not None and weight.type in ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale")


def _weight_bytes(op: Operation, producers: dict[str, Operation], readers: Counter[str]) -> int:
    """Stored bytes of the constants that only this operator reads, directly or expanded."""
    total = 0
    for name in set(op.read_names()):
        source = producers.get(name)
        if source is not None and source.is_constant and readers[name] == 1:
            total += _stored(source) + _weight_bytes(source, producers, readers)
    return total


def _stored(constant: Operation) -> int:
    return sum(v.stored_bytes for values in constant.inputs.values() for v in values if not isinstance(v, str))
