"""A network that computes in float what its int8 file will compute in integers, and can be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeopt.calibration.ranges import ActivationRanges, Range
from edgeopt.errors import ConversionError
from edgeopt.layer_names import strip_wrapper
from edgeopt.training.calls import explained
from edgeopt.training.fake_quant import ActivationQuantizer, Grid, WeightQuantizer, quantize_to_own_range
from edgeopt.training.graph import record, tensors_of
from edgeopt.training.plan import Plan, composites_of, plan
from edgeopt.training.sites import Operator, Place, Scopes, Site, SiteMode
from edgeopt.training.trainable import Batches, Trainable
from edgeopt.types import EstimatorSpec, Format, LayerRules, Scheme

#: Magnitude that no activation reaches but "minus infinity" of an attention mask; exporters keep such tensors float.
_MASK = 1e9


class QuantizedModule(Trainable):
    """A copy of a network with fake quantization around the operators that a format computes in int8.

    The copy keeps its own Python: it may be in training mode, with dropout and batch statistics, and its gradients
    may be checkpointed. Until `calibrate` has run it computes in float.

    Args:
        network: in eval mode; it is copied.
        example: arguments for one call.
        format_, scheme, rules: what will be exported.
        is_static: whether every input of the file has a fixed shape.
        learned: whether weight scales, and the ranges of what layers with weights read, are trained (LSQ).

    Attributes:
        network: the copy.
        plan: what is rounded where.

    Raises:
        ConversionError: nothing in the network would be quantized.
    """

    def __init__(
        self,
        network: nn.Module,
        example: Sequence[Tensor],
        format_: Format,
        scheme: Scheme,
        rules: LayerRules,
        *,
        is_static: bool = True,
        learned: bool = False,
    ) -> None:
        super().__init__(copy.deepcopy(network), tuple(len(tensor) if tensor.dim() else 1 for tensor in example))
        self._scopes = Scopes(self.network)
        composites = composites_of(format_)
        graph = record(self.network, self._scopes, example, composites)
        self.plan: Plan = plan(graph, format_, scheme, rules, is_static=is_static)
        if not self.plan.weights:
            raise ConversionError(
                "nothing in the network would be quantized",
                fix="leave quantization-aware training out, or exempt fewer layers with --keep-float",
            )
        self.activations = nn.ModuleDict()
        for key, activation in self.plan.activations.items():
            learnable = learned and activation.fixed is None and bool(activation.layers)
            quantizer = ActivationQuantizer(activation.grid, learned=learnable)
            if activation.fixed is not None:
                quantizer.set_range(activation.fixed)
            self.activations[key] = quantizer
        self.weights = nn.ModuleDict()
        parameters = dict(self.network.named_parameters())
        for key, weight in self.plan.weights.items():
            parameter = parameters.get(weight.parameter)
            if parameter is None:
                # A weight that is computed can't be written back onto a learned grid.
                self.weights[key] = WeightQuantizer(torch.zeros(1, 1), weight.axis)
            else:
                start = self._folded(key, parameter.detach())
                self.weights[key] = WeightQuantizer(start, weight.axis, learned=learned)
        self._simulator = _Simulator(self, composites, scheme)
        self._entered = False
        self.train(False)

    def run(self, *arguments: Tensor) -> object:
        with self._simulating():
            self._scopes.restart()
            try:
                return self.network(*arguments)
            finally:
                self._scopes.restart()

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The `context_fn` of `torch.utils.checkpoint`, to be given to it with the part of the network that it runs:
        when the backward pass runs that part again, in whatever thread, it is simulated as it was the first time."""
        return nullcontext(), self._again(self._scopes.place())

    @contextmanager
    def _again(self, place: Place) -> Iterator[None]:
        with self._scopes.back_at(place), self._simulating():
            yield

    @contextmanager
    def _simulating(self) -> Iterator[None]:
        """Fake quantization inside the block."""
        if self._entered:
            yield
            return
        self._entered = True
        try:
            with self._simulator:
                yield
        finally:
            self._entered = False

    def calibrate(self, batches: Batches, count: int, estimator: EstimatorSpec, *, keep_learned: bool = True) -> None:
        """Set the ranges from samples that run through the network as it is now, in eval mode and in float.

        Args:
            batches: the arguments of one call per sample.
            count: how many samples there are.
            estimator: how ranges come from what is seen, as in the exporter.
            keep_learned: leave alone the ranges that training moves.

        Raises:
            DataError: an activation is NaN or Inf.
            ConversionError: the network can't run a sample.
        """
        wanted = {
            key
            for key, quantizer in self.activations.items()
            if self.plan.activations[key].fixed is None and not (keep_learned and _is_learned(quantizer))
        }
        observer = _Observer(self.plan, wanted, count, estimator)
        was_training = self.training
        self.eval()
        self._simulator.observer = observer
        try:
            with torch.no_grad():
                for arguments in batches():
                    with explained("the network can't run the calibration samples"):
                        self(*arguments)
                    observer.next_sample()
        finally:
            self._simulator.observer = None
            self.train(was_training)
        found = observer.found()
        for key, bounds in found.items():
            self._activation(key).set_range(bounds)
        self._simulator.left_out |= observer.masks | (wanted - found.keys())
        self._simulator.calibrated = True

    def trained(self, original: nn.Module) -> nn.Module:
        """A copy of the original network with the trained parameters and buffers; learned weights lie on their grid."""
        result = copy.deepcopy(original)
        state = {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}
        names: dict[int, list[str]] = {}
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for key, weight in self.plan.weights.items():
            quantizer = self.weights[key]
            assert isinstance(quantizer, WeightQuantizer)
            if quantizer.scale is None:
                continue
            parameter = self.network.get_parameter(weight.parameter)
            with torch.no_grad():
                rounded = self._round_weight(key, parameter).cpu()
            # A tied weight stands in the state under each of its names, and the last one would win.
            state |= dict.fromkeys(names[id(parameter)], rounded)
        result.load_state_dict(state)
        return result.eval()

    def learned_ranges(self) -> dict[str, tuple[float, float]]:
        """Layer -> the range that its input was trained to be quantized to; empty without learned ranges."""
        found = {}
        for key, quantizer in self.activations.items():
            if _is_learned(quantizer) and key not in self._simulator.left_out:
                bounds = self._activation(key).range()
                for layer in self.plan.activations[key].layers:
                    found[strip_wrapper(layer)] = (bounds.min, bounds.max)
        return found

    def quantization_parameters(self) -> list[nn.Parameter]:
        """What LSQ trains beside the network's own parameters."""
        return [*self.activations.parameters(), *self.weights.parameters()]

    def round_activation(self, key: str, values: Tensor) -> Tensor:
        rounded: Tensor = self.activations[key](values)
        return rounded

    def round_weight(self, key: str, weight: Tensor) -> Tensor:
        """The weight as the file has it, gradients passed straight through."""
        return self._round_weight(key, weight)

    def _activation(self, key: str) -> ActivationQuantizer:
        quantizer = self.activations[key]
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer

    def _round_weight(self, key: str, weight: Tensor) -> Tensor:
        factor = self._fold_factor(key, weight.dim())
        rounded: Tensor = self.weights[key](weight if factor is None else weight * factor)
        return rounded if factor is None else rounded / factor

    def _folded(self, key: str, weight: Tensor) -> Tensor:
        factor = self._fold_factor(key, weight.dim())
        return weight if factor is None else weight * factor

    def _fold_factor(self, key: str, rank: int) -> Tensor | None:
        """gamma / sqrt(variance + eps) of the batch normalization that is folded in, along the output channels.

        One scale for a whole tensor is that of the folded weight; a scale per channel takes the factor in.
        """
        planned = self.plan.weights[key]
        if planned.folded is None:
            return None
        norm = self.network.get_submodule(planned.folded)
        if not isinstance(norm, _BatchNorm) or norm.running_var is None:
            return None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        factor = factor if norm.weight is None else factor * norm.weight.detach()
        factor = torch.where(factor.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(factor), factor)
        shape = [1] * rank
        shape[planned.output_axis] = -1
        # With groups, a transposed convolution has fewer outputs in this dimension than there are channels.
        return factor.view(shape) if planned.output_axis == 0 else None


