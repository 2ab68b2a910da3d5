"""Which tensors XNNPACK shall hold as int8: ExecuTorch's own quantizer, corrected where it costs accuracy or breaks.

What differs from the stock XNNPACKQuantizer, and why:

- convolution or linear followed by ReLU6/hardtanh is observed after the clip, not before it (7.7 -> 19 dB on
  EfficientNet-Lite0);
- spatial means get a range of their own, narrower than their input's;
- a weight that several layers share is quantized in each of them, not only in the first;
- integer arithmetic is left alone, and so are additive masks that reach "minus infinity";
- layers that stay float are annotated as done beforehand, so that no range leaks through them;
- multiplication followed by ReLU is not fused, since the delegate would run it in float;
- additions and multiplications among float operators stay float: two conversions cost more than they save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeopt.exporter.executorch_graph import attribute, layer_of, operator_name, target_is
from edgeopt.exporter.executorch_weights import fits_4_bits
from edgeopt.layer_names import layer_is_exempt
from edgeopt.types import Scheme

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node
    from torchao.quantization.pt2e.quantizer import QuantizationConfig

_GEMMS = ("aten.conv1d", "aten.conv2d", "aten.linear", "aten.conv_transpose1d", "aten.conv_transpose2d")
_UNSUPPORTED = ("aten.conv3d", "aten.conv_transpose3d")
_CLIPS = ("aten.hardtanh", "aten.hardtanh_")
_MEANS = ("aten.mean", "aten.adaptive_avg_pool2d")
_SCALAR_OPERATORS = ("aten.add", "aten.mul")

#: Stand-ins for minus infinity start here: -1e4 was BERT's, -65504 is the least float16.
_MASK_MAGNITUDE = 1e4
#: Operators through which such a value travels unchanged, or is made.
_MASK_CARRIERS = (
    "aten.where", "aten.masked_fill", "aten.masked_fill_", "aten.full", "aten.full_like", "aten.mul", "aten.expand",
    "aten.view", "aten.reshape", "aten.slice", "aten.unsqueeze", "aten.squeeze", "aten.permute", "aten.transpose",
    "aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.index", "aten.select", "aten.scalar_tensor",
    "aten.lift_fresh_copy", "aten.detach", "aten.detach_", "aten.add",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class XnnpackQuantizer:
    """A PT2E quantizer (torchao's protocol) for one scheme. Make it with `quantizer_for`."""

    scheme: Scheme
    keep_float: tuple[str, ...]

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        _own_every_constant(model.graph)
        if self.scheme.activations == "static":
            _scalars_to_constants(model)
        model.recompile()
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write a QuantizationAnnotation into the metadata of every node that shall be quantized."""
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer

        masks = _mask_like(model.graph)
        for node in model.graph.nodes:
            if node.op == "call_function" and self._stays_float(node, masks):
                _annotate(node)
        if self.scheme.weight_bits == 4:
            self._annotate_4_bit_linears(model)
        stock = XNNPACKQuantizer().set_global(self._config())
        wanted = {"linear", "linear_relu"} if self.scheme.activations == "dynamic" else None
        stock.SUPPORTED_PATTERNS = [
            pattern
            for pattern in stock.SUPPORTED_PATTERNS
            if pattern.name != "mul_relu" and (wanted is None or pattern.name in wanted)
        ]
        stock.annotate(model)
        if self.scheme.activations == "static":
            self._refine(model.graph)
            _clear_islands(model.graph)
        return model

    def validate(self, model: GraphModule) -> None:
        """Part of the protocol; nothing can be wrong here that conversion would not say better."""

    def prepare_obs_or_fq_callback(self, model: GraphModule, observers: Mapping[object, object]) -> None:
        """Part of the protocol; ranges are set after calibration."""

    def _stays_float(self, node: Node, masks: set[Node]) -> bool:
        import torch

        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
            return True
        if layer_is_exempt(layer_of(node), self.keep_float) or target_is(node, *_UNSUPPORTED):
            return True
        if target_is(node, *_GEMMS):
            sources = node.all_input_nodes
            return len(sources) < 2 or sources[1] is not node.args[1] or sources[1].op != "get_attr"
        if target_is(node, "aten.adaptive_avg_pool2d"):
            return node.args[1] not in (1, [1], [1, 1])
        if target_is(node, "aten.mean"):
            return list(node.args[1:]) != [[2, 3], True] or node.meta["val"].dim() != 4
        return target_is(node, "aten.add", "aten.add_", "aten.mul", "aten.mul_", "aten.cat") and any(
            source in masks for source in node.all_input_nodes
        )

    def _annotate_4_bit_linears(self, model: GraphModule) -> None:
        """Only what they read goes through PT2E, which knows no groups; the weight follows after conversion."""
        from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

        for node in model.graph.nodes:
            is_open = target_is(node, "aten.linear") and Q_ANNOTATION_KEY not in node.meta
            if is_open and fits_4_bits(attribute(model, node.args[1]), self.scheme):
                _annotate(node, {node.args[0]: self._dynamic_config().input_activation})

    def _refine(self, graph: Graph) -> None:
        from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

        for node in list(graph.nodes):
            annotation = node.meta.get(Q_ANNOTATION_KEY)
            if node.op != "call_function" or annotation is None or annotation.output_qspec is None:
                continue
            if target_is(node, *_CLIPS) and _is_only_user(node, *_GEMMS):
                producer = node.args[0].meta[Q_ANNOTATION_KEY]
                if producer.output_qspec is not None:
                    _annotate(node, output=producer.output_qspec)
                    producer.output_qspec = None
            elif target_is(node, *_MEANS):
                _annotate(node, {node.args[0]: self._activation()}, self._activation())
            elif target_is(node, *_GEMMS) and _is_only_user(node, "aten.pad", "aten.constant_pad_nd"):
                self._quantize_before_padding(node)

    def _quantize_before_padding(self, node: Node) -> None:
        """Observe what is padded, not the result: the delegate pads int8 only where a dequantize comes first."""
        from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

        padding = node.all_input_nodes[0]
        if not _pads_with_zero(padding):
            return
        annotation = node.meta[Q_ANNOTATION_KEY]
        annotation.input_qspec_map = {k: v for k, v in annotation.input_qspec_map.items() if k is not padding}
        _annotate(padding, {padding.all_input_nodes[0]: self._activation()})

    def _dynamic_config(self) -> QuantizationConfig:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config

        config: QuantizationConfig = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
        return config

    def _config(self) -> QuantizationConfig:
        from torchao.quantization.pt2e.quantizer import QuantizationConfig

        if self.scheme.activations == "dynamic":
            return self._dynamic_config()
        return QuantizationConfig(self._activation(), self._activation(), self._weight(), None, False)

    def _activation(self) -> object:
        """int8 per tensor; the observer only holds a place for what calibration finds."""
        import torch
        from torchao.quantization.pt2e import FixedQParamsObserver
        from torchao.quantization.pt2e.quantizer import QuantizationSpec

        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-127 if self.scheme.activation_symmetric else -128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            is_dynamic=False,
            observer_or_fake_quant_ctr=FixedQParamsObserver.with_args(scale=1.0, zero_point=0),
        )

    def _weight(self) -> object:
        import torch
        from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
        from torchao.quantization.pt2e.quantizer import QuantizationSpec

        per_channel = self.scheme.weight_granularity == "per-channel"
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
            ch_axis=0,
            is_dynamic=False,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver if per_channel else MinMaxObserver,
        )


def _annotate(node: Node, inputs: Mapping[object, object] | None = None, output: object = None) -> None:
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=dict(inputs or {}), output_qspec=output, _annotated=True
    )


def _clear_islands(graph: Graph) -> None:
    """Take the annotations off every connected group of quantized operators that holds no convolution or linear."""
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    annotations = {
        node: node.meta[Q_ANNOTATION_KEY]
        for node in graph.nodes
        if node.op == "call_function" and Q_ANNOTATION_KEY in node.meta
    }
    group = {node: node for node in annotations}

    def root(node: Node) -> Node:
        parent: Node = group[node]
        return parent if parent is node else root(parent)

    for node, annotation in annotations.items():
        for source in node.all_input_nodes:
            if source not in group:
                continue
            # A producer with quantized inputs and a plain output is fused with this node: gemm + clip, pad + gemm.
            fused = annotations[source].input_qspec_map and annotations[source].output_qspec is None
            if source in annotation.input_qspec_map or fused:
                group[root(node)] = root(source)
    anchored = {root(node) for node in annotations if target_is(node, *_GEMMS) and annotations[node].input_qspec_map}
    for node in annotations:
        if root(node) not in anchored:
            _annotate(node)


def _is_only_user(node: Node, *producers: str) -> bool:
    source = node.args[0]
    return target_is(source, *producers) and len(getattr(source, "users", ())) == 1


def _pads_with_zero(node: Node) -> bool:
    extra = node.args[2:]
    return all(value in ("constant", 0, 0.0, None) for value in extra) and not node.kwargs


def _own_every_constant(graph: Graph) -> None:
    """Give every user of a parameter its own reference: the annotators skip a node whose weight is already marked."""
    for node in [n for n in graph.nodes if n.op == "get_attr" and len(n.users) > 1]:
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                copy = graph.get_attr(str(node.target))
            copy.meta = dict(node.meta)
            user.replace_input_with(node, copy)


def _scalars_to_constants(model: GraphModule) -> None:
    """`x + 3.0` in float -> `x + tensor`, which can be quantized. Integer arithmetic keeps its scalars."""
    import torch

    for node in list(model.graph.nodes):
        if not target_is(node, *_SCALAR_OPERATORS) or operator_name(node).rpartition(".")[2] != "Tensor":
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        node.args = tuple(_constant(model, node, a) if isinstance(a, (int, float)) else a for a in node.args)


def _constant(model: GraphModule, before: Node, scalar: float) -> Node:
    import torch

    name = f"_scalar_{sum(1 for n, _ in model.named_buffers(recurse=False) if n.startswith('_scalar_'))}"
    tensor = torch.tensor(float(scalar))
    model.register_buffer(name, tensor)
    with model.graph.inserting_before(before):
        node = model.graph.get_attr(name)
    mode = getattr(before.meta["val"], "fake_mode", None)
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode is not None else tensor
    return node


def _mask_like(graph: Graph) -> set[Node]:
    """Nodes whose value may hold a stand-in for minus infinity: no int8 grid could also resolve anything else."""
    masks: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if _constant_magnitude(graph, node) >= _MASK_MAGNITUDE:
                masks.add(node)
        elif target_is(node, *_MASK_CARRIERS):
            large = any(isinstance(a, (int, float)) and abs(a) >= _MASK_MAGNITUDE for a in node.args)
            if large or any(source in masks for source in node.all_input_nodes):
                masks.add(node)
    return masks


def _constant_magnitude(graph: Graph, node: Node) -> float:
    """Largest magnitude of a scalar constant; weights and tables are not looked at."""
    import torch

    owner = graph.owning_module
    path, _, name = str(node.target).rpartition(".")
    value = getattr(owner.get_submodule(path), name, None) if owner is not None else None
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
        return 0.0
    return abs(float(value.item()))
