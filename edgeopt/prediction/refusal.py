"""Where the latency model ends: files of which nothing can be told."""

from __future__ import annotations

from edgeopt.errors import UsageError
from edgeopt.prediction.model import Vector
from edgeopt.prediction.work import FileWork

#: Operators that the model has no place for may be this share of the estimated time; beyond it, it says nothing.
_MOST_UNKNOWN = 0.1
_FIX = "measure on the device"


def refuse_unsupported(work: FileWork, where: str) -> None:
    """Raises UsageError on what no CPU figure tells anything of, on no device."""
    if work.unsupported is not None:
        raise UsageError(work.unsupported, where=where, fix=f"{_FIX}: no latency can be told")


def refuse_unknown(work: FileWork, times: Vector, where: str) -> None:
    """Raises UsageError where operators that the model does not know decide the time, or none takes any.

    Args:
        times: of each operator, as far as the model can tell, in milliseconds.
    """
    unknown = [op.kind == "unknown" for op in work.ops]
    share = float(times[unknown].sum()) / (float(times.sum()) or 1.0)
    if not work.ops or share > _MOST_UNKNOWN or sum(unknown) > _MOST_UNKNOWN * len(work.ops):
        types = ", ".join(sorted({op.type for op in work.ops if op.kind == "unknown"})) or "no operators"
        raise UsageError(f"holds too much that the latency model does not know ({types})", where=where, fix=_FIX)
    if not times.any():
        raise UsageError("holds no operator that takes time", where=where)
