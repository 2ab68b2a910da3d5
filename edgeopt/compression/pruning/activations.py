"""How strongly the readers of a unit use it, from the activations that they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from edgeopt.compression.cost import no_fused_layers
from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.groups import Prunable
from edgeopt.compression.pruning.places import Places, reading_places
from edgeopt.compression.pruning.statistics import ScoringData, explained, layered_of, thawed
from edgeopt.types import Array, Model

if TYPE_CHECKING:
    import torch

    from edgeopt.progress import Progress


def activation_scores(
    model: Model, prunable: Prunable, data: ScoringData, seed: int, progress: Progress
) -> dict[str, Array | None]:
    """Group (no blocks) -> (units,): mean |activation| of the unit's channels as its readers meet them, times the norm
    of the weights that read them, summed over channels and readers (cf. Wanda, Sun et al. 2023).

    None for a group whose readers never ran.
    """
    import torch

    module = thawed(model)
    layered = layered_of(prunable)
    places = {group.name: reading_places(module, group) for group in layered}
    seen = _Activations(part.parameter for parts in places.values() for part in parts)
    for sample in progress.track(data.stream(seed), "Scoring units by activations", len(data)):
        with explained("importance 'activation'"), torch.no_grad(), no_fused_layers(), seen.watched():
            module(*arguments_of(model.inputs, sample.inputs))
    found: dict[str, Array | None] = {}
    for group in layered:
        total = torch.zeros(group.units, dtype=torch.float64)
        ran = [(part, mean) for part in places[group.name] if (mean := seen.mean(part)) is not None]
        for part, mean in ran:
            norm = part.along_axis(part.parameter.detach().double().square()).sqrt()
            total += part.per_unit(mean * norm)
        found[group.name] = total.numpy() if ran else None
    return found


#: Operators below autograd -> position of the activation, of the weight, and the activation's dimension of channels.
_READS = {
    "aten.convolution": (0, 1, 1),
    "aten.mm": (0, 1, -1),
    "aten.bmm": (0, 1, -1),
    "aten.addmm": (1, 2, -1),
    "aten.baddbmm": (1, 2, -1),
}


class _Activations:
    """Mean absolute values of what weights are multiplied with, by their input channels."""

    def __init__(self, weights: Iterator[torch.Tensor]) -> None:
        self._addresses = {weight.untyped_storage().data_ptr() for weight in weights}
        self._sums: dict[int, dict[int, tuple[torch.Tensor, int]]] = {}

    def mean(self, part: Places) -> torch.Tensor | None:
        """(channels,): None where the weight met no activations of as many channels."""
        found = self._sums.get(part.parameter.untyped_storage().data_ptr(), {}).get(part.parameter.shape[part.axis])
        return None if found is None else found[0] / found[1]

    def watched(self) -> torch.utils._python_dispatch.TorchDispatchMode:
        from torch.utils._python_dispatch import TorchDispatchMode

        def dispatch(
            _: object,
            func: Callable[..., object],
            __: object,
            args: Sequence[object],
            kwargs: Mapping[str, object] | None,
        ) -> object:
            result = func(*args, **(kwargs or {}))
            self._note(str(func).rpartition(".")[0], args, result)
            return result

        # Made at run time: torch's base class has no types to inherit from.
        mode = type("Watch", (TorchDispatchMode,), {"__torch_dispatch__": dispatch})()
        assert isinstance(mode, TorchDispatchMode)
        return mode

    def _note(self, operator: str, args: Sequence[object], result: object) -> None:
        if operator == "aten.mkldnn_rnn_layer":
            assert isinstance(result, tuple | list)
            self._add(args[0], args[1], -1)
            self._add(result[0], args[2], -1)
        elif operator in _READS:
            value, weight, axis = _READS[operator]
            self._add(args[value], args[weight], axis)

    def _add(self, value: object, weight: object, axis: int) -> None:
        import torch

        assert isinstance(value, torch.Tensor)
        assert isinstance(weight, torch.Tensor)
        address = weight.untyped_storage().data_ptr()
        if address not in self._addresses:
            return
        size = value.detach().abs().double().movedim(axis, -1).flatten(0, -2)
        by_width = self._sums.setdefault(address, {})
        before, count = by_width.get(size.shape[1], (torch.zeros(size.shape[1], dtype=torch.float64), 0))
        by_width[size.shape[1]] = (before + size.sum(0), count + len(size))
