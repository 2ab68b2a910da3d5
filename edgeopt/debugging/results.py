"""What layer-by-layer comparison finds out, and where it says that the trouble begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeopt.validation.fidelity import SQNR_CAP_DB

if TYPE_CHECKING:
    from edgeopt.validation.fidelity import OutputFidelity

#: A layer that loses much at once is only worth a word if what is left is within this distance of the threshold:
#: going from 60 to 45 dB is what storing a tensor in 8 bits costs.
MARGIN_DB = 10.0


@dataclass(frozen=True, slots=True)
class LayerError:
    """One layer's result in B beside A's, over all samples and elements.

    Attributes:
        layer: source layer path; "" where the files don't tell.
        occurrence: 0 for the first result of that layer, 1 for the second and so on.
        type_a, type_b: the operators that compute it.
        sqnr_db: 10 log10(sum a^2 / sum (b - a)^2), within +-SQNR_CAP_DB.
        max_abs_error, mean_error: of b - a; the mean is the bias.
        range_a, range_b: (min, max).
        input_sqnr_db: of the worst of the results that the layer computes from; None where those are the inputs
            of the model, which are the same in both.
        drop_db: how far the SQNR falls from input to output; None with `input_sqnr_db`.
        inputs: indices of those results in `Debugging.layers`.
        introduced: share of the error's power, 0..1, that is the layer's own: 1 - 10^(-drop_db / 10), taking it that a
            layer passes on the relative error of its input unchanged.
    """

    layer: str
    occurrence: int
    type_a: str
    type_b: str
    sqnr_db: float
    max_abs_error: float
    mean_error: float
    range_a: tuple[float, float]
    range_b: tuple[float, float]
    input_sqnr_db: float | None
    drop_db: float | None
    inputs: tuple[int, ...]
    introduced: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first layer that strays: its index in `Debugging.layers`, and why."""

    index: int
    reason: Literal["low", "drop"]


@dataclass(frozen=True, slots=True)
class Debugging:
    """Two files, layer by layer.

    Attributes:
        a, b: what was compared; A is the reference.
        runtime_a, runtime_b: in which they ran.
        layers: in A's order of execution.
        first_divergence: None when no layer strays.
        threshold_db, max_drop_db: what counts as straying, see `first_divergence`.
        outputs: the model's outputs.
        matched_by: "layer", or "order" where the files share no layer names.
        unmatched_a, unmatched_b: layers of one file that have no counterpart in the other.
        instrumented_db_a, instrumented_db_b: SQNR between the outputs of the file as it is and with its inner tensors
            given out; SQNR_CAP_DB when they are the same, bit by bit.
        samples: how many.
    """

    a: str
    b: str
    runtime_a: str
    runtime_b: str
    layers: tuple[LayerError, ...]
    first_divergence: Divergence | None
    threshold_db: float
    max_drop_db: float
    outputs: tuple[OutputFidelity, ...]
    matched_by: Literal["layer", "order"]
    unmatched_a: tuple[str, ...]
    unmatched_b: tuple[str, ...]
    instrumented_db_a: float
    instrumented_db_b: float
    samples: int


def first_divergence(layers: Sequence[LayerError], threshold_db: float, max_drop_db: float) -> Divergence | None:
    """The first layer whose SQNR is below the threshold, or that loses more than `max_drop_db` at once.

    A low SQNR does not count where everything that is computed from the result is above the threshold again: the files
    only write a step differently (LiteRT's convolution takes the +3 of a hard sigmoid into its bias), or the error
    does not matter. A drop counts only where it ends within MARGIN_DB above the threshold.
    """
    for index, layer in enumerate(layers):
        if layer.sqnr_db < threshold_db:
            readers = [reader.sqnr_db for reader in layers if index in reader.inputs]
            if not readers or min(readers) < threshold_db:
                return Divergence(index, "low")
        elif layer.drop_db is not None and layer.drop_db > max_drop_db and layer.sqnr_db < threshold_db + MARGIN_DB:
            return Divergence(index, "drop")
    return None


def against_inputs(sqnr_db: float, inputs_db: Sequence[float]) -> tuple[float | None, float | None, float]:
    """`input_sqnr_db`, `drop_db` and `introduced` of a layer whose inputs have these SQNRs."""
    if not inputs_db:
        return None, None, 0.0 if sqnr_db >= SQNR_CAP_DB else 1.0
    worst: float = min(inputs_db)
    drop = worst - sqnr_db
    return worst, drop, max(0.0, 1.0 - 10.0 ** (-drop / 10.0))
