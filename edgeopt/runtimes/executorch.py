"""ExecuTorch's own runtime with its portable kernels and the XNNPACK delegate."""

from __future__ import annotations

import re
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, DataError, MissingError
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Format, OpTiming, Signature, SignatureTensor

if TYPE_CHECKING:
    import torch
    from executorch.runtime import Method, Program


class ExecuTorchRuntime:
    """Runs .pte files in this process. See `edgeopt.runtimes.base.Runtime`."""

    name = "executorch"
    formats: tuple[Format, ...] = ("executorch",)
    emulates: str | None = None

    def unavailable(self) -> str | None:
        spec = find_spec("executorch")
        if spec is None or not spec.submodule_search_locations:
            return "the package 'executorch' is not installed; pip install executorch"
        # A namespace package: a folder of that name on the path is a location of it too.
        bindings = [Path(place, "extension", "pybindings") for place in spec.submodule_search_locations]
        if not any(any(folder.glob("_C.*")) for folder in bindings):
            return "this build of executorch has no Python runtime; pip install executorch from PyPI"
        return None

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        reason = self.unavailable()
        if reason is not None:
            raise MissingError(reason)
        with warnings.catch_warnings():  # of the vendor's modules, as they are imported
            warnings.simplefilter("ignore")
            _set_threads(threads)
            return _ExecuTorchSession(path, signature)


def _set_threads(threads: int) -> None:
    """Resize the process-wide pool. Delegates bind to it when a program is loaded, so this must come first."""
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)


class _ExecuTorchSession(Session):
    def __init__(self, path: Path, signature: Signature) -> None:
        super().__init__(signature)
        self._path = path
        self._program: Program | None = None
        self._method: Method | None = None
        self._program, self._method = _load(path, events=False)

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._method is None:
            raise DataError("the session is closed", where=self._path.name)
        return self._outputs(self._execute(self._method, inputs))

    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        program, method = _load(self._path, events=True)
        for _ in range(repetitions):
            self._execute(method, self.encode(inputs))
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory) / "trace.etdp"
            program.write_etdump_result_to_file(str(trace), str(Path(directory) / "debug.bin"))
            return _timings(trace)

    def close(self) -> None:
        self._method = None
        self._program = None

    def _execute(self, method: Method, inputs: Mapping[str, Array]) -> list[torch.Tensor]:
        arguments = [_tensor(inputs[t.name], t) for t in self.signature.inputs]
        try:
            return list(method.execute(arguments))
        except RuntimeError as error:
            shapes = ", ".join(
                f"{t.name} {tuple(a.shape)}" for t, a in zip(self.signature.inputs, arguments, strict=True)
            )
            raise DataError(
                f"ExecuTorch could not run it on {shapes} ({_line(error)})",
                where=self._path.name,
                fix="check the input shapes against the file's signature",
            ) from error

    def _outputs(self, results: list[torch.Tensor]) -> dict[str, Array]:
        # The method's buffers are used again by the next call.
        return {t.name: r.numpy().copy() for t, r in zip(self.signature.outputs, results, strict=True)}


def _load(path: Path, *, events: bool) -> tuple[Program, Method]:
    """Open a file. A debug buffer of more than 0 bytes has aborted the whole process, so events are all we ask for."""
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(path, enable_etdump=events, debug_buffer_size=0)
        method = program.load_method("forward")
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConversionError(f"ExecuTorch refuses the file ({_line(error)})", where=str(path)) from error
    if method is None:
        raise ConversionError("the file has no method 'forward'", where=str(path))
    return program, method


def _tensor(values: Array, tensor: SignatureTensor) -> torch.Tensor:
    import torch

    expected = tensor.shape
    fits = len(expected) == values.ndim and all(
        isinstance(want, str) or want == have for want, have in zip(expected, values.shape, strict=False)
    )
    if not fits:
        raise DataError(f"has shape {values.shape}, the model takes {expected}", where=f"input {tensor.name!r}")
    writable = values if values.flags.writeable and values.flags.c_contiguous else values.copy()
    return torch.from_numpy(writable)


#: Events that only wrap others.
_FRAMES = {"Method::execute", "DELEGATE_CALL", "OPERATOR_CALL"}


def _timings(trace: Path) -> tuple[OpTiming, ...]:
    """Median time per operator. XNNPACK's events carry whole microseconds and its kernel's name, not the layer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.devtools import Inspector

        blocks = Inspector(etdump_path=str(trace)).event_blocks
    seen: Counter[str] = Counter()
    timings = []
    for event in (event for block in blocks if block.name == "Execute" for event in block.events):
        if event.name in _FRAMES or event.perf_data is None or not event.perf_data.raw:
            continue
        type_ = re.sub(r" #\d+$", "", event.name)
        seen[type_] += 1
        timings.append(OpTiming(f"{type_} #{seen[type_]}", type_, statistics.median(event.perf_data.raw)))
    return tuple(sorted(timings, key=lambda t: -t.ms))


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
