"""Task metrics: what a labelled data set says about a model. Built in: top-k; others are the user's own code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from edgeopt.errors import DataError, UsageError
from edgeopt.types import Array, Sample

_TOP_K = re.compile(r"top(\d+)(?:@(.+))?")
_KNOWN = ("top1", "top5")


class Metric(Protocol):
    """Accumulates over samples; one object for one model's outputs."""

    name: str
    higher_is_better: bool

    def update(self, outputs: Mapping[str, Array], sample: Sample) -> None:
        """Take note of one sample's outputs. Raises DataError when they and the label don't fit the metric."""
        ...

    def value(self) -> float:
        """The metric over all samples so far; at least one."""
        ...


class TopK:
    """Share of labels that are among the k highest scores; the class axis is the last.

    The label is a class index, or an array with one per position (negative ones are skipped, as in PyTorch's
    `ignore_index`). Of equal scores the lower index ranks first, as with argmax.

    Args:
        k: 1 for accuracy.
        output: which output holds the scores; None takes the first with a batch and a class axis of two or more.
    """

    higher_is_better = True

    def __init__(self, k: int, output: str | None = None) -> None:
        self.name = f"top{k}" if output is None else f"top{k}@{output}"
        self._k = k
        self._output = output
        self._hits = 0
        self._labels = 0

    def update(self, outputs: Mapping[str, Array], sample: Sample) -> None:
        where = f"sample {sample.name!r}"
        if sample.label is None:
            raise DataError(f"has no label, which the metric {self.name} needs", where=where)
        scores = self._scores(outputs)
        classes = scores.shape[-1]
        rows = scores.reshape(-1, classes)
        labels = np.asarray(sample.label).reshape(-1)
        if labels.dtype.kind not in "iu":
            raise DataError(f"its label is {labels.dtype}, not a class index", where=where)
        if labels.size != rows.shape[0]:
            raise DataError(f"has {labels.size} labels for {rows.shape[0]} rows of scores", where=where)
        if labels.max(initial=-1) >= classes:
            raise DataError(f"has label {labels.max()}, but the model tells {classes} classes apart", where=where)
        for row, label in zip(rows, labels, strict=True):
            if label >= 0:
                self._labels += 1
                self._hits += not np.isnan(row).any() and _rank(row, int(label)) < self._k

    def value(self) -> float:
        if self._labels == 0:
            raise DataError("holds no labels", where="evaluation data", fix=f"{self.name} needs at least one")
        return self._hits / self._labels

    def _scores(self, outputs: Mapping[str, Array]) -> Array:
        if self._output is not None:
            if self._output not in outputs:
                raise UsageError(f"no output {self._output!r}", where=self.name, fix=f"it has {', '.join(outputs)}")
            return outputs[self._output]
        for values in outputs.values():
            if values.ndim >= 2 and values.shape[-1] >= 2:
                return values
        raise UsageError(
            "no output has a class axis", where=f"metric {self.name}", fix="name your own: --metric file.py:function"
        )


def load_metric(spec: str) -> Callable[[], Metric]:
    """What makes a fresh metric object of a name.

    Args:
        spec: "top1", "top5" (any k), "top1@OUTPUT", or the user's `file.py:name` or `package.module:name`; see
            `edgeopt.validation.user_metric`.

    Raises:
        UsageError: when there is no such metric.
    """
    if match := _TOP_K.fullmatch(spec):
        k, output = int(match[1]), match[2]
        if k == 0:
            raise UsageError("k starts at 1", where=f"metric {spec!r}")
        return lambda: TopK(k, output)
    if ":" in spec:
        from edgeopt.validation.user_metric import load_user_metric

        return load_user_metric(spec)
    near = max(_KNOWN, key=lambda known: difflib.SequenceMatcher(None, known, spec.partition("@")[0]).ratio())
    raise UsageError(
        f"unknown metric {spec!r}", fix=f"did you mean {near}? Your own is --metric file.py:function", where="metric"
    )


def _rank(row: Array, label: int) -> int:
    """How many classes come before this one."""
    return int(np.count_nonzero(row > row[label]) + np.count_nonzero(row[:label] == row[label]))
