"""Weights become zero: at once, or while the network is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.sparsity.masks import apply_masks, count_zeros, sparsifiable
from edgeopt.compression.sparsity.pattern import takes_pattern, two_of_four
from edgeopt.compression.sparsity.selection import Scope, magnitude_scores, masks_for_share
from edgeopt.errors import ConversionError, UsageError
from edgeopt.types import Model, Scheme, StepRecord

if TYPE_CHECKING:
    import torch

    from edgeopt.compression.fine_tune import FineTuning
    from edgeopt.compression.sparsity.constraints import KeptZeros
    from edgeopt.compression.sparsity.products import Product

Pattern = Literal["unstructured", "2:4"]
Plain = str | int | float | bool | None

#: Of the pattern "2:4".
HALF = 0.5


@dataclass(frozen=True, slots=True)
class Sparsification:
    """Set the smallest weights to zero, and train nothing (Han et al. 2015, without the retraining).

    Attributes:
        to: share of the weights that become zero, 0..1; the pattern "2:4" has a half.
        pattern: any weight, or two of every four along the input dimension (`two_of_four`).
        scope: compare weights over all layers (`magnitude_scores`), or within each.
        protect: patterns of layers that stay dense.
    """

    name: ClassVar[str] = "sparsify"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = False
    to: float = 0.5
    pattern: Pattern = "unstructured"
    scope: Scope = "global"
    protect: tuple[str, ...] = ()

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del model, scheme
        return None

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """Raises UsageError: no weight may become zero, a pattern of `protect` matches nothing."""
        del inputs
        if model.module is None:
            raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
        weights = weights_for(model, self.pattern, self.protect)
        module = copy.deepcopy(model.module)
        apply_masks(module, magnitude_masks(module, weights, self.to, self.pattern, self.scope))
        config: dict[str, Plain] = {
            "method": "magnitude",
            "pattern": self.pattern,
            "scope": self.scope,
            "to": HALF if self.pattern == "2:4" else self.to,
            "protect": ", ".join(self.protect),
            "training": False,
            **zeros_record(module, [weight.name for weight in weights]),
        }
        step = StepRecord(self.name, config)
        # Ranges of an earlier quantization-aware training belong to the weights of before.
        return replace(model, module=module, native=None, history=(*model.history, step), input_ranges={})


@dataclass(frozen=True, slots=True, eq=False)
class SparseTraining:
    """Train under a constraint that keeps weights at zero, or makes more of them zero on the way.

    Attributes:
        constraint: used once; afterwards it still holds its masks and scores, and no longer the module.
        promised: share of zeros among its weights that it leaves at least.
        fine_tuning: how to train; its own constraint is not used.
        record: what else the history should say.
    """

    name: ClassVar[str] = "sparsify"
    needs: ClassVar[Needs] = "training-data"
    keeps_function: ClassVar[bool] = False
    constraint: KeptZeros
    promised: float
    fine_tuning: FineTuning
    record: Mapping[str, Plain]

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        del model, scheme
        return None

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """Raises any error of `FineTuning`; ConversionError where training left too few zeros."""
        try:
            tuned = replace(self.fine_tuning, constraint=self.constraint).apply(model, inputs)
        finally:
            self.constraint.close()
        assert tuned.module is not None
        names = list(self.constraint.masks)
        found = count_zeros(tuned.module, names).share
        if found < self.promised - 0.5 / sum(mask.numel() for mask in self.constraint.masks.values()):
            raise ConversionError(
                f"training left {found:.2%} zeros of the {self.promised:.2%} that were to be", where="sparsify"
            )
        config: dict[str, Plain] = {
            **self.record,
            "training": True,
            **zeros_record(tuned.module, names),
            **tuned.history[-1].config,
        }
        return replace(tuned, history=(*model.history, StepRecord(self.name, config)))


def weights_for(model: Model, pattern: Pattern, protect: Sequence[str]) -> tuple[Product, ...]:
    """The weights that take part.

    Raises:
        UsageError: there is none, or a pattern of `protect` matches nothing.
    """
    weights = sparsifiable(model, protect)
    if pattern != "2:4" or model.module is None:
        return weights
    module = model.module
    fitting = tuple(w for w in weights if takes_pattern(module.get_parameter(w.name).shape, w.input_axis))
    if not fitting:
        raise UsageError("no layer has four inputs or more to group", where="pattern 2:4", fix="take unstructured")
    return fitting


def magnitude_masks(
    module: torch.nn.Module, weights: Sequence[Product], share: float, pattern: Pattern, scope: Scope
) -> dict[str, torch.Tensor]:
    """The masks that keep a module's largest weights."""
    values = {weight.name: module.get_parameter(weight.name).detach() for weight in weights}
    if pattern == "2:4":
        axes = {weight.name: weight.input_axis for weight in weights if weight.input_axis is not None}
        return {name: two_of_four(values[name].abs(), axis) for name, axis in axes.items()}
    return masks_for_share(magnitude_scores(values, scope), share, scope)


def zeros_record(module: torch.nn.Module, names: Sequence[str]) -> dict[str, Plain]:
    """What a step's record says about the zeros that it left."""
    zeros = count_zeros(module, names)
    return {
        "zeros": round(zeros.share, 6),
        "zeros_of_sparsest_layer": round(zeros.highest, 6),
        "zeros_of_densest_layer": round(zeros.lowest, 6),
        "zeros_of_all_parameters": round(zeros.of_all, 6),
        "sparse_layers": len(names),
    }
