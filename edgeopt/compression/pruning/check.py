"""Proof by running: a network without some units computes what it computes when nothing listens to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.cuts import out_width, reading_cuts
from edgeopt.compression.pruning.groups import PruningGroup
from edgeopt.compression.pruning.removal import remove_in_place, sharing_copy, silence_in_place
from edgeopt.errors import ConversionError
from edgeopt.types import Array, Dim, Model

if TYPE_CHECKING:
    import torch
    from torch import nn

#: A pruned network and the same with silenced units differ by float32 rounding only.
MIN_SAME_DB = 60.0
#: Share of a group's units that the proof removes: several, so that a wrong mapping of channels can't go unseen.
_TRIED_SHARE = 0.34
#: Sets of units that are tried.
_TRIALS = 2

Pairs = Sequence[tuple[PruningGroup, tuple[int, ...]]]


class Proof:
    """Tries removals on a copy of a network.

    The copy has random weights, so that a branch that training left at zero can't hide a mistake, and its layer, group
    and RMS normalizations only scale and shift while the two are compared: normalizing mixes channels, so that their
    removal changes what it computes, rightly so.

    Raises ConversionError when the model does not run on its example inputs.
    """

    def __init__(self, model: Model) -> None:
        if model.module is None:
            raise ValueError("pruning takes a model with a torch module; see sources.as_torch")
        self._base = copy.deepcopy(model.module).eval()
        _randomize(self._base)
        self._arguments = arguments_of(model.inputs, model.example_inputs)
        self._others = _other_sizes(model)
        try:
            noisy = _with_noise(self._arguments)
            if all(bool(output.isfinite().all()) for output in _run(self._base, noisy)):
                self._arguments = noisy
            self._shapes = [_shapes(_run(self._base, arguments)) for arguments in self._runs()]
        except Exception as error:
            # Any exception of the user's forward.
            raise ConversionError(f"does not run on its example inputs: {_short(error)}", where=model.name) from error

    def objection(self, groups: Sequence[PruningGroup], trial: int = 0) -> str | None:
        """Why these groups can't all lose units; None when they can. Another trial tries other units."""
        return self.objection_to([(group, _some_units(group, trial)) for group in groups])

    def objection_to(self, pairs: Pairs) -> str | None:
        """Why these units can't go, in a few words; None when they can."""
        pruned = sharing_copy(self._base)
        try:
            remove_in_place(pruned, pairs)
        except ConversionError as error:
            return error.line()
        for arguments, shapes in zip(self._runs(), self._shapes, strict=True):
            try:
                found = _shapes(_run(pruned, arguments))
            except Exception as error:
                # Any exception of the user's forward, which may rely on the old width.
                return f"the network does not run with fewer: {_short(error)}"
            if found != shapes:
                return "an output of the model would change its shape"
        if any(group.kind == "blocks" for group, _ in pairs):
            return None
        silenced = sharing_copy(self._base)
        silence_in_place(silenced, pairs)
        with norms_without_statistics(silenced, pruned):
            wanted, got = _run(silenced, self._arguments), _run(pruned, self._arguments)
        worst = min((_sqnr_db(one, other) for one, other in zip(wanted, got, strict=True)), default=np.inf)
        if worst < MIN_SAME_DB:
            return "more than the layers that read its channels depends on them"
        return None

    def proven(self, groups: Sequence[PruningGroup]) -> tuple[list[PruningGroup], dict[str, str]]:
        """Those groups that can lose units, alone and together, and why the others can't, by their names.

        All are tried at once, and halves only where that fails.
        """
        reasons = dict.fromkeys(
            (group.name for group in self._idle(groups)), "no output depends on what reads its channels"
        )
        passed = [group for group in groups if group.name not in reasons]
        for trial in range(_TRIALS):
            passed = self._bisect(passed, reasons, trial)
        if len(passed) < len(groups) and passed and self.objection(passed) is not None:
            together: list[PruningGroup] = []
            for group in passed:
                if (reason := self.objection([*together, group])) is None:
                    together.append(group)
                else:
                    reasons[group.name] = reason
            passed = together
        return passed, reasons

    def _idle(self, groups: Sequence[PruningGroup]) -> list[PruningGroup]:
        """Those that the proof would say nothing about: no output changes with the weights that read their units."""
        import torch

        if not any(group.slices for group in groups):
            return []
        module = copy.deepcopy(self._base)
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            outputs = [leaf for leaf in tensors_in(module(*self._arguments)) if leaf.requires_grad]
            if outputs:
                torch.autograd.backward([(output.double() ** 2).sum() for output in outputs])
        parts = dict(module.named_modules())
        return [group for group in groups if group.slices and not _is_felt(parts, group)]

    def _bisect(self, groups: list[PruningGroup], reasons: dict[str, str], trial: int) -> list[PruningGroup]:
        if not groups or (reason := self.objection(groups, trial)) is None:
            return groups
        if len(groups) == 1:
            reasons[groups[0].name] = reason
            return []
        middle = len(groups) // 2
        return self._bisect(groups[:middle], reasons, trial) + self._bisect(groups[middle:], reasons, trial)

    def _runs(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        return (self._arguments,) if self._others is None else (self._arguments, self._others)


def _some_units(group: PruningGroup, trial: int) -> tuple[int, ...]:
    """Some of the group's units, always the same ones."""
    if group.kind == "blocks":
        return (0,)
    count = min(max(1, round(group.units * _TRIED_SHARE)), group.units - 1)
    order = np.random.default_rng([group.units, trial]).permutation(group.units)
    return tuple(sorted(int(unit) for unit in order[:count]))


@contextmanager
def norms_without_statistics(*modules: nn.Module) -> Iterator[None]:
    """A context in which layer, group and RMS normalization only scale and shift, and so do modules of a class of
    their own that look like one: named so, with one vector of weights. What has to be undone is on `modules`."""
    from torch.overrides import TorchFunctionMode

    class OnlyAffine(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., torch.Tensor],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> torch.Tensor:
            del types
            name = getattr(func, "__name__", "")
            if name in ("layer_norm", "group_norm", "rms_norm"):
                return _only_affine(name, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    own = [part for module in modules for part in module.modules() if _is_own_norm(part)]
    for part in own:
        part.__dict__["forward"] = partial(_scale_last, part)
    try:
        with OnlyAffine():
            yield
    finally:
        for part in own:
            del part.__dict__["forward"]


def _is_own_norm(part: nn.Module) -> bool:
    tensors = [*part.parameters(), *part.buffers()]
    is_ours = "norm" in type(part).__name__.lower() and not type(part).__module__.startswith("torch.nn.modules.")
    vector = part._parameters.get("weight")
    return is_ours and len(tensors) == 1 and vector is not None and vector.ndim == 1 and out_width(part) is None


def _scale_last(part: nn.Module, value: torch.Tensor) -> torch.Tensor:
    return value * part.get_parameter("weight")


def _only_affine(name: str, args: Sequence[object], kwargs: dict[str, object]) -> torch.Tensor:
    import torch

    operands = {**dict(zip(("input", "shape", "weight", "bias"), args, strict=False)), **kwargs}
    value = operands["input"]
    assert isinstance(value, torch.Tensor)
    for key in ("weight", "bias"):
        factor = operands.get(key)
        if isinstance(factor, torch.Tensor):
            if name == "group_norm":
                factor = factor.reshape(1, -1, *(1,) * (value.ndim - 2))
            value = value * factor if key == "weight" else value + factor
    return value


def _randomize(module: nn.Module) -> None:
    """Weights of such a size that signals neither vanish nor explode, away from zero where they scale."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            last = name.rpartition(".")[2]
            if not tensor.is_floating_point() or tensor.device.type != "cpu":
                continue
            if tensor.ndim > 1 and isinstance(tensor, torch.nn.Parameter):
                fan_in = tensor[0].numel() if tensor.ndim != 3 or tensor.shape[0] > 1 else tensor.shape[-1]
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2.0 / max(fan_in, 1)) ** 0.5)
            elif last == "running_var" or (isinstance(tensor, torch.nn.Parameter) and "bias" not in last):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif last == "running_mean" or isinstance(tensor, torch.nn.Parameter):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)


def _is_felt(parts: Mapping[str, nn.Module], group: PruningGroup) -> bool:
    """Whether any weight that reads the group's units has a gradient."""
    for part in group.slices:
        if not part.parameter:
            for cut in reading_cuts(parts[part.layer], part.side, np.unique(part.indices)):
                weight = parts[part.layer]._parameters.get(cut.tensor)
                if weight is None:
                    return True  # computed from others: removal will refuse it with a better reason
                gradient = weight.grad
                if gradient is not None and bool(np.take(gradient.numpy(), cut.places, axis=cut.axis).any()):
                    return True
    return False


def _other_sizes(model: Model) -> tuple[torch.Tensor, ...] | None:
    """Inputs of another size where a dimension is free; the example's values, repeated or cut off."""
    if not any(spec.is_dynamic for spec in model.inputs):
        return None
    sizes: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for spec in model.inputs:
        array = np.asarray(model.example_inputs[spec.name])
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, Dim):
                now = array.shape[axis]
                size = sizes.setdefault(dim.name, now + 1 if now + 1 <= dim.max else max(dim.min, now - 1))
                array = np.take(array, np.arange(size) % now, axis=axis)
        arrays[spec.name] = array
    return arguments_of(model.inputs, arrays)


def _with_noise(arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Floats with noise on them: an example of zeros would hide most mistakes."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return tuple(
        value + torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for value in arguments
    )


def _run(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    import torch

    with torch.no_grad():
        return tensors_in(module(*arguments))


def tensors_in(result: object) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _shapes(tensors: Iterable[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _sqnr_db(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Of `found` against `wanted` where those are finite; integers count as values too."""
    finite = wanted.isfinite()
    if not bool((finite == found.isfinite()).all()) or not bool(finite.any()):
        return -np.inf
    signal, noise = wanted[finite].double(), (wanted[finite].double() - found[finite].double())
    if not bool(noise.any()):
        return np.inf
    return float(10 * np.log10(max(float((signal**2).mean()), 1e-300) / float((noise**2).mean())))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
