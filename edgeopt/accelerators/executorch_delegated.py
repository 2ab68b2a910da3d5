"""Delegates of ExecuTorch that don't run on this machine: what the file gives to them, and what it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgeopt.accelerators.base import Compiled
from edgeopt.errors import ConversionError, MissingError
from edgeopt.formats.executorch import ProgramOp, read_program
from edgeopt.formats.executorch_delegated import COREML, VULKAN, Call, read_calls
from edgeopt.types import Artifact, Finding, Npu, NpuKind, OpPlacement, Placement

#: Kind -> the delegate's id in the file, and what people call it.
_DELEGATES: dict[NpuKind, tuple[str, str]] = {"vulkan": (VULKAN, "Vulkan"), "neural-engine": (COREML, "Core ML")}
#: What delegates add to store and convert values; it computes nothing of the model.
_BOOKKEEPING = {
    "et_vk.prepack.default", "aten.clone.default", "dim_order_ops._to_dim_order_copy.default",
    "dim_order_ops._clone_dim_order.default", "cast",
}  # fmt: skip
#: What the Vulkan delegate's table asks of an operator, where it can be had (`op_registry.py`, `check_conv_node`).
_VULKAN_FIXES = {"aten.convolution": "fix the batch size at 1: its shaders convolve one picture at a time"}
#: Shape arithmetic of the runtime itself.
_RUNTIME = ("executorch_prim.", "aten.sym_")


class DelegatedAccelerator:
    """Reads the delegation from the .pte file itself; nothing is compiled here, and nothing executed. See
    `edgeopt.accelerators.base.Accelerator`."""

    def unavailable(self) -> str | None:
        return None if find_spec("executorch") else "the package 'executorch' is not installed; pip install executorch"

    def compile(self, artifact: Artifact, npu: Npu, directory: Path) -> Compiled:
        del directory
        if (missing := self.unavailable()) is not None:
            raise MissingError(missing)
        if npu.kind not in _DELEGATES:
            raise ValueError(f"{npu.kind} is no delegate that is read here")
        backend, title = _DELEGATES[npu.kind]
        ops = tuple(_placed(artifact.path, backend))
        if all(op.on == "cpu" for op in ops):
            raise ConversionError(
                f"no operator of it goes to the {title} delegate",
                where=str(artifact.path),
                fix="export it for a target with that accelerator",
            )
        placement = Placement(title, f"the file, made by executorch {version('executorch')}", predicted=False, ops=ops)
        return Compiled(artifact, placement, findings=(_not_executed(title),))


class CoreMLDelegateAccelerator(DelegatedAccelerator):
    """The exporter converts with coremltools."""

    def unavailable(self) -> str | None:
        if find_spec("coremltools") is None:
            return MissingError.extra("coremltools", "apple", "a Core ML delegate").line()
        return super().unavailable()


def _placed(path: Path, backend: str) -> Iterator[OpPlacement]:
    """All operators in file order."""
    calls = {call.instruction: call for call in read_calls(path)}
    names: Counter[str] = Counter()
    for op in read_program(path).ops:
        call = calls.get(op.instruction)
        if call is not None and call.backend == backend:
            yield from _delegated(call, names)
        elif not op.info.type.startswith(_RUNTIME):
            fix = _VULKAN_FIXES.get(_base(op.info.type)) if backend == VULKAN else None
            yield OpPlacement(op.info.name, op.info.type, "cpu", op.layer or None, _reason(op, backend), fix)


def _delegated(call: Call, names: Counter[str]) -> Iterator[OpPlacement]:
    if call.ops is None:
        yield OpPlacement(f"{call.backend}_{call.instruction}", call.backend, "accelerator")
        return
    for op in call.ops:
        if op.type not in _BOOKKEEPING:
            layer = call.layers.get(op.key) or None
            name = f"{layer}/{op.type}" if layer else op.type
            yield OpPlacement(f"{name}_{names[name]}", op.type, "accelerator", layer)
            names[name] += 1


def _reason(op: ProgramOp, backend: str) -> str:
    """Why an operator stays on the CPU, as far as the delegate's own table of operators tells."""
    if op.info.delegate is not None:
        return f"the file gives it to the delegate {op.info.delegate}"
    base = _base(op.info.type)
    if "float64" in op.inputs or "double" in op.inputs:
        return f"{base} computes in float64, which the delegate does not have"
    if backend == VULKAN:
        if base not in _vulkan_operators():
            return f"the Vulkan delegate has no shader for {base}"
        return f"the Vulkan delegate has {base}, but not for these arguments, types or shapes"
    return f"coremltools has no conversion of {base}, or none for these arguments, types or shapes"


def _vulkan_operators() -> frozenset[str]:
    from executorch.backends.vulkan.op_registry import vulkan_supported_ops

    names = (key if isinstance(key, str) else key.name() for key in vulkan_supported_ops if _is_named(key))
    return frozenset(_base(name.replace("::", ".")) for name in names)


def _is_named(key: object) -> bool:
    return isinstance(key, str) or hasattr(key, "name")


def _base(operator: str) -> str:
    """ "aten.mul" of "aten.mul.Scalar_out"."""
    return ".".join(operator.split(".")[:2])


def _not_executed(title: str) -> Finding:
    if title == "Core ML":
        where = "which of the delegated operators the Neural Engine takes, Core ML decides on the device"
    else:
        where = "what the GPU's driver makes of its shaders shows on the device only"
    told = (
        f"the {title} delegate does not run on this machine: numerics are those of the same program on the CPU; {where}"
    )
    return Finding("not-executed", title, told)
