"""A model's layers as the exporters' rules address them: what can be exempted, alone or in groups."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.formats import summarize
from edgeopt.formats.litert import ROOT, layer_of
from edgeopt.formats.onnx import source_layer
from edgeopt.layer_names import layer_is_exempt, strip_wrapper
from edgeopt.types import Artifact, Format, LayerRules

if TYPE_CHECKING:
    import torch

    from edgeopt.workbench import Workbench

#: A constant scale or offset is no layer: quantizing it is not worth a trial.
_MIN_WEIGHT_BYTES = 64
#: A group that gets this small is measured layer by layer.
_SMALL_GROUP = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer with weights.

    Attributes:
        path: of the source layer, as `LayerRules` patterns match it.
        type: the operator that holds most of the weights.
        float_bytes: its weights in the float file.
        macs: multiply-accumulates per inference; None where the file tells the layer's time itself.
    """

    path: str
    type: str
    float_bytes: int
    macs: int | None = None


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of one model in one format.

    Attributes:
        layers: those with weights that quantization touches, in the order of the file.
    """

    layers: tuple[Layer, ...]

    def keeping(self, chosen: Collection[str]) -> tuple[str, ...]:
        """Patterns that exempt exactly these layers; a module whose layers are all chosen is named as a whole, so
        that what it computes without weights is exempt too."""
        others = [layer.path for layer in self.layers if layer.path not in chosen]
        if not others and chosen:
            return ("*",)
        ordered = (layer.path for layer in self.layers if layer.path in chosen)
        return _patterns(_shortest_clear(path, others) for path in ordered)

    def sparing(self, chosen: Collection[str]) -> tuple[str, ...]:
        """Patterns that exempt every other layer. What has no weights and is in no module of its own with an exempt
        layer stays to the exporter: an activation function that it fuses belongs to the layer before it."""
        others = (layer.path for layer in self.layers if layer.path not in chosen)
        return _patterns(_shortest_clear(path, chosen) for path in others)


def find_layers(workbench: Workbench, plain: Artifact, rules: LayerRules) -> Layers:
    """The layers that are quantized in `plain`, the file at the scheme with `rules`.

    Raises ConversionError when there are none, or none that a pattern can name.
    """
    if plain.format == "executorch":
        found = _of_module(workbench)
    else:
        found = _of_file(workbench.float_artifact(plain.format), plain)
    named = _addressable([layer for layer in found if layer.path])
    quantized = Layers(tuple(layer for layer in named if not layer_is_exempt(layer.path, rules.keep_float)))
    if found and not named:
        raise ConversionError(
            "its quantized layers have no names, so none can be spared alone (the model is a single layer, or a graph "
            "without scopes)",
            where=plain.path.name,
        )
    if not quantized.layers:
        raise ConversionError("no layer with weights is quantized, so there is nothing to tune", where=plain.path.name)
    return quantized


def path_of(format_: Format, operator: str) -> str:
    """The source layer's path in an operator's name (`OpInfo.name`); "" where it has none."""
    if format_ == "onnx":
        from onnx import NodeProto

        return strip_wrapper(source_layer(NodeProto(name=operator)))
    layer = layer_of(operator)
    return "" if layer == ROOT else strip_wrapper(layer)


def _of_file(float_file: Artifact, plain: Artifact) -> tuple[Layer, ...]:
    format_ = float_file.format
    # What has no integer kernel stays float in every file, and does no damage.
    quantized = {path_of(format_, op.name) for op in summarize(plain.path).ops if "int" in op.dtype}
    layers: dict[str, Layer] = {}
    for op in summarize(float_file.path).ops:
        path = path_of(format_, op.name)
        if path not in quantized or op.weight_bytes < _MIN_WEIGHT_BYTES:
            continue
        known = layers.get(path)
        if known is None:
            layers[path] = Layer(path, op.type, op.weight_bytes)
        else:
            type_ = known.type if known.float_bytes >= op.weight_bytes else op.type
            layers[path] = replace(known, type=type_, float_bytes=known.float_bytes + op.weight_bytes)
    return tuple(layers.values())


def _of_module(workbench: Workbench) -> tuple[Layer, ...]:
    """From the torch module: a .pte file does not name its layers. Order and MACs come from one run."""
    import torch

    from edgeopt.compression.base import forward

    model = workbench.torch_model()
    if model.module is None:
        raise ValueError("a model rebuilt in torch has a module")
    layers: dict[str, Layer] = {}
    hooks = []

    def watch(path: str, module: torch.nn.Module) -> None:
        def ran(_: torch.nn.Module, arguments: tuple[object, ...], result: object) -> None:
            del arguments
            weight = getattr(module, "weight", None)
            # Normalization has one weight per channel; the exporters fold it or leave it float.
            if isinstance(weight, torch.Tensor) and weight.ndim >= 2 and isinstance(result, torch.Tensor):
                size = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
                # Each weight is used once per position of its output channel.
                macs = weight.numel() * max(result.numel() // max(weight.shape[0], 1), 1)
                layers.setdefault(path, Layer(path, type(module).__name__, size, macs))

        hooks.append(module.register_forward_hook(ran))

    # A layer may have modules of its own (padding, parametrizations), so leaves alone would not do.
    for name, part in model.module.named_modules():
        watch(strip_wrapper(name), part)
    try:
        forward(model, model.example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(layers.values()) or tuple(_of_graph(model.module))


def _of_graph(module: torch.nn.Module) -> Iterator[Layer]:
    """Layers of an exported program, which are operators that remember their module."""
    import torch

    found: dict[str, Layer] = {}
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        weights = {name: value for name, value in part.state_dict().items() if value.ndim >= 2}
        for node in part.graph.nodes:
            sizes = [
                weights[str(source.target)].numel() * weights[str(source.target)].element_size()
                for source in node.all_input_nodes
                if source.op == "get_attr" and str(source.target) in weights
            ]
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path = strip_wrapper(str(stack[-1][0])) if stack else ""
            if sizes:
                found.setdefault(path, Layer(path, str(node.target), sum(sizes)))
    yield from found.values()


def _addressable(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Without those that contain another layer: no pattern exempts the one and not the other."""
    return tuple(layer for layer in layers if not any(o is not layer and _within(o.path, layer.path) for o in layers))


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _shortest_clear(path: str, others: Collection[str]) -> str | None:
    """The outermost module around `path` that contains none of `others`; None when there is none."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        if not any(_within(other, module) for other in others):
            return module
    return None


def _patterns(modules: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(escape(module) for module in modules if module is not None))


# --- groups --------------------------------------------------------------------------------------------------------


def split(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Groups of neighbouring layers, about as many as each has members, along the borders of modules."""
    limit = 1 if len(layers) <= _SMALL_GROUP else math.ceil(math.sqrt(len(layers)))
    return [tuple(group) for group in _split(layers, limit, depth=0)]


def _split(layers: Sequence[Layer], limit: int, depth: int) -> list[list[Layer]]:
    if len(layers) <= limit:
        return [list(layers)]

    def part(layer: Layer) -> tuple[str, ...]:
        return tuple(layer.path.split(".")[depth : depth + 1])

    children = [list(members) for _, members in groupby(layers, key=part)]
    groups: list[list[Layer]] = []
    for child in children:
        if len(child) > limit:
            groups += _split(child, limit, depth + 1)
        elif groups and len(groups[-1]) + len(child) <= limit:
            groups[-1] = groups[-1] + child
        else:
            groups.append(child)
    return groups


def runs(flags: Sequence[bool]) -> Iterator[range]:
    """Positions of the maximal runs of True."""
    position = 0
    for value, members in groupby(flags):
        length = len(list(members))
        if value:
            yield range(position, position + length)
        position += length


def int8_bytes(plain: Path, format_: Format) -> dict[str, int]:
    """Weight bytes by layer in a quantized file; empty where the file does not name its layers."""
    if format_ == "executorch":
        return {}
    sizes: dict[str, int] = {}
    for op in summarize(plain).ops:
        path = path_of(format_, op.name)
        sizes[path] = sizes.get(path, 0) + op.weight_bytes
    return sizes
