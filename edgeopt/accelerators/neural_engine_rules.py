"""Which operators of an ML program the Neural Engine takes, by what is published about it.

Apple publishes no list; Core ML decides on the device. The rules, and where they stand:

- it computes in fp16 (and int8 in fp16 programs), so operators typed fp32 run elsewhere: apple.github.io/coremltools,
  "Typed Execution";
- recurrent layers, gathering (embedding look-ups) and custom layers run elsewhere: github.com/hollance/neural-engine,
  docs/unsupported-layers.md;
- of a free size only the default runs there: an Apple engineer in developer.apple.com/forums/thread/724930;
- tensors have at most 5 dimensions (Core ML's own limit) and at most 16384 entries along each: the engine's hardware
  limit as found by others (gist.github.com/antmikinka/715499ae63630575065b22e5cb6ad8dd).

Published compute plans (huggingface.co/argmaxinc/whisperkit-coreml, *.mlcomputeplan.json) show convolution, GELU,
addition, layer and batch normalization dispatched to it.
"""

from __future__ import annotations

from edgeopt.formats.coreml import ProgramOp
from edgeopt.formats.coreml_kinds import CONTROL
from edgeopt.formats.coreml_program import Program

MAX_RANK = 5
MAX_SIZE = 16_384

_RECURRENT = frozenset({"gru", "lstm", "rnn"})
_LOOKUPS = frozenset({"gather", "gather_along_axis", "gather_nd", "scatter", "scatter_along_axis", "scatter_nd"})
_INDICES = frozenset({"argsort", "non_zero", "one_hot", "range_1d", "reduce_argmax", "reduce_argmin", "shape", "topk"})
_LISTS = frozenset({"list_gather", "list_length", "list_read", "list_scatter", "list_write", "make_list"})


def refusal(op: ProgramOp, program: Program) -> tuple[str, str | None] | None:
    """Why the Neural Engine does not take an operator, and what would bring it there; None where it takes it."""
    kind = op.info.type
    if kind in _RECURRENT:
        return f"{kind} is a recurrent layer", "replace it by 1-D convolutions or attention"
    if kind in CONTROL or kind in _LISTS:
        return f"{kind} is control flow", "unroll the loop, or replace the recurrent layer that it came from"
    if kind in _LOOKUPS:
        return f"{kind} reads by index", "keep look-ups at the start of the model, where one switch is all they cost"
    if kind in _INDICES:
        return f"{kind} yields indices", "leave it to the app, after the model"
    return _by_type(op) or _by_shape(op, program)


def _by_type(op: ProgramOp) -> tuple[str, str | None] | None:
    dtype = op.operation.outputs[0].type.dtype if op.operation.outputs else "none"
    if dtype == "fp32":
        return "it computes in fp32", "let that layer compute in fp16 (drop it from keep-float)"
    if dtype not in ("fp16", "int8", "uint8"):
        return f"it computes in {dtype}", None
    return None


def _by_shape(op: ProgramOp, program: Program) -> tuple[str, str | None] | None:
    shapes = [variable.type.shape for variable in op.operation.outputs]
    if any(size is None for shape in shapes for size in shape):
        free = [feature.name for feature in program.inputs if any(isinstance(s, str) for s in feature.shape)]
        fix = f"give the input {free[0]!r} a fixed shape" if free else None
        return "its shape is only known at run time", fix
    if any(len(shape) > MAX_RANK for shape in shapes):
        return f"its result has more than {MAX_RANK} dimensions", "reshape to fewer dimensions"
    if any(size is not None and size > MAX_SIZE for shape in shapes for size in shape):
        return f"its result is longer than {MAX_SIZE} along one dimension", "split that dimension"
    return None