def _is_learned(quantizer: nn.Module) -> bool:
    return isinstance(quantizer, ActivationQuantizer) and quantizer.learned


class _Observer:
    """Feeds what is seen at the sites to the exporters' range estimators."""

    def __init__(self, plan_: Plan, wanted: set[str], count: int, estimator: EstimatorSpec) -> None:
        self._wanted = wanted
        self._grids = {key: plan_.activations[key].grid for key in wanted}
        self._ranges: dict[Grid, ActivationRanges] = {
            grid: ActivationRanges(estimator, symmetric=grid.symmetric, bits=grid.bits, total=count)
            for grid in set(self._grids.values())
        }
        self._seen: set[tuple[str, int]] = set()
        self._alive: list[Tensor] = []  # ids of tensors that are gone would be given out again
        self.masks: set[str] = set()

    def see(self, key: str, values: Tensor) -> None:
        # One tensor that several operators read counts once; its id is its own while the sample runs.
        if key not in self._wanted or (key, id(values)) in self._seen:
            return
        self._seen.add((key, id(values)))
        self._alive.append(values)
        reach = float(values.detach().abs().amax()) if values.numel() else 0.0
        if reach >= _MASK:
            self.masks.add(key)
            return
        self._ranges[self._grids[key]].update(key, values.detach().float().cpu().numpy())

    def next_sample(self) -> None:
        self._seen.clear()
        self._alive.clear()
        for ranges in self._ranges.values():
            ranges.next_sample()

    def found(self) -> dict[str, Range]:
        return {key: bounds for ranges in self._ranges.values() for key, bounds in ranges.ranges().items()}


