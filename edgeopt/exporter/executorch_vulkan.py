"""PyTorch -> ExecuTorch for the Vulkan delegate (fp16 or fp32), which runs on GPUs of phones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.exporter.base import QuantizationRequest
from edgeopt.exporter.executorch import ExecuTorchExporter
from edgeopt.exporter.executorch_delegated import (
    capture_model,
    delegated_artifact,
    lower_delegated,
    write_emulation,
)
from edgeopt.exporter.executorch_graph import target_is
from edgeopt.exporter.executorch_lowering import quiet_vendor
from edgeopt.formats.executorch_delegated import VULKAN
from edgeopt.types import Artifact, Finding, Format, LayerRules, Model, Scheme

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from torch.export import ExportedProgram
    from torch.fx import Node


class VulkanExporter:
    """The .pte files of a model for Vulkan; the float twin is that of the CPU. See `edgeopt.exporter.base.Exporter`."""

    format: Format = "executorch"
    suffix = ".pte"

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        if scheme.precision not in ("fp16", "fp32"):
            return (
                "the Vulkan delegate is made at fp16 or fp32 here; for integers take an ExecuTorch target for the CPU"
            )
        if rules.keep_float or rules.int16_activations:
            return "the Vulkan delegate has one precision for all layers; take fp32 instead of exempting layers"
        return None

    def export_float(self, model: Model, directory: Path) -> Artifact:
        return ExecuTorchExporter().export_float(model, directory)

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        scheme = request.scheme
        if (reason := self.unsupported(scheme, request.rules)) is not None:
            raise ConversionError(reason, where="scheme", fix="see `edgeopt targets` for what each format offers")
        path, emulation = directory / f"model{self.suffix}", directory / f"model_emulation{self.suffix}"
        with quiet_vendor():
            program = capture_model(model)
            _spell_attention_out(program)
            lower_delegated(program, _partitioner(scheme, model), VULKAN, path)
            write_emulation(model, scheme, emulation)
        return delegated_artifact(model, float_artifact, scheme, path, emulation, VULKAN, "torchao")

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        return ExecuTorchExporter().store_sparse(artifact, directory)


def _partitioner(scheme: Scheme, model: Model) -> Partitioner:
    # Importing this module makes the root logger talkative.
    root = logging.getLogger()
    level = root.level
    try:
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    finally:
        root.setLevel(level)
    dynamic = any(spec.is_dynamic for spec in model.inputs)
    options = {"force_fp16": scheme.precision == "fp16", "require_dynamic_shapes": dynamic}
    partitioner: Partitioner = VulkanPartitioner(options)
    return partitioner


def _spell_attention_out(program: ExportedProgram) -> None:
    """Attention without a mask -> matrix product, softmax, matrix product, in place.

    torch takes it apart with a guard against rows that are masked throughout, which has no shader. Without a mask there
    are no such rows.
    """
    import torch

    aten = torch.ops.aten
    graph = program.graph_module.graph
    for node in [n for n in graph.nodes if target_is(n, "aten.scaled_dot_product_attention")]:
        if not _is_plain(node):
            continue
        query, key, value = node.args[:3]
        scale = node.kwargs.get("scale") or query.meta["val"].shape[-1] ** -0.5
        made = []
        with graph.inserting_before(node):
            made.append(graph.call_function(aten.mul.Tensor, (query, float(scale))))
            made.append(graph.call_function(aten.transpose.int, (key, -2, -1)))
            made.append(graph.call_function(aten.matmul.default, (made[0], made[1])))
            made.append(graph.call_function(aten.softmax.int, (made[2], -1)))
            made.append(graph.call_function(aten.matmul.default, (made[3], value)))
        values = [n.meta["val"] for n in (query, key, value)]
        scores = values[0] @ values[1].transpose(-2, -1)
        for part, like in zip(
            made, (values[0], values[1].transpose(-2, -1), scores, scores, node.meta["val"]), strict=True
        ):
            part.meta = {**node.meta, "val": like}
        node.replace_all_uses_with(made[-1])
        graph.erase_node(node)
    graph.lint()
    program.graph_module.recompile()


def _is_plain(node: Node) -> bool:
    """No mask, not causal, no dropout, one key head for each query head."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    return not any(options.get(name) for name in ("attn_mask", "dropout_p", "is_causal", "enable_gqa"))
