"""What every compression pass does: one model in, a smaller or tougher one out, and the old one untouched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from edgeopt.compression.layers import arguments_of
from edgeopt.errors import ConversionError
from edgeopt.sources.digest import sha256_of
from edgeopt.types import Array, EstimatorSpec, LayerRules, Model, Sample, Scheme

if TYPE_CHECKING:
    import torch

    from edgeopt.progress import Progress

Needs = Literal["nothing", "samples", "training-data"]

#: A pass that claims to leave the function alone may change it by float32 rounding only.
MIN_SAME_FUNCTION_DB = 60.0
#: Samples on which that is checked, beside the example input.
CHECKED_SAMPLES = 4
#: And by as many of its integer outputs' values as rounding may tip over, where it decides between two classes.
MAX_OTHER_INTEGERS = 1e-3


@dataclass(frozen=True, slots=True)
class PassInputs:
    """What a pass is given beside the model.

    Attributes:
        scheme: what the model will be quantized to, for passes that look at the quantization grid.
        samples: a fresh, streaming iterator over unlabelled samples at each call, always the same ones in the same
            order; None where the run has no data. Passes must not keep more than a bounded number of them.
        count: how many there are.
        seed: of every random choice.
        progress: told about long work.
        estimator: how the exporter will find activation ranges.
        rules: layers that will not be quantized, which passes that reduce quantization error leave alone.
    """

    scheme: Scheme
    samples: Callable[[], Iterator[Sample]] | None
    count: int
    seed: int
    progress: Progress
    estimator: EstimatorSpec
    rules: LayerRules


class Pass(Protocol):
    """One transformation. Implementations are frozen dataclasses: their fields are their configuration, while the
    attributes below are the same for all of a class.

    Attributes:
        name: kebab-case, as `--recipe` takes it.
        needs: what it can't do without.
        keeps_function: whether the float function of the model stays the same; `run_pass` proves it.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    keeps_function: ClassVar[bool]

    def not_applicable(self, model: Model, scheme: Scheme) -> str | None:
        """Why it would do nothing for this model at this scheme, in a few words; None when it applies."""
        ...

    def apply(self, model: Model, inputs: PassInputs) -> Model:
        """A new model with one `StepRecord` appended; never edits `model.module`.

        Raises ConversionError when the model's graph can't be followed.
        """
        ...


def run_pass(pass_: Pass, model: Model, inputs: PassInputs) -> Model:
    """Apply a pass and check that it kept the contract.

    Raises:
        ConversionError: the pass does not apply or needs data that there is none of, changed its input, or changed
            a function that it must not change.
    """
    if (reason := pass_.not_applicable(model, inputs.scheme)) is not None:
        raise ConversionError(f"does not apply: {reason}", where=f"pass {pass_.name!r}")
    if pass_.needs != "nothing" and inputs.samples is None:
        raise ConversionError(
            "needs sample data", where=f"pass {pass_.name!r}", fix="give --calibration DATA, or leave the pass out"
        )
    if model.module is None:
        raise ValueError("a pass takes a model with a torch module; see sources.as_torch")
    before = state_digest(model.module)
    result = pass_.apply(model, inputs)
    where = f"pass {pass_.name!r}"
    if result.module is None or result.module is model.module or state_digest(model.module) != before:
        raise ConversionError("changed the model that it was given", where=where)
    if result.history[:-1] != model.history:
        raise ConversionError("did not record exactly one step", where=where)
    result.module.eval()
    if pass_.keeps_function:
        samples = inputs.samples() if inputs.samples is not None else iter(())
        checked = (sample.inputs for sample in islice(samples, CHECKED_SAMPLES))
        check_same_function(model, result, (model.example_inputs, *checked), where)
    return replace(result, native=None)


def state_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the names and values of a module's state."""
    return sha256_of((), module)


def check_same_function(old: Model, new: Model, inputs: Iterable[Mapping[str, Array]], where: str) -> None:
    """Compare both modules, output by output, over all these inputs.

    Raises:
        ConversionError: the shape, type or finite values of an output differ, or one lies below `MIN_SAME_FUNCTION_DB`
            (float) or beyond `MAX_OTHER_INTEGERS`.
    """
    differences: dict[int, _Difference] = defaultdict(_Difference)
    for arrays in inputs:
        wanted, found = forward(old, arrays), forward(new, arrays)
        if [(y.shape, y.dtype) for y in wanted] != [(y.shape, y.dtype) for y in found]:
            raise ConversionError("changed the shape or type of the model's outputs", where=where)
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            differences[index].add(one, other)
    # What is small next to the largest output may be a difference of large values, with their rounding.
    loudest = max((difference.power() for difference in differences.values()), default=0.0)
    for index, difference in differences.items():
        if (problem := difference.problem(loudest)) is not None:
            output = f" (output {index})" if len(differences) > 1 else ""
            raise ConversionError(f"changed the float function of the model{output}: {problem}", where=where)


class _Difference:
    """Between two versions of one output, over all inputs."""

    def __init__(self) -> None:
        self._count = self._other_integers = 0
        self._signal = self._noise = 0.0
        self._same_finite = True

    def add(self, wanted: torch.Tensor, found: torch.Tensor) -> None:
        self._count += wanted.numel()
        if not wanted.is_floating_point():
            self._other_integers += int((wanted != found).sum())
            return
        finite = wanted.isfinite()
        self._same_finite = self._same_finite and bool((finite == found.isfinite()).all())
        self._signal += float((wanted[finite].double() ** 2).sum())
        self._noise += float(((wanted[finite].double() - found[finite].double()) ** 2).sum())

    def power(self) -> float:
        """Mean square."""
        return self._signal / max(self._count, 1)

    def problem(self, loudest: float) -> str | None:
        """What is wrong, in a few words, where the loudest output has this power."""
        if self._other_integers > MAX_OTHER_INTEGERS * self._count:
            return f"{self._other_integers} of {self._count} integers differ"
        if not self._same_finite:
            return "other values are finite"
        if self._noise <= self._count * loudest * float(np.finfo(np.float32).eps) ** 2:
            return None
        sqnr_db = 10 * float(np.log10(max(self._signal, 1e-30) / self._noise))
        return None if sqnr_db >= MIN_SAME_FUNCTION_DB else f"{sqnr_db:.0f} dB"


def forward(model: Model, arrays: Mapping[str, Array]) -> list[torch.Tensor]:
    """The flat outputs of a model's module for one sample's inputs."""
    import torch
    from torch.utils._pytree import tree_leaves

    if model.module is None:
        raise ValueError("the model has no module")
    arguments = arguments_of(model.inputs, arrays)
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model.module(*arguments)) if isinstance(leaf, torch.Tensor)]
