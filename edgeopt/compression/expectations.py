"""What layers can be expected to read, from batch norms' parameters alone: no sample is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from edgeopt.compression.layers import arguments_of, by_identity, find_layers, function_name
from edgeopt.types import Model

if TYPE_CHECKING:
    import torch


_NORM = ("input", "running_mean", "running_var", "weight", "bias")
_ATEN_NORM = ("input", "weight", "bias", "running_mean", "running_var")


class Normal(NamedTuple):
    """A normal distribution per channel, cut off at `lowest` and `highest`: values beyond lie on these bounds."""

    mean: torch.Tensor
    deviation: torch.Tensor
    lowest: float = -math.inf
    highest: float = math.inf

    def expectation(self) -> torch.Tensor:
        """Mean of clip(x, a, b) for normal x; Nagel et al. 2019, appendix C."""
        import torch

        deviation = self.deviation.clamp_min(1e-12)

        def below(bound: float) -> torch.Tensor:
            """E[min(x, bound)]."""
            if math.isinf(bound):
                return self.mean
            z = (bound - self.mean) / deviation
            density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            mean: torch.Tensor = bound + (self.mean - bound) * torch.special.ndtr(z) - deviation * density
            return mean

        # clip(x, a, b) = min(x, b) - min(x, a) + a.
        if math.isinf(self.lowest):
            return below(self.highest)
        return below(self.highest) - below(self.lowest) + self.lowest

    def clipped(self, lowest: float, highest: float) -> Normal:
        return self._replace(
            lowest=min(max(self.lowest, lowest), highest), highest=max(min(self.highest, highest), lowest)
        )


def norm_statistics(model: Model) -> dict[str, Normal]:
    """The output distribution of each batch norm that a layer feeds, by the name of that layer's weight."""
    import torch
    from torch.overrides import TorchFunctionMode

    if model.module is None:
        raise ValueError("needs a module")
    layers = by_identity(model.module, find_layers(model, model.module))
    sources: list[tuple[torch.Tensor, str]] = []
    found: dict[str, Normal] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., torch.Tensor],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> torch.Tensor:
            del types
            result = func(*args, **(kwargs or {}))
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if (layer := layers.get(id(weight))) is not None:
                sources.append((result, layer.weight))
            elif "batch_norm" in function_name(func):
                order = _NORM if func is torch.nn.functional.batch_norm else _ATEN_NORM
                operands = {**dict(zip(order, args, strict=False)), **(kwargs or {})}
                gamma, beta = operands.get("weight"), operands.get("bias")
                if isinstance(gamma, torch.Tensor) and isinstance(beta, torch.Tensor):
                    normal = Normal(beta.detach().double(), gamma.detach().double().abs())
                    found.update((name, normal) for source, name in sources if source is operands["input"])
            return result

    with torch.no_grad(), Watch():
        model.module(*arguments_of(model.inputs, model.example_inputs))
    return found


def expected_inputs(model: Model, statistics: Mapping[str, Normal]) -> dict[str, torch.Tensor]:
    """Mean of each layer's input per input channel, by the layer's weight, where it follows from `statistics`.

    Followed from a layer's output through ReLU, ReLU6 and clips, and through what only moves or drops nothing (flatten
    of 1 x 1, dropout). Sums of two distributions and other activations are not followed.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    if model.module is None:
        raise ValueError("needs a module")
    known: list[tuple[torch.Tensor, Normal]] = []
    found: dict[str, torch.Tensor] = {}

    class Follow(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., torch.Tensor],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> torch.Tensor:
            del types
            read = args[0] if args else (kwargs or {}).get("input")
            normal = next((normal for tensor, normal in known if tensor is read), None)
            name = function_name(func)
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            layer = layers.get(id(weight))
            if layer is not None and normal is not None:
                found[layer.weight] = normal.expectation()
            result = func(*args, **(kwargs or {}))
            # An operation in place leaves the tensor, but not what was known of it.
            known[:] = [entry for entry in known if entry[0] is not result]
            if layer is not None:
                if layer.weight in statistics:
                    known.append((result, statistics[layer.weight]))
            elif normal is not None and (bounds := _bounds(name, args, kwargs or {})) is not None:
                known.append((result, normal.clipped(*bounds)))
            return result

    layers = by_identity(model.module, find_layers(model, model.module))
    with torch.no_grad(), Follow():
        model.module(*arguments_of(model.inputs, model.example_inputs))
    return found


def _bounds(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[float, float] | None:
    """What a function clips its input to; None for a function that does something else to it."""
    match name.rstrip("_"):
        case "relu":
            return 0.0, math.inf
        case "relu6":
            return 0.0, 6.0
        case "dropout" | "contiguous" | "clone" | "detach":
            return -math.inf, math.inf
        case "hardtanh" | "clamp" | "clip":
            keys = ("min_val", "max_val") if name.startswith("hardtanh") else ("min", "max")
            given = {**dict(zip(keys, args[1:], strict=False)), **kwargs}
            defaults = (-1.0, 1.0) if name.startswith("hardtanh") else (None, None)
            lowest, highest = (given.get(key, default) for key, default in zip(keys, defaults, strict=True))
            if not isinstance(lowest, float | int | None) or not isinstance(highest, float | int | None):
                return None
            return -math.inf if lowest is None else float(lowest), math.inf if highest is None else float(highest)
    return None
