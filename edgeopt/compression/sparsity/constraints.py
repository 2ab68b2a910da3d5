"""What keeps weights at zero while a network is trained, or makes more of them zero.

Each is a `Constraint` of `edgeopt.training.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from edgeopt.compression.sparsity.masks import Masks, apply_masks, nonzero_masks
from edgeopt.compression.sparsity.products import products_of
from edgeopt.compression.sparsity.selection import Scope, magnitude_scores, masks_for_share
from edgeopt.types import Model

#: How often the masks grow in a training run, at most: every time all weights are sorted.
_UPDATES = 20


class KeptZeros:
    """Weights that are zero stay so: they are set back after every step.

    Args:
        masks: parameter -> what stays.
        l1: strength of the penalty on the weights that stay: l1 * sum |w| is added to the loss.
    """

    def __init__(self, masks: Masks, l1: float = 0.0) -> None:
        self.masks = dict(masks)
        self._l1 = l1
        self._module = nn.Module()

    def start(self, module: nn.Module) -> None:
        """Take that module; its weights have the masks applied at once."""
        self._module = module
        for name, mask in self.masks.items():
            self.masks[name] = mask.to(module.get_parameter(name).device)
        apply_masks(module, self.masks)

    def penalty(self) -> Tensor | None:
        if not self._l1:
            return None
        return self._l1 * torch.stack([self._module.get_parameter(name).abs().sum() for name in self.masks]).sum()

    def after_step(self, step: int, steps: int) -> None:
        """`step` of `steps` is done."""
        del step, steps
        apply_masks(self._module, self.masks)

    def state(self) -> dict[str, Tensor]:
        return {f"mask/{name}": mask for name, mask in self.masks.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name: state[f"mask/{name}"].to(self._module.get_parameter(name).device) for name in self.masks}
        apply_masks(self._module, self.masks)

    def close(self) -> None:
        """Let go of the module."""
        self._module = nn.Module()


def kept_zeros(model: Model) -> KeptZeros | None:
    """What keeps the zeros of a model that was sparsified while it is trained for something else (quantization,
    recovery from pruning); None where its history has no such step."""
    if model.module is None or not any(step.step == "sparsify" for step in model.history):
        return None
    module = model.module
    names = [weight.name for weight in products_of(model) if not module.get_parameter(weight.name).detach().all()]
    return KeptZeros(nonzero_masks(module, names))


class GrowingZeros(KeptZeros):
    """More and more of the smallest weights become zero (Zhu and Gupta 2017), in the first half of the steps; the
    second half trains what is left. What is zero stays zero.

    Args:
        masks: to begin with.
        share_at: how much of the growth is done, 0..1 -> share of the weights that are zero then.
        scope: compare weights over all layers, or within each.
        l1: see `KeptZeros`.
    """

    def __init__(self, masks: Masks, share_at: Callable[[float], float], scope: Scope, l1: float = 0.0) -> None:
        super().__init__(masks, l1)
        self._share_at = share_at
        self._scope = scope
        self._is_settled = False

    def is_settled(self) -> bool:
        """Whether the masks have stopped to grow."""
        return self._is_settled

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        last = (steps + 1) // 2
        self._is_settled = step >= last
        if step == last or (step < last and step % max(1, last // _UPDATES) == 0):
            self._grow(self._share_at(step / last))
            apply_masks(self._module, self.masks)

    def _grow(self, share: float) -> None:
        weights = {name: self._module.get_parameter(name) for name in self.masks}
        # Zeros score lowest, but there may be more of them already than the share says.
        found = masks_for_share(magnitude_scores(weights, self._scope), share, self._scope)
        self.masks = {name: mask & self.masks[name] for name, mask in found.items()}


class Movement(GrowingZeros):
    """Weights that training moves towards zero become zero, and come back where it pulls them away from it.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020): the score of a weight is the sum of
    -w dL/dw over all steps so far, where the gradient is that of the masked network, also for weights that are masked
    (straight-through). The module's parameters hold the masked weights, so that it is a plain module at any time; the
    full ones are kept here, where those that are masked keep the value that they were masked with.

    Args:
        masks, share_at, scope, l1: see `GrowingZeros`.
        earlier: `state` of the round before; None starts all scores at zero.
    """

    def __init__(
        self,
        masks: Masks,
        share_at: Callable[[float], float],
        scope: Scope,
        l1: float = 0.0,
        earlier: Mapping[str, Tensor] | None = None,
    ) -> None:
        if earlier is not None:
            masks = {name: earlier[f"mask/{name}"] for name in masks}
        super().__init__(masks, share_at, scope, l1)
        self._earlier = earlier
        self._full: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._gained: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def start(self, module: nn.Module) -> None:
        super().start(module)
        for name in self.masks:
            weight = module.get_parameter(name)
            self._full[name] = weight.detach().clone()
            self._scores[name] = torch.zeros_like(weight, requires_grad=False)
            self._gained[name] = torch.zeros_like(weight, requires_grad=False)
            register: Callable[[Callable[[Tensor], None]], RemovableHandle] = weight.register_hook
            self._hooks.append(register(self._listen(name)))
        if self._earlier is not None:
            # The module may have gone back to an earlier epoch's weights since.
            self.restore({**self._earlier, **{
                f"full/{name}": torch.where(mask, self._full[name], self._earlier[f"full/{name}"].to(mask.device))
                for name, mask in self.masks.items()
            }})  # fmt: skip

    def after_step(self, step: int, steps: int) -> None:
        with torch.no_grad():
            for name, mask in self.masks.items():
                self._full[name] = torch.where(mask, self._module.get_parameter(name), self._full[name])
                self._scores[name] += _over_processes(self._gained[name])
                self._gained[name].zero_()
        super().after_step(step, steps)

    def state(self) -> dict[str, Tensor]:
        full = {f"full/{name}": weight for name, weight in self._full.items()}
        return {**super().state(), **full, **{f"score/{name}": score for name, score in self._scores.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name in self.masks:
            device = self._module.get_parameter(name).device
            self._full[name] = state[f"full/{name}"].detach().clone().to(device)
            self._scores[name] = state[f"score/{name}"].detach().clone().to(device)
        self._show()
        super().restore(state)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().close()

    def _grow(self, share: float) -> None:
        self.masks = masks_for_share(self._scores, share, self._scope)
        self._show()

    def _show(self) -> None:
        """Put the full weights into the module, to be masked again."""
        with torch.no_grad():
            for name, weight in self._full.items():
                self._module.get_parameter(name).copy_(weight)

    def _listen(self, name: str) -> Callable[[Tensor], None]:
        def listen(gradient: Tensor) -> None:
            # Mixed precision throws steps away whose gradients overflowed.
            if bool(gradient.isfinite().all()):
                self._gained[name] -= gradient.detach() * self._full[name]

        return listen


def _over_processes(values: Tensor) -> Tensor:
    """The sum over all processes of a distributed run, each of which has seen its own batches."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
