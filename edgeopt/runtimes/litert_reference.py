"""LiteRT's reference kernels: plain loops over integers, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeopt.errors import ConversionError, MissingError
from edgeopt.runtimes.base import Session
from edgeopt.runtimes.litert import LiteRTRuntime, LiteRTSession
from edgeopt.types import Array, Format, OpTiming, Signature


class LiteRTReference:
    """See `edgeopt.runtimes.base.Runtime`. No delegate, no optimized kernel.

    They are the executable form of LiteRT's int8 specification, which NPUs follow: products summed in int32, rescaled
    by a 32-bit multiplier (https://developers.google.com/edge/litert/quantization/quantization_spec.md.txt). That same
    page leaves hardware its own rounding, and the Edge TPU has one: what it makes of a file differs from what a CPU
    makes of it by a few steps of int8, in MobileNet v1 by up to 5/256 of a probability
    (https://github.com/google-coral/edgetpu/issues/503). So this stands in for the accelerator's accuracy, not for its
    bits.
    """

    name = "litert-reference"
    formats: tuple[Format, ...] = ("litert",)
    emulates: str | None = "an NPU's int8 arithmetic by LiteRT's reference kernels; its rounding may differ by steps"

    def __init__(self) -> None:
        self._plain = LiteRTRuntime()

    def unavailable(self) -> str | None:
        return self._plain.unavailable()

    def open(self, path: Path, signature: Signature, threads: int = 1) -> Session:
        reason = self.unavailable()
        if reason:
            raise MissingError(reason, where=f"runtime {self.name}")
        from ai_edge_litert import interpreter as litert

        try:
            interpreter = litert.Interpreter(
                str(path), num_threads=threads, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
            )
            return _ReferenceSession(interpreter, signature, path, threads)
        except (ValueError, RuntimeError) as error:
            raise ConversionError(f"LiteRT refuses the file: {error}", where=str(path)) from error


class _ReferenceSession(LiteRTSession):
    def profile(self, inputs: Mapping[str, Array], repetitions: int = 20) -> tuple[OpTiming, ...]:
        """Nothing: how long a reference kernel takes says nothing about any device."""
        del inputs, repetitions
        return ()
