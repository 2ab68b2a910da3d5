"""How much a loss would change without a unit, estimated from its gradients.

Every sample runs by itself: a product of gradients belongs to one sample, and exported graphs take no more at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgeopt.compression.layers import arguments_of
from edgeopt.compression.pruning.block_effects import BlockEffects
from edgeopt.compression.pruning.groups import Prunable
from edgeopt.compression.pruning.places import Places, all_places, reading_places
from edgeopt.compression.pruning.statistics import ScoringData, blocks_of, explained, layered_of, thawed
from edgeopt.errors import ConversionError, UsageError
from edgeopt.types import Array, Model, Sample

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgeopt.progress import Progress

GradientKind = Literal["gradient", "taylor", "hessian"]


def gradient_scores(
    model: Model, prunable: Prunable, kind: GradientKind, data: ScoringData, seed: int, progress: Progress
) -> dict[str, Array]:
    """Group -> (units,), means over the samples of a first- or second-order estimate from gradients g of the loss.

    They are taken at the weights w that take a unit in, where a zero is the unit's removal:
        taylor: |sum g w| (Molchanov et al. 2019), how much the loss changes; also for blocks, |sum g (input - output)|.
        hessian: 0.5 sum (g w)^2, OBD (LeCun et al. 1990) with the diagonal of the empirical Fisher information for
            the Hessian; for blocks 0.5 (sum g (input - output))^2.
        gradient: sum |g|; no blocks.

    Without labels the targets are drawn from the model's own outputs, which makes it the true Fisher information:
    classes by their probabilities; for other outputs a normal distribution around them, as wide as the root of their
    mean square.

    Raises:
        ConversionError: no gradient can be found.
        DataError, UsageError: labels or a loss that don't fit the model.
    """
    import torch

    from edgeopt.training.calls import outputs_of

    task, generator = data.task(), torch.Generator().manual_seed(seed)
    module = thawed(model)
    layered = layered_of(prunable)
    places = {group.name: reading_places(module, group) or all_places(module, group) for group in layered}
    effects = BlockEffects(module, [] if kind == "gradient" else blocks_of(prunable))
    totals = {name: torch.zeros(group.units, dtype=torch.float64) for name, group in effects.named(layered).items()}
    used = 0
    where = f"importance {kind!r}"
    for sample in progress.track(data.stream(seed), "Scoring units by gradients", len(data)):
        with explained(where), effects.watched():
            outputs = outputs_of(module, arguments_of(model.inputs, sample.inputs))
            loss = _own_loss(outputs, data.class_count, generator) if task is None else task(outputs, _labels(sample))
            module.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if not bool(torch.isfinite(loss)) or not _has_gradient(module):
                continue  # a sample whose labels are all to be skipped, say
        used += 1
        cache: dict[tuple[int, int], torch.Tensor] = {}
        for group in layered:
            totals[group.name] += _of_sample(places[group.name], kind, cache)
        for name, change in effects.changes.items():
            totals[name] += abs(change) if kind == "taylor" else 0.5 * change**2
    if not used:
        raise UsageError("the loss has a value and a gradient for none of the samples", where=where)
    return {name: (total / used).numpy() for name, total in totals.items()}


def _has_gradient(module: nn.Module) -> bool:
    return any(own.grad is not None and bool(own.grad.any()) for own in module.parameters())


def _of_sample(
    places: Sequence[Places], kind: GradientKind, cache: dict[tuple[int, int], torch.Tensor]
) -> torch.Tensor:
    """(units,): one sample's share of a score. The cache serves groups that share a parameter."""
    import torch

    total = torch.zeros(places[0].count, dtype=torch.float64)
    for part in places:
        weight, gradient = part.parameter.detach(), part.parameter.grad
        if gradient is None:
            continue
        key = (id(part.parameter), part.axis)
        if key not in cache:
            values = gradient.abs() if kind == "gradient" else gradient.double() * weight
            cache[key] = part.along_axis(values.square() if kind == "hessian" else values)
        total += part.per_unit(cache[key])
    return {"gradient": total, "taylor": total.abs(), "hessian": 0.5 * total}[kind]


def _own_loss(outputs: Sequence[torch.Tensor], class_count: int | None, generator: torch.Generator) -> torch.Tensor:
    """Negative log-likelihood of targets drawn from the outputs' own distribution, up to constants."""
    import torch

    from edgeopt.training.losses import cross_entropy

    losses = []
    for output in outputs:
        if not output.is_floating_point() or not output.requires_grad:
            continue
        values = output.detach().float()
        if class_count is not None and class_count > 1 and output.dim() > 1 and output.shape[-1] == class_count:
            are_shares = bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < 0.02).all())
            shares = (values if are_shares else values.softmax(-1)).reshape(-1, class_count)
            drawn = torch.multinomial(shares, 1, generator=generator)
            losses.append(cross_entropy([output], drawn.reshape(output.shape[:-1])))
        else:
            # The gradient of (output - target)^2 / (2 width^2), target = output + width * noise; every output weighs
            # the same, whatever its size.
            noise = torch.randn(output.shape, generator=generator)
            width = values.square().mean().sqrt().clamp(min=1e-12)
            losses.append((output.float() * noise).sum() / (width * sqrt(output.numel())))
    if not losses:
        raise ConversionError(
            "no output is real and depends on the weights", fix="take --importance l2, which needs no gradients"
        )
    return torch.stack(losses).sum()


def _labels(sample: Sample) -> torch.Tensor:
    import torch

    if sample.label is None:
        raise UsageError("has no label", where=f"sample {sample.name!r}")
    label = np.asarray(sample.label)
    # A label array may carry the batch dimension of 1 that inputs have.
    label = label if label.ndim and label.shape[0] == 1 else label[None]
    return torch.from_numpy(label.astype(np.int64 if label.dtype.kind in "iub" else np.float32))
