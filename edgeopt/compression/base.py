"""What every compression pass does: one model in, a smaller or tougher one out, and the old one untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from edgeopt.errors import ConversionError
from edgeopt.types import Array, EstimatorSpec, LayerRules, Model, Sample, Scheme

if TYPE_CHECKING:
    import torch

    from edgeopt.progress import Progress

Needs = Literal["nothing", "samples", "training-data"]

#: A pass that claims to leave the function alone may change it by float32 rounding only.
MIN_SAME_FUNCTION_DB = 60.0
#: Samples on which that is checked, beside the example input.
CHECKED_SAMPLES = 4


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
    before = _fingerprint(model.module)
    result = pass_.apply(model, inputs)
    where = f"pass {pass_.name!r}"
    if result.module is None or result.module is model.module or _fingerprint(model.module) != before:
        raise ConversionError("changed the model that it was given", where=where)
    if result.history[:-1] != model.history:
        raise ConversionError("did not record exactly one step", where=where)
    result.module.eval()
    if pass_.keeps_function:
        _check_same_function(model, result, inputs, where)
    return replace(result, native=None)


def _fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_same_function(old: Model, new: Model, inputs: PassInputs, where: str) -> None:
    """Compare both modules; raises ConversionError below `MIN_SAME_FUNCTION_DB`."""
    signal = noise = 0.0
    samples = inputs.samples() if inputs.samples is not None else iter(())
    for arrays in (old.example_inputs, *(sample.inputs for sample in islice(samples, CHECKED_SAMPLES))):
        expected = forward(old, arrays)
        for wanted, found in zip(expected, forward(new, arrays), strict=True):
            if wanted.is_floating_point():
                finite = wanted.isfinite()
                signal += float((wanted[finite].double() ** 2).sum())
                noise += float(((wanted[finite] - found[finite]).double() ** 2).sum())
    sqnr_db = float("inf") if noise == 0 else 10 * float(np.log10(max(signal, 1e-30) / noise))
    if not sqnr_db >= MIN_SAME_FUNCTION_DB:
        raise ConversionError(f"changed the float function of the model ({sqnr_db:.0f} dB)", where=where)


def forward(model: Model, arrays: Mapping[str, Array]) -> list[torch.Tensor]:
    """The flat outputs of a model's module for one sample's inputs."""
    import torch
    from torch.utils._pytree import tree_leaves

    if model.module is None:
        raise ValueError("the model has no module")
    arguments = [torch.tensor(np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)) for spec in model.inputs]
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model.module(*arguments)) if isinstance(leaf, torch.Tensor)]
