"""Low-rank factorization: a layer's weights become the product of two smaller layers' weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.base import Needs, PassInputs
from edgeopt.compression.cost import macs_of, parameters_of
from edgeopt.compression.low_rank.ranks import Cost, Curve, Ranks, by_energy, for_budget
from edgeopt.compression.steps import Goal
from edgeopt.errors import ConversionError, UsageError
from edgeopt.layer_names import strip_wrapper
from edgeopt.types import Model, Scheme, StepRecord

if TYPE_CHECKING:
    from edgeopt.compression.low_rank.decompose import Factors


@dataclass(frozen=True, slots=True)
class LowRank:
    """Split linear layers and convolutions where that saves MACs; see `decompose` for the method.

    Attributes:
        to: what the whole model is to cost; None goes by `energy`.
        energy: share of its output's energy that every layer keeps, 0..1.
        activation_aware: measure outputs on calibration samples; else the weights alone count.
        multiple: ranks end on multiples of this.
        protect: patterns of layers that stay whole.
        cost: of a model, for goals that are measured ("size", "latency").
    """

    name: ClassVar[str] = "factorize"
    needs: ClassVar[Needs] = "nothing"
    keeps_function: ClassVar[bool] = False

    to: Goal | None = None
    energy: float = 0.95
    activation_aware: bool = True
    multiple: int = 1
    protect: tuple[str, ...] = ()
    cost: Callable[[Model], float] | None = None

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        from edgeopt.compression.low_rank.sites import factorizable

        del scheme
        found = factorizable(model, self.protect)
        if found.sites:
            return None
        first = f" ({found.kept[0].layer!r}: {found.kept[0].reason})" if found.kept else ""
        return f"no layer can be split{first}"

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """Raises UsageError when the goal can't be reached, ConversionError when there are no samples to go by."""
        from edgeopt.compression.low_rank.sites import factorizable
        from edgeopt.compression.low_rank.statistics import split_all

        if self.activation_aware and inputs.samples is None:
            raise ConversionError(
                "needs sample data to see what layers put out",
                where=f"pass {self.name!r}",
                fix="give --calibration DATA, or set activation_aware = false",
            )
        sites = factorizable(model, self.protect).sites
        factors = split_all(model, sites, inputs if self.activation_aware else None)
        ranks = self._ranks(model, factors)
        config: dict[str, str | int | float | bool | None] = {
            "goal": None if self.to is None else _goal_text(self.to),
            "energy": self.energy if self.to is None else None,
            "activation_aware": self.activation_aware,
            "layers": len(ranks),
            **{f"rank of {path}": rank for path, rank in ranks.items()},
        }
        result = factorize(model, ranks, factors)
        return replace(result, history=(*model.history, StepRecord(self.name, config)))

    def _ranks(self, model: Model, factors: Mapping[str, Factors]) -> Ranks:
        if self.to is None:
            return by_energy(_curves(factors, "macs"), self.energy, self.multiple)
        whole, cost = self._cost(model, factors)
        budget = self.to.value * whole if self.to.is_share else self.to.value
        curves = _curves(factors, "parameters" if self.to.what in ("parameters", "size") else "macs")
        return for_budget(curves, cost, budget, self.multiple)

    def _cost(self, model: Model, factors: Mapping[str, Factors]) -> tuple[float, Cost]:
        """What the model costs, and what it will at some ranks."""
        assert self.to is not None
        if self.to.what in ("macs", "parameters"):
            whole = macs_of(model) if self.to.what == "macs" else parameters_of(model)
            curves = {curve.path: curve for curve in _curves(factors, self.to.what)}
            return (
                whole,
                lambda ranks: (
                    whole - sum(curves[path].whole - rank * curves[path].per_rank for path, rank in ranks.items())
                ),
            )
        if self.to.what == "ratio":
            raise UsageError(
                "a ratio is a share of channels, which factorization doesn't remove",
                where="the goal of 'factorize'",
                fix="give macs, parameters, size or latency",
            )
        if self.cost is None:
            raise ValueError(f"a goal in {self.to.what} needs a cost function")
        measure = self.cost
        return measure(model), lambda ranks: measure(factorize(model, ranks, factors))


def factorize(model: Model, ranks: Ranks, factors: Mapping[str, Factors]) -> Model:
    """A copy of the model with pairs of layers of these ranks in place of the layers; the history stays.

    Args:
        ranks: by layers' paths in the user's own module.
        factors: at least of these layers, from `split_all`.
    """
    from edgeopt.compression.low_rank.sites import places_of

    module = copy.deepcopy(model.module)
    if module is None:
        raise ValueError("factorization takes a model with a torch module; see sources.as_torch")
    layers = {strip_wrapper(path): part for path, part in module.named_modules()}
    for path, rank in ranks.items():
        pair = factors[path].pair(layers[path], rank)
        for parent, name in places_of(module, layers[path]):
            parent._modules[name] = pair
    ranges = {path: range_ for path, range_ in model.input_ranges.items() if strip_wrapper(path) not in ranks}
    return replace(model, module=module.eval(), native=None, input_ranges=ranges)


def _curves(factors: Mapping[str, Factors], what: str) -> list[Curve]:
    return [
        Curve(
            path,
            one.energies.numpy(),
            limit=min((one.macs - 1) // one.macs_per_rank, len(one.energies) - 1),
            whole=one.macs if what == "macs" else one.parameters,
            per_rank=one.macs_per_rank if what == "macs" else one.parameters_per_rank,
        )
        for path, one in factors.items()
    ]


def _goal_text(goal: Goal) -> str:
    return f"{goal.what} {goal.value:g}{'x' if goal.is_share else ''}"
