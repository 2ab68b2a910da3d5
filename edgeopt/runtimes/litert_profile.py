"""Time per operator from LiteRT's own profiler, which only its C library (litert/c/*.h) offers.

The library runs the file in an instance of its own with the same kernels as the interpreter. XNNPACK reports its
operators in its own order, which is the file's as long as it took one stretch of the graph and fused nothing away.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from edgeopt.formats.litert import summarize
from edgeopt.types import Array, OpTiming, Signature, SignatureTensor

_Handle = ctypes.c_void_p
_RELEASE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_CPU = 1
#: tflite::Profiler::EventType of one operator: run by LiteRT itself, or inside a delegate.
_OPERATOR, _DELEGATE_OPERATOR = 2, 8
_LOCK_WRITE = 1
#: LiteRtElementType, which are TfLiteType's numbers.
_ELEMENT_TYPES = {
    "float32": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9, "float16": 10,
}  # fmt: skip
_MAX_RANK = 8


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_size_t), ("in_use", ctypes.c_size_t), ("private", ctypes.c_size_t))


class _Event(ctypes.Structure):
    """ProfiledEventData of litert_profiler_event.h."""

    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory_before", _Memory),
        ("memory_after", _Memory),
        ("operator", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", ctypes.c_int),
    )


class _Layout(ctypes.Structure):
    """LiteRtLayout: rank in the low 7 bits, a flag for strides above."""

    _fields_ = (
        ("rank", ctypes.c_uint),
        ("dimensions", ctypes.c_int32 * _MAX_RANK),
        ("strides", ctypes.c_uint32 * _MAX_RANK),
    )


class _TensorType(ctypes.Structure):
    """LiteRtRankedTensorType."""

    _fields_ = (("element_type", ctypes.c_int), ("layout", _Layout))


@dataclass(frozen=True, slots=True)
class _Step:
    """One operator as it ran: `index` is its number in the file, or in its delegate's graph when `delegated`."""

    tag: str
    index: int
    delegated: bool
    elapsed_us: int


def profile(
    path: Path, signature: Signature, inputs: Mapping[str, Array], threads: int, repetitions: int
) -> tuple[OpTiming, ...]:
    """Median milliseconds per operator, slowest first; LiteRT's clock counts whole microseconds.

    Empty where the installed library has no profiler, and for files with dynamic dimensions.

    Args:
        inputs: in the file's terms, by `SignatureTensor.name`.
    """
    library = _Library.find()
    if library is None or not all(_is_plain(tensor) for tensor in (*signature.inputs, *signature.outputs)):
        return ()
    with ExitStack() as stack:
        try:
            runs = _record(library, stack, path, signature, inputs, threads, repetitions)
        except _LiteRTError:
            return ()
    return _timings([op.name for op in summarize(path).ops], runs)


def _is_plain(tensor: SignatureTensor) -> bool:
    """Whether LiteRT's C structures can describe the tensor without resizing it."""
    return len(tensor.shape) <= _MAX_RANK and all(isinstance(size, int) for size in tensor.shape)


def _timings(ops: Sequence[str], runs: Sequence[Sequence[_Step]]) -> tuple[OpTiming, ...]:
    """Medians over the runs."""
    names = _names(ops, runs[0])
    times = [median(run[i].elapsed_us for run in runs) / 1000 for i in range(len(names))]
    timings = (OpTiming(name, step.tag, ms) for name, step, ms in zip(names, runs[0], times, strict=True))
    return tuple(sorted(timings, key=lambda timing: -timing.ms))


def _names(ops: Sequence[str], steps: Sequence[_Step]) -> list[str]:
    """The file's name for every step that can be told; XNNPACK's are only numbered where it fused or split graphs."""
    own = {step.index for step in steps if not step.delegated}
    rest = [name for i, name in enumerate(ops) if i not in own]
    delegated = [step.index for step in steps if step.delegated]
    in_order = delegated == list(range(len(rest)))
    numbered = iter(rest if in_order else [f"XNNPACK {i}" for i in range(len(delegated))])
    return [next(numbered) if step.delegated else ops[step.index] for step in steps]


def _record(
    library: _Library,
    stack: ExitStack,
    path: Path,
    signature: Signature,
    inputs: Mapping[str, Array],
    threads: int,
    repetitions: int,
) -> list[list[_Step]]:
    environment = library.new(stack, "LiteRtCreateEnvironment", "LiteRtDestroyEnvironment", 0, None)
    model = library.new(stack, "LiteRtCreateModelFromFile", "LiteRtDestroyModel", environment, str(path).encode())
    compiled = library.new(
        stack, "LiteRtCreateCompiledModel", "LiteRtDestroyCompiledModel", environment, model,
        _options(library, stack, threads),
    )  # fmt: skip
    profiler = _Handle()
    library("LiteRtCompiledModelGetProfiler", compiled, ctypes.byref(profiler))
    if not profiler:
        raise _LiteRTError("no profiler")
    order = _native_order(path)
    feeds = _buffers(
        library, stack, environment, compiled, "Input", [_tensor_of(signature.inputs, n) for n in order[0]]
    )
    results = _buffers(
        library, stack, environment, compiled, "Output", [_tensor_of(signature.outputs, n) for n in order[1]]
    )
    for name, buffer in zip(order[0], feeds, strict=True):
        _fill(library, buffer, inputs[_tensor_of(signature.inputs, name).name])

    def run() -> None:
        library(
            "LiteRtRunCompiledModel", compiled, ctypes.c_size_t(0),
            ctypes.c_size_t(len(feeds)), feeds, ctypes.c_size_t(len(results)), results,
        )  # fmt: skip

    runs = []
    run()
    for _ in range(repetitions):
        library("LiteRtResetProfiler", profiler)
        library("LiteRtStartProfiler", profiler)
        run()
        library("LiteRtStopProfiler", profiler)
        runs.append(_steps(library, profiler))
    return runs


