"""An emulated phone: the runtimes' own aarch64 builds under QEMU, one process per opened file.

Nothing is timed here, as the speed of an emulated processor means nothing.

LiteRT runs through its C library's CompiledModel here and through the Python interpreter in `runtimes.litert`. That
both take the same kernels was measured with LiteRT 2.3.0 on x86-64: their outputs were identical, bit by bit, for 20
pictures in EfficientNet-Lite0 as int8 and as float32. So what differs between the phone and the host is the
processor's doing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeopt import emulator
from edgeopt.errors import ConversionError, MissingError
from edgeopt.runtimes.base import Session, check_shape
from edgeopt.runtimes.phone_process import NativeTensor, RunnerProcess
from edgeopt.types import Array, Format, OpTiming, Signature, SignatureTensor

#: What messages call each runtime.
_TITLES: Mapping[Format, str] = {"litert": "LiteRT", "onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
_SUFFIXES: Mapping[str, Format] = {".tflite": "litert", ".onnx": "onnx", ".pte": "executorch"}


class PhoneRuntime:
    """See `edgeopt.runtimes.base.Runtime`.

    Args:
        device: as `edgeopt.emulator.core_for` takes it: a core ("cortex-a76"), a device profile ("pixel-4") or a core
            of one ("pixel-4:cortex-a55").

    Raises:
        UsageError: there is no such core or device, or it has no Arm cores.
    """

    formats: tuple[Format, ...] = ("litert", "onnx", "executorch")

    def __init__(self, device: str) -> None:
        self.name = f"phone:{device}"
        self._core = emulator.core_for(device)
        differs = f"; {self._core.stand_in}" if self._core.stand_in else ""
        self.emulates: str | None = f"{self._core.title} kernels under QEMU{differs}"

    def unavailable(self) -> str | None:
        return emulator.unavailable()

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        reason = self.unavailable()
        if reason is not None:
            raise MissingError(reason, where=f"runtime {self.name}")
        format_ = _SUFFIXES.get(path.suffix)
        if format_ is None:
            raise ConversionError(
                "the emulated phone does not run such files", where=path.name, fix=f"it takes {', '.join(_SUFFIXES)}"
            )
        phone = emulator.installed()
        program = [str(phone.runner(format_)), str(path.resolve()), "--threads", str(threads), "--serve"]
        title = f"{_TITLES[format_]} on the emulated {self._core.title}"
        process = RunnerProcess(phone.command(self._core, program), title, path.name)
        return PhoneSession(process, signature, path.name, by_position=format_ == "executorch")


class PhoneSession(Session):
    """A file opened in a process.

    Args:
        process: is the session's from now on, and ended with it.
        file: the model's name, for messages.
        by_position: whether the file tells its tensors apart by position instead of by name.

    Raises:
        ConversionError: the file does not have the signature's tensors.
    """

    def __init__(self, process: RunnerProcess, signature: Signature, file: str, *, by_position: bool) -> None:
        super().__init__(signature)
        self._process = process
        try:
            self._inputs = _in_file_order(process.inputs, signature.inputs, by_position, f"{file}: inputs")
            self._outputs = _in_file_order(process.outputs, signature.outputs, by_position, f"{file}: outputs")
        except ConversionError:
            process.close()
            raise

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for tensor in self.signature.inputs:
            check_shape(inputs[tensor.name], tensor)
        outputs = self._process.run([inputs[tensor.name] for tensor in self._inputs])
        return {tensor.name: values for tensor, values in zip(self._outputs, outputs, strict=True)}

    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        """Nothing: how long an emulated operator takes says nothing about the device."""
        del inputs, repetitions
        return ()

    def close(self) -> None:
        self._process.close()


def _in_file_order(
    native: Sequence[NativeTensor], tensors: Sequence[SignatureTensor], by_position: bool, where: str
) -> tuple[SignatureTensor, ...]:
    """The signature's tensors in the order in which the file has them."""
    named = {tensor.native_name: tensor for tensor in tensors}
    if len(native) != len(tensors) or not (by_position or all(tensor.name in named for tensor in native)):
        has = ", ".join(tensor.name or f"({tensor.dtype})" for tensor in native) or "none"
        raise ConversionError(
            f"has {has}, the signature {', '.join(named) or 'none'}", where=where, fix="export the model again"
        )
    return tuple(tensors) if by_position else tuple(named[tensor.name] for tensor in native)
