"""Arm's ExecuTorch backends: what each is told, and why it leaves an operator to the CPU."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, MissingError
from edgeopt.types import EthosU, Npu, Vgf

if TYPE_CHECKING:
    from executorch.backends.arm.common.arm_compile_spec import ArmCompileSpec
    from executorch.exir.backend.partitioner import Partitioner
    from torch.export import ExportedProgram
    from torch.fx import Node


def compile_spec(npu: Npu | None) -> ArmCompileSpec:
    """What the backend of this accelerator is told.

    Raises:
        ConversionError: it is no accelerator of Arm's.
        MissingError: the accelerator's compiler is not installed.
    """
    _check_installed(npu)
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.vgf import VgfCompileSpec

    if isinstance(npu, Vgf):
        return VgfCompileSpec()
    if not isinstance(npu, EthosU):
        raise ConversionError("is no accelerator of Arm's ExecuTorch backend", where=str(npu))
    return EthosUCompileSpec(
        target=f"{npu.kind}-{npu.macs}",
        system_config=npu.system_config,
        memory_mode=npu.memory_mode,
        # Vela then trades time for memory until the activations fit, or nothing more can be gained.
        extra_flags=["--optimise=Performance", f"--arena-cache-size={npu.sram_bytes}"],
    )


def _check_installed(npu: Npu | None) -> None:
    extra = "vgf" if isinstance(npu, Vgf) else "ethos-u"
    packages = {"tosa_serializer": "tosa-tools"}
    packages |= {"model_converter": "ai-ml-sdk-model-converter"} if isinstance(npu, Vgf) else {"ethosu": "ethos-u-vela"}
    for module, distribution in packages.items():
        if find_spec(module) is None:
            raise MissingError.extra(distribution, extra, "a .pte file for this accelerator")


@contextmanager
def converter_on_path() -> Iterator[None]:
    """The backend looks for VGF's model converter on PATH, where a virtual environment that isn't active is not."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def partitioner(spec: ArmCompileSpec) -> Partitioner:
    """What picks the operators that the backend takes."""
    from executorch.backends.arm.ethosu import EthosUPartitioner
    from executorch.backends.arm.vgf import VgfCompileSpec, VgfPartitioner

    made: Partitioner = VgfPartitioner(spec) if isinstance(spec, VgfCompileSpec) else EthosUPartitioner(spec)
    return made


def refusals(program: ExportedProgram, spec: ArmCompileSpec) -> dict[str, str]:
    """Name of each operator that a lowered program leaves to the CPU -> the backend's own reason, on one line."""
    from executorch.backends.arm.operator_support.tosa_supported_operators import tosa_support_factory
    from executorch.backends.arm.tosa.specification import TosaLoweringContext
    from executorch.exir.backend.utils import WhyNoPartitionReporter

    found: dict[str, str] = {}

    class Reporter(WhyNoPartitionReporter):  # type: ignore[misc]
        def report_reject(self, node: Node, reason: str) -> None:
            found.setdefault(node.name, " ".join(reason.split()))

    modules = dict(program.graph_module.named_modules())
    with TosaLoweringContext(spec.tosa_spec):
        support = tosa_support_factory(spec.tosa_spec, program, Reporter())
        for node in program.graph.nodes:
            if node.op == "call_function" and not is_plumbing(node):
                support.is_node_supported(modules, node)
    return {name: _readable(reason) for name, reason in found.items()}


def is_plumbing(node: Node) -> bool:
    """Whether a call of a lowered program is not an operator: a delegate's call, or the picking of its outputs."""
    return "call_delegate" in str(node.target) or getattr(node.target, "__name__", "") == "getitem"


def _readable(reason: str) -> str:
    if reason.startswith("Not included in BaseTOSASupportList"):
        return "the accelerator has no such operator"
    return reason.rstrip(".")
