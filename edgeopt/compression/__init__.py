"""Float model -> smaller or tougher float model, one pass per module."""

from __future__ import annotations

from importlib import import_module

from edgeopt.compression.base import Pass

#: In the order in which a recipe runs them, which is the order in which they make sense.
PASSES: dict[str, str] = {
    "fold-batch-norm": "edgeopt.compression.fold_batch_norm:FoldBatchNorm",
    "equalize": "edgeopt.compression.equalize:Equalize",
    "absorb-high-bias": "edgeopt.compression.absorb_high_bias:AbsorbHighBias",
    "smooth": "edgeopt.compression.smooth:Smooth",
    "clip-outliers": "edgeopt.compression.clip_outliers:ClipOutliers",
    "round-adaptively": "edgeopt.compression.round_adaptively:RoundAdaptively",
    "correct-bias": "edgeopt.compression.correct_bias:CorrectBias",
}


def load_pass(name: str) -> Pass:
    """A pass with its default configuration; imports its module now. The name must be a key of `PASSES`."""
    module, _, attribute = PASSES[name].partition(":")
    made: Pass = getattr(import_module(module), attribute)()
    return made