class _Simulator(SiteMode):
    def __init__(self, module: QuantizedModule, composites: frozenset[str], scheme: Scheme) -> None:
        super().__init__(module._scopes, composites)
        # A plain attribute on a module would make it a child of itself.
        self._module = module
        self._grid = Grid(8, scheme.activation_symmetric)
        self.calibrated = scheme.activations != "static"
        self.observer: _Observer | None = None
        self.left_out: set[str] = set()

    def at_site(self, site: Site, function: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        planned = self._module.plan.sites.get(site)
        if planned is None or not (self.calibrated or self.observer is not None):
            return function(*args, **kwargs)
        if self.observer is not None:
            tensors = tensors_of(args, kwargs)
            for place, key in planned.reads.items():
                self.observer.see(key, tensors[place])
            result = function(*args, **kwargs)
            if planned.output is not None and isinstance(result, Tensor):
                self.observer.see(planned.output, result)
            return result
        changed: dict[int, Tensor] = {}
        tensors = tensors_of(args, kwargs)
        for place, key in planned.reads.items():
            if key not in self.left_out:
                changed[place] = self._module.round_activation(key, tensors[place])
        for place in planned.own_ranges:
            changed[place] = quantize_to_own_range(tensors[place], self._grid)
        for place, dims in planned.run_time.items():
            changed[place] = quantize_to_own_range(tensors[place], self._grid, leading=dims)
        if planned.weight is not None:
            place, key = planned.weight
            changed[place] = self._module.round_weight(key, tensors[place])
        if changed:
            args, kwargs = _replaced(args, kwargs, changed)
        result = function(*args, **kwargs)
        if planned.output is not None and planned.output not in self.left_out and isinstance(result, Tensor):
            return self._module.round_activation(planned.output, result)
        return result


def _replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], changed: Mapping[int, Tensor]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments with some of their tensors exchanged, counted as `tensors_of` does."""
    count = -1

    def replace(value: Any) -> Any:
        nonlocal count
        if isinstance(value, Tensor):
            count += 1
            return changed.get(count, value)
        if type(value) in (list, tuple):
            return type(value)([replace(item) for item in value])
        return value

    new_args = tuple(replace(value) for value in args)
    return new_args, {name: replace(value) for name, value in kwargs.items()}
