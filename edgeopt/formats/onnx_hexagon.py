"""Which Hexagon an .onnx file was made for: two entries of its metadata, which QNN's emulator needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeopt.types import Hexagon

if TYPE_CHECKING:
    import onnx

#: The first architecture with float16 arithmetic (Snapdragon 8 Gen 1). Architectures compare as text.
FIRST_WITH_FLOAT = "v69"
ARCHITECTURE, SOC_MODEL = "qnn.htp_arch", "qnn.soc_model"


def describe(proto: onnx.ModelProto, npu: Hexagon) -> None:
    """Note in the file what it was made for, as QNN's provider options name it."""
    proto.metadata_props.add(key=ARCHITECTURE, value=npu.architecture.removeprefix("v"))
    if npu.soc_model is not None:
        proto.metadata_props.add(key=SOC_MODEL, value=str(npu.soc_model))


def made_for(proto: onnx.ModelProto) -> Hexagon | None:
    """What `describe` noted; None for a file that was made for nothing in particular."""
    notes = {entry.key: entry.value for entry in proto.metadata_props}
    if not notes.get(ARCHITECTURE, "").isdecimal():
        return None
    soc = notes.get(SOC_MODEL, "")
    return Hexagon(f"v{notes[ARCHITECTURE]}", int(soc) if soc.isdecimal() else None, None)
