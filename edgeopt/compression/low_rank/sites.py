"""Which layers of a network two smaller ones can stand for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeopt.compression.base import forward
from edgeopt.compression.cost import single_example
from edgeopt.compression.low_rank.decompose import Site, forms_of, macs_per_rank
from edgeopt.compression.pruning.groups import Kept
from edgeopt.layer_names import check_patterns, layer_is_exempt, strip_wrapper
from edgeopt.types import Array, Model

#: Relative to the largest value of an output: what other kernels for the same operator may differ by.
_ROUNDING = 1e-4

_NOT_CALLED = "its parent reads its weights without calling it"
_MORE = "its forward does more than its operator"
_READ = "its parent asks for its weights or its type"


@dataclass(frozen=True, slots=True)
class Factorizable:
    """What `factorizable` found: layers in the order of the module, and the others with weights."""

    sites: tuple[Site, ...]
    kept: tuple[Kept, ...]


@dataclass(slots=True)
class _Calls:
    positions: int = 0
    tall_positions: int = 0
    is_plain: bool = True
    norm: str | None = None


def factorizable(model: Model, protect: Sequence[str] = ()) -> Factorizable:
    """Linear layers (transformers' Conv1D, too) and ungrouped convolutions that can be split.

    That a layer's `forward` is its operator alone and that nothing but a call reads it is found out by running the
    example input: once as the network is, and with the layers inside containers of their own.

    Args:
        protect: patterns of layers that stay whole; see `edgeopt.layer_names`.

    Raises UsageError for a pattern that matches no layer.
    """
    module = copy.deepcopy(_module(model))
    check_patterns({strip_wrapper(path) for path, _ in module.named_modules()}, protect, "protect")
    owners = Counter(id(own) for part in module.modules() for own in part._parameters.values())
    reasons: dict[str, str] = {}
    layers: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        if is_transposed_linear(part) or isinstance(part, nn.Linear | nn.modules.conv._ConvNd):
            name = strip_wrapper(path)
            if (reason := _why_not(name, part, owners, protect)) is None:
                layers[name] = part
            else:
                reasons[name] = reason
    example = single_example(model)
    calls = _watch(replace(model, module=module), example, layers)
    for name, call in calls.items():
        if not call.is_plain or call.positions == 0:
            reasons[name] = _NOT_CALLED if call.is_plain else _MORE
        elif not _saves(_site(name, layers[name], call), layers[name]):
            reasons[name] = "no rank of it would save anything"
    read = _read_by_parents(
        replace(model, module=module), example, {k: v for k, v in layers.items() if k not in reasons}
    )
    reasons |= dict.fromkeys(read, _READ)
    sites = tuple(_site(name, layer, calls[name]) for name, layer in layers.items() if name not in reasons)
    return Factorizable(sites, tuple(Kept(name, reason) for name, reason in reasons.items()))


def is_transposed_linear(part: nn.Module) -> bool:
    """Whether it is a linear layer that keeps its weights as (inputs, outputs), as transformers' GPT-2 does."""
    weight = part._parameters.get("weight")
    return type(part).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def places_of(module: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every parent that has the layer, and the name that it has there."""
    return [(parent, name) for parent in module.modules() for name, child in parent._modules.items() if child is layer]


def _why_not(path: str, part: nn.Module, owners: Mapping[int, int], protect: Iterable[str]) -> str | None:
    weight = part._parameters.get("weight")
    if not path:
        return "it is the whole network"
    if layer_is_exempt(path, protect):
        return "it is protected"
    if weight is None:
        return "its weights are computed from other parameters"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"its weights are of type {str(weight.dtype).removeprefix('torch.')}"
    if owners[id(weight)] > 1:
        return "other layers share its weights"
    if isinstance(part, nn.modules.conv._ConvTransposeNd):
        return "it is a transposed convolution"
    if isinstance(part, nn.modules.conv._ConvNd) and part.groups > 1:
        return "it is a grouped convolution"
    return None


def _watch(model: Model, example: Mapping[str, Array], layers: Mapping[str, nn.Module]) -> dict[str, _Calls]:
    calls = {name: _Calls() for name in layers}
    outputs: list[tuple[Tensor, _Calls]] = []
    handles = [
        part.register_forward_hook(_Watcher(calls[name], outputs), with_kwargs=True) for name, part in layers.items()
    ]
    for path, part in _module(model).named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            handles.append(part.register_forward_pre_hook(_NormWatcher(strip_wrapper(path), outputs)))
    try:
        forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass(frozen=True, slots=True)
class _Watcher:
    """A forward hook that notes what a layer computes."""

    calls: _Calls
    outputs: list[tuple[Tensor, _Calls]]

    def __call__(self, part: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object) -> None:
        given = (*args, *kwargs.values())
        value = given[0] if len(given) == 1 else None
        if not isinstance(value, Tensor) or not isinstance(output, Tensor):
            self.calls.is_plain = False
            return
        self.outputs.append((output, self.calls))
        wanted = _operator(part, value)
        self.calls.is_plain = self.calls.is_plain and _are_alike([wanted], [output])
        if not isinstance(part, nn.modules.conv._ConvNd):
            self.calls.positions += output[..., 0].numel()
            return
        self.calls.positions += output.numel() // part.out_channels
        if isinstance(part, nn.Conv2d):
            self.calls.tall_positions += output.numel() // part.out_channels // output.shape[-1] * value.shape[-1]


@dataclass(frozen=True, slots=True)
class _NormWatcher:
    """A hook that notes whose output a batch norm reads."""

    path: str
    outputs: list[tuple[Tensor, _Calls]]

    def __call__(self, part: nn.Module, args: tuple[object, ...]) -> None:
        del part
        for output, calls in self.outputs:
            if args and args[0] is output:
                calls.norm = self.path


def _operator(part: nn.Module, value: Tensor) -> Tensor:
    weight, bias = part.get_parameter("weight"), part._parameters.get("bias")
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        result: Tensor = part._conv_forward(value, weight, bias)
        return result
    return functional.linear(value, weight if isinstance(part, nn.Linear) else weight.mT, bias)


def _are_alike(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Up to rounding."""
    for one, other in zip(wanted, found, strict=True):
        if one.shape != other.shape:
            return False
        largest = one.double().nan_to_num(0, 0, 0).abs().max().item() if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=_ROUNDING * largest, equal_nan=True):
            return False
    return True


def _site(path: str, layer: nn.Module, calls: _Calls) -> Site:
    is_convolution = isinstance(layer, nn.modules.conv._ConvNd)
    return Site(path, "convolution" if is_convolution else "linear", calls.positions, calls.tall_positions, calls.norm)


def _saves(site: Site, layer: nn.Module) -> bool:
    macs = layer.get_parameter("weight").numel() * site.positions
    return any(macs_per_rank(layer, site, form) < macs for form in forms_of(layer))


def _read_by_parents(model: Model, example: Mapping[str, Array], layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers that can't be inside a container: all are tried at once, and one after another if that fails."""
    module = _module(model)
    wanted = forward(model, example)

    def works() -> bool:
        try:
            return _are_alike(wanted, forward(model, example))
        except Exception:  # the user's code, which may do anything when a layer is not what it expects
            return False

    places = {name: places_of(module, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        _put(places[name], nn.Sequential(layer))
    if works():
        return []
    for name, layer in layers.items():
        _put(places[name], layer)
    read = []
    for name, layer in layers.items():
        _put(places[name], nn.Sequential(layer))
        if not works():
            _put(places[name], layer)
            read.append(name)
    return read


def _put(places: Iterable[tuple[nn.Module, str]], layer: nn.Module) -> None:
    for parent, name in places:
        parent._modules[name] = layer.eval()


def _module(model: Model) -> nn.Module:
    if model.module is None:
        raise ValueError("factorization takes a model with a torch module; see sources.as_torch")
    return model.module
