"""Model -> LiteRT (.tflite) for an Ethos-U: what the LiteRT exporter makes, with integers at its borders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.litert import LiteRTExporter
from edgeopt.types import Artifact, LayerRules, Model, Scheme


class EthosUExporter(LiteRTExporter):
    """See `edgeopt.exporter.base.Exporter`.

    A w8a16 file gets int16 inputs and outputs. LiteRT's exporter makes float ones there, and the NPU has no operator
    that converts them: each would cost the CPU a pass over the tensor. In a w8a8 file the scheme decides.
    """

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        return super().unsupported(replace(scheme, io="float") if scheme.precision == "w8a16" else scheme, rules)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        if free := next((spec.name for spec in model.inputs if spec.is_dynamic), None):
            raise ConversionError(
                f"the input {free!r} has a free dimension, and an Ethos-U runs static shapes only",
                where=model.name,
                fix="give a static one: --input 'NAME=float32[1,3,224,224]'",
            )
        if request.scheme.precision != "w8a16":
            return super().export_quantized(model, float_artifact, request, directory)
        # Quantized borders have the type of the activations; a scheme's word for them is "int8".
        integer = replace(request, scheme=replace(request.scheme, io="int8"))
        artifact = super().export_quantized(model, float_artifact, integer, directory)
        *before, step = artifact.history
        return replace(artifact, history=(*before, replace(step, config={**step.config, "io": "int16"})))
