"""What layers read and put out, summed up while calibration samples stream through the network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from edgeopt.compression.base import PassInputs, forward
from edgeopt.compression.low_rank.decompose import (
    Factors,
    Form,
    Site,
    factors_of,
    forms_of,
    output_scale,
    shape_of,
)
from edgeopt.compression.low_rank.directions import Covariance
from edgeopt.errors import ConversionError
from edgeopt.sources.structure_values import user_module
from edgeopt.types import Model

#: A covariance of more channels than this is not kept: its layer is split by its weights alone.
MAX_CHANNELS = 4096
#: Covariances of one pass over the samples, in bytes; what doesn't fit takes another pass.
MAX_BYTES = 512 << 20
#: Samples on which two ways to split a layer compete.
_COMPARED = 8
#: And the share of the layer's MACs at which they do.
_COMPARED_MACS = 0.5

_Key = tuple[str, Form]


class _Seer(Protocol):
    def see(self, layer: nn.Module, value: Tensor, output: Tensor) -> None: ...


def split_all(model: Model, sites: Sequence[Site], inputs: PassInputs | None) -> dict[str, Factors]:
    """The better way to split each layer, by its path.

    Args:
        inputs: samples whose outputs the pairs should keep; None goes by the weights alone.

    Where a convolution can be split in two ways, the one wins whose outputs differ less on some samples at half of the
    layer's MACs. Memory: `MAX_BYTES` of covariances beside the factors themselves, which are as large as the weights
    in float64. Runs the samples once per `MAX_BYTES`.

    Raises ConversionError naming the layer where weights or inputs are not finite.
    """
    network = replace(model, module=copy.deepcopy(model.module))
    layers = layers_of(network, sites)
    norms = {site.path: _part(network, site.norm) for site in sites if site.norm is not None}
    found: dict[_Key, Factors] = {}
    for batch in _batches([(site, form) for site in sites for form in forms_of(layers[site.path])], layers):
        sums = _summed(network, layers, batch, inputs) if inputs is not None else {}
        for site, form in batch:
            key = site.path, form
            seen = sums[key].covariance() if key in sums else None
            found[key] = factors_of(layers[site.path], site, form, seen, norms.get(site.path))
    losses = _losses(network, layers, norms, found, inputs)
    best: dict[str, Factors] = {}
    for (path, form), factors in found.items():
        if path not in best or losses[path, form] < losses[path, best[path].form]:
            best[path] = factors
    return best


def layers_of(model: Model, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """The sites' layers in a model."""
    return {site.path: _part(model, site.path) for site in sites}


def _part(model: Model, path: str) -> nn.Module:
    assert model.module is not None
    return user_module(model.module).get_submodule(path)


class _Sums:
    """Adds up rows, of every other sample apart; about the first sample's mean, for values that are large and hardly
    vary."""

    def __init__(self, form: Form, side: Literal["inputs", "outputs"], size: int) -> None:
        self._form = form
        self._side = side
        self._shift: Tensor | None = None
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._sums = torch.zeros(2, size, dtype=torch.float64)
        self._products = torch.zeros(2, size, size, dtype=torch.float64)
        self.half = 0

    def see(self, layer: nn.Module, value: Tensor, output: Tensor) -> None:
        rows = _rows(layer, self._form, value) if self._side == "inputs" else _responses(layer, output)
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        self._counts[self.half] += len(rows)
        self._sums[self.half] += rows.sum(0)
        self._products[self.half] += rows.mT @ rows

    def covariance(self) -> Covariance | None:
        """None where the layer was never called."""
        if self._shift is None:
            return None
        mean = self._sums.sum(0) / self._counts.sum()
        whole = _centred(self._counts.sum(), self._sums.sum(0), self._products.sum(0), mean)
        halves = None
        if bool((self._counts > 0).all()):
            one, other = (_centred(*half, mean) for half in zip(self._counts, self._sums, self._products, strict=True))
            halves = one, other
        return Covariance(self._side, mean + self._shift, whole, halves)


def _centred(count: Tensor, sums: Tensor, products: Tensor, mean: Tensor) -> Tensor:
    cross = torch.outer(sums / count, mean)
    values = products / count - cross - cross.mT + torch.outer(mean, mean)
    # Rounding may leave a constant channel a variance below zero.
    values.diagonal().clamp_(min=0)
    return values


def _summed(
    model: Model, layers: Mapping[str, nn.Module], batch: Sequence[tuple[Site, Form]], inputs: PassInputs
) -> dict[_Key, _Sums]:
    sums: dict[_Key, _Sums] = {}
    for site, form in batch:
        side, size = _measured(layers[site.path], form)
        if size <= MAX_CHANNELS:
            sums[site.path, form] = _Sums(form, side, size)
    with _watched(layers, [(path, one) for (path, _), one in sums.items()]):
        assert inputs.samples is not None
        samples = inputs.progress.track(inputs.samples(), "Measuring what layers read", inputs.count)
        for index, sample in enumerate(samples):
            for one in sums.values():
                one.half = index % 2
            forward(model, sample.inputs)
    return sums


