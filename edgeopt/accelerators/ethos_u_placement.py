"""Which operators of a .tflite file an Ethos-U runs, and what would bring the others there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeopt.accelerators.ethos_u_config import title
from edgeopt.accelerators.ethos_u_report import Fate, fates
from edgeopt.accelerators.ethos_u_vela import VelaRun, tool
from edgeopt.formats.litert import ROOT, layer_of, summarize
from edgeopt.types import EthosU, OpInfo, OpPlacement, Placement

#: Vela has them as a table look-up or under another name.
_EQUIVALENTS = {
    "GELU": "write it as x * sigmoid(1.702 x), or take SiLU or Hardswish",
    "ELU": "take ReLU or Hardswish",
    "FLOOR_DIV": "multiply by the reciprocal",
    "CUMSUM": "multiply by a triangular matrix of ones",
    "GATHER_ND": "take slices",
    "CONV_3D": "take 2-D convolutions",
}
_DIFFERENT_NAMES = {"ARG_MAX": "ARGMAX"}
_INSIDE = "it is in the body of a control-flow operator, which Vela leaves alone"


def place(path: Path, npu: EthosU, run: VelaRun) -> Placement:
    """Every operator of the file that went into Vela, in file order.

    Args:
        path: that file.
        run: what Vela made of it.
    """
    found = fates(run.tables)
    ops = summarize(path).ops
    elsewhere = _only_on_u85() if npu.kind != "ethos-u85" and run.reasons else frozenset()
    milliseconds = 1e3 / run.summary.core_clock_hz
    placed = (_placed(op, found.get(position), run.reasons, elsewhere, milliseconds) for position, op in enumerate(ops))
    return Placement(accelerator=title(npu), told_by=tool(), predicted=False, ops=tuple(placed))


def peak(path: Path, run: VelaRun) -> str | None:
    """Name of the operator while which most SRAM is in use; None where none runs on the NPU."""
    found = fates(run.tables)
    ops = summarize(path).ops
    busiest = max(found, key=lambda position: found[position].memory_bytes, default=None)
    return ops[busiest].name if busiest is not None and found[busiest].memory_bytes else None


def _placed(
    op: OpInfo, fate: Fate | None, reasons: Mapping[str, str], elsewhere: frozenset[str], milliseconds: float
) -> OpPlacement:
    layer = layer_of(op.name)
    layer_or_none = None if layer == ROOT else layer
    if fate is not None and fate.on_npu:
        return OpPlacement(op.name, op.type, "accelerator", layer_or_none, ms=fate.cycles * milliseconds)
    reason = _INSIDE if fate is None else reasons.get(fate.tensor or "", "Vela gives no reason")
    return OpPlacement(op.name, op.type, "cpu", layer_or_none, reason, _fix(op, fate, reason, elsewhere))


def _fix(op: OpInfo, fate: Fate | None, reason: str, elsewhere: frozenset[str]) -> str | None:
    if op.type in ("QUANTIZE", "DEQUANTIZE"):
        if fate is not None and fate.at_border:
            return "take integer inputs and outputs, the app then converts them"
        return "quantize the operators next to it, which compute in float"
    if op.type in _EQUIVALENTS:
        return _EQUIVALENTS[op.type]
    if "Float" in reason:
        return "quantize it: it computes in float"
    if "precision must be Int8" in reason:
        return "give it 8-bit activations"
    if _DIFFERENT_NAMES.get(op.type, op.type) in elsewhere:
        return "the Ethos-U85 has it"
    return None


def _only_on_u85() -> frozenset[str]:
    """Operators that Vela takes for an Ethos-U85 and for none of its predecessors."""
    from ethosu import regor

    older = regor.tflite_operator_constraints("EthosU55")
    return frozenset(regor.tflite_operator_constraints("EthosU85")) - frozenset(older)