def _steps(library: _Library, profiler: _Handle) -> list[_Step]:
    count = ctypes.c_int()
    library("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
    events = (_Event * count.value)()
    library("LiteRtGetProfilerEvents", profiler, count, events)
    return [
        _Step(event.tag.decode(), event.operator, event.type == _DELEGATE_OPERATOR, event.elapsed_us)
        for event in events
        if event.type in (_OPERATOR, _DELEGATE_OPERATOR)
    ]


def _native_order(path: Path) -> tuple[list[str], list[str]]:
    """Inputs and outputs are numbered as the file's own signature lists them."""
    found = summarize(path).signature
    return [t.native_name for t in found.inputs], [t.native_name for t in found.outputs]


def _tensor_of(tensors: Sequence[SignatureTensor], native_name: str) -> SignatureTensor:
    (found,) = [tensor for tensor in tensors if tensor.native_name == native_name]
    return found


def _options(library: _Library, stack: ExitStack, threads: int) -> _Handle:
    release = _RELEASE(_let_go)
    texts = {
        b"runtime_options_string": ctypes.create_string_buffer(b"enable_profiling = true\n"),
        b"cpu_options_string": ctypes.create_string_buffer(f"num_threads = {threads}\n".encode()),
    }
    # Destroying the options calls `release` on the texts. The stack runs backwards, so what it holds from here on
    # is let go of after that.
    stack.callback(_let_go, release, texts)
    options = library.new(stack, "LiteRtCreateOptions", "LiteRtDestroyOptions")
    library("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
    for identifier, text in texts.items():
        opaque = _Handle()
        library("LiteRtCreateOpaqueOptions", identifier, text, release, ctypes.byref(opaque))
        library("LiteRtAddOpaqueOptions", options, opaque)
    return options


def _let_go(*objects: object) -> None:
    del objects


def _buffers(
    library: _Library,
    stack: ExitStack,
    environment: _Handle,
    compiled: _Handle,
    side: str,
    tensors: Sequence[SignatureTensor],
) -> ctypes.Array[ctypes.c_void_p]:
    handles = []
    for i, tensor in enumerate(tensors):
        requirements = _Handle()
        library(
            f"LiteRtGetCompiledModel{side}BufferRequirements", compiled, ctypes.c_size_t(0), ctypes.c_size_t(i),
            ctypes.byref(requirements),
        )  # fmt: skip
        kind = _TensorType(element_type=_ELEMENT_TYPES[tensor.dtype])
        kind.layout.rank = len(tensor.shape)
        for axis, size in enumerate(tensor.shape):
            kind.layout.dimensions[axis] = int(size)
        handles.append(
            library.new(
                stack, "LiteRtCreateManagedTensorBufferFromRequirements", "LiteRtDestroyTensorBuffer", environment,
                ctypes.byref(kind), requirements,
            )
        )  # fmt: skip
    return (ctypes.c_void_p * len(handles))(*handles)


def _fill(library: _Library, buffer: int, values: Array) -> None:
    address = _Handle()
    contiguous = np.ascontiguousarray(values)
    library("LiteRtLockTensorBuffer", _Handle(buffer), ctypes.byref(address), _LOCK_WRITE)
    ctypes.memmove(address, contiguous.ctypes.data, contiguous.nbytes)
    library("LiteRtUnlockTensorBuffer", _Handle(buffer))


class _LiteRTError(Exception):
    """A call of the C library failed. Never leaves this module: there is no profile then."""


class _Library:
    """libLiteRt with status codes turned into errors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @classmethod
    def find(cls) -> _Library | None:
        import ai_edge_litert

        path = Path(ai_edge_litert.__file__).with_name("libLiteRt.so")
        return cls(ctypes.CDLL(str(path))) if path.is_file() else None

    def __call__(self, name: str, *arguments: object) -> None:
        function: Callable[..., int] | None = getattr(self._library, name, None)
        status = function(*arguments) if function else -1
        if status:
            raise _LiteRTError(f"{name} returned {status}")

    def new(self, stack: ExitStack, create: str, destroy: str, *arguments: object) -> _Handle:
        """Call a function whose last argument receives a new object; it is destroyed with the stack."""
        handle = _Handle()
        self(create, *arguments, ctypes.byref(handle))
        release = getattr(self._library, destroy)
        release.restype = None
        stack.callback(release, handle)
        return handle