def _measured(layer: nn.Module, form: Form) -> tuple[Literal["inputs", "outputs"], int]:
    """The side whose covariance says the most for the least memory. Only a separable pair's inputs are at hand: its
    outputs are those of each column of the kernel alone."""
    n, m = shape_of(layer, form)
    return ("outputs", m) if m <= n and form == "channels" else ("inputs", n)


def _batches(parts: Sequence[tuple[Site, Form]], layers: Mapping[str, nn.Module]) -> Iterator[list[tuple[Site, Form]]]:
    batch: list[tuple[Site, Form]] = []
    used = 0
    for site, form in parts:
        size = 2 * 8 * _measured(layers[site.path], form)[1] ** 2
        if batch and used + size > MAX_BYTES:
            yield batch
            batch, used = [], 0
        batch.append((site, form))
        used += size
    if batch:
        yield batch


def _rows(layer: nn.Module, form: Form, value: Tensor) -> Tensor:
    """(positions, n): what the matrix reads at each of them, in float64."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        value = value if value.ndim == layer.weight.ndim else value[None]
        return _patches(layer, form, value).double()
    return value.reshape(-1, value.shape[-1]).double()


def _patches(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, form: Form, value: Tensor) -> Tensor:
    kernel = layer.kernel_size
    padding = layer._reversed_padding_repeated_twice
    stride, dilation = layer.stride, layer.dilation
    if form == "separable":
        kernel, stride, dilation = (kernel[0], 1), (stride[0], 1), (dilation[0], 1)
        padding = [0, 0, *padding[2:]]
    mode = layer.padding_mode if layer.padding_mode != "zeros" else "constant"
    value = nn.functional.pad(value, padding, mode=mode)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        value = value.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    # (batch, channels, places, kernel) -> (batch and places, channels and kernel)
    places = len(kernel)
    return value.movedim(1, places + 1).flatten(places + 1).flatten(0, places)


def _responses(layer: nn.Module, output: Tensor) -> Tensor:
    """(positions, m): what the matrix puts out, in float64."""
    bias = layer._parameters.get("bias")
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        output = output if output.ndim == layer.weight.ndim else output[None]
        output = output.movedim(1, -1)
    rows = output.reshape(-1, output.shape[-1]).double()
    return rows if bias is None else rows - bias.double()


class _Trial:
    """A pair beside its layer."""

    def __init__(self, pair: nn.Module, scale: Tensor) -> None:
        self._pair = pair
        self._scale = scale[:, None, None]  # only 2-D convolutions can be split in two ways
        self.error = 0.0

    def see(self, layer: nn.Module, value: Tensor, output: Tensor) -> None:
        del layer
        self.error += float(((self._pair(value) - output) * self._scale).square().sum())


def _losses(
    model: Model,
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    found: Mapping[_Key, Factors],
    inputs: PassInputs | None,
) -> dict[_Key, float]:
    """Of the ways that compete for a layer, at the same MACs: squared error of the output, or of the weights."""
    contested = {key for key in found if len([other for other in found if other[0] == key[0]]) > 1}
    ranks = {
        key: max(1, min(len(one.energies), int(_COMPARED_MACS * one.macs / one.macs_per_rank)))
        for key, one in found.items()
        if key in contested
    }
    if inputs is None or not contested:
        return {key: float(one.energies[ranks.get(key, 0) :].sum()) for key, one in found.items()}
    trials = {
        (path, form): _Trial(found[path, form].pair(layers[path], rank), output_scale(layers[path], norms.get(path)))
        for (path, form), rank in ranks.items()
    }
    with _watched(layers, [(path, trial) for (path, _), trial in trials.items()]):
        assert inputs.samples is not None
        count = min(_COMPARED, inputs.count)
        samples = islice(inputs.samples(), count)
        for sample in inputs.progress.track(samples, "Comparing ways to split convolutions", count):
            forward(model, sample.inputs)
    return {key: trials[key].error if key in trials else 0.0 for key in found}


@contextmanager
def _watched(layers: Mapping[str, nn.Module], seers: Sequence[tuple[str, _Seer]]) -> Iterator[None]:
    handles = [layers[path].register_forward_hook(_Watcher(seer), with_kwargs=True) for path, seer in seers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class _Watcher:
    """A forward hook that shows a layer's input and output."""

    seer: _Seer

    def __call__(
        self, layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        value = next(iter((*args, *kwargs.values())))
        if not isinstance(value, Tensor) or not isinstance(output, Tensor):
            raise ConversionError("reads or returns no tensor", where=f"{type(layer).__name__}")
        self.seer.see(layer, value, output)
