"""Built-in examples: complete inputs for `edgeopt export --example NAME`, on real data and real weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """What an example fills in where the user said nothing: a model and, if it brings data, both data sets."""

    summary: str
    model: str
    calibration: str | None
    evaluation: str | None


EXAMPLES: dict[str, Example] = {
    "digits": Example(
        summary="a small CNN trained on the spot on scikit-learn's handwritten digits (the default)",
        model="edgeopt.examples.digits:model",
        calibration="edgeopt.examples.digits:training_set",
        evaluation="edgeopt.examples.digits:held_out_set",
    ),
    "efficientnet-lite0": Example(
        summary="EfficientNet-Lite0 with its ImageNet weights; bring pictures with --calibration DIR",
        model="edgeopt.examples.efficientnet_lite0:model",
        calibration=None,
        evaluation=None,
    ),
}
