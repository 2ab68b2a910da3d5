"""Two model files or bundles side by side, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.bundle import open_bundle
from edgeopt.errors import MissingError, UsageError
from edgeopt.formats import SUFFIXES, summarize
from edgeopt.formats.files import size_of
from edgeopt.progress import Progress, Silent
from edgeopt.revalidation import golden_samples, model_terms
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.types import (
    Array,
    Dim,
    Measurement,
    Preprocessing,
    Sample,
    Signature,
    SignatureTensor,
    TensorSpec,
)
from edgeopt.validation.benchmark import TimedFile, benchmark_pair
from edgeopt.validation.evaluate import evaluate

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset
    from edgeopt.validation.fidelity import OutputFidelity

#: Size of a dynamic dimension in made-up inputs, and how many such inputs are compared.
DYNAMIC_SIZE = 8
MADE_UP_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two files beside each other.

    Attributes:
        measurements: of the subjects "a" and "b"; sizes only where an emulator runs one of the files.
        outputs: how far b is from a, over `samples` samples.
        emulated: which of "A" and "B" an emulator ran.
    """

    a: str
    b: str
    measurements: tuple[Measurement, ...]
    outputs: tuple[OutputFidelity, ...]
    samples: int
    emulated: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Side:
    """A file to be run: `path` in `runtime`, with what its bundle knows about its inputs."""

    name: str
    path: Path
    runtime: str
    signature: Signature
    preprocessing: Preprocessing | None
    golden: tuple[Sample, ...]
    emulated: bool = False


def compare(
    a: Path, b: Path, *, data: str | None = None, threads: int = 1, progress: Progress | None = None
) -> Comparison:
    """Size, latency, memory and outputs of two files, both timed in turns; formats may differ.

    Inputs come from `data`, else from the golden vectors of a bundle, else they are made up (seeded normal values;
    zeros and ones for integers), which compares arithmetic but not accuracy.

    Raises UsageError when a file can't be read or the two don't take the same inputs and give the same outputs.
    """
    progress = progress or Silent()
    first = open_side(a)
    second = open_side(b)
    second = replace(second, signature=in_terms_of(first.signature, second.signature, second.name))
    samples = inputs_for(first, second, data)
    with (
        load_runtime(first.runtime).open(first.path, first.signature, threads) as left,
        load_runtime(second.runtime).open(second.path, second.signature, threads) as right,
    ):
        evaluation = evaluate(left, right, progress.track(samples, "Comparing outputs", len(samples)), None)
    emulated = tuple(label for label, side in (("A", first), ("B", second)) if side.emulated)
    if emulated:
        sizes = tuple(
            Measurement("size_bytes", subject, float(size_of(side.path)), "bytes", "measured-host", side.runtime)
            for subject, side in (("a", first), ("b", second))
        )
        return Comparison(first.name, second.name, sizes, evaluation.outputs, evaluation.samples, emulated)
    progress.step("Timing both in turns")
    inputs = next(iter(samples)).inputs
    timed = [TimedFile(s, x.path, x.signature, x.runtime, inputs) for s, x in (("a", first), ("b", second))]
    measurements = benchmark_pair(timed[1], timed[0], threads)
    return Comparison(first.name, second.name, measurements, evaluation.outputs, evaluation.samples)


def open_side(path: Path) -> Side:
    """A bundle or a model file. Raises UsageError when it is neither, MissingError when nothing here can run it."""
    if path.is_dir() and path.suffix not in SUFFIXES:
        bundle = open_bundle(path)
        runtime = bundle.target.runtimes[0]
        emulated = bundle.manifest.model.emulation is not None or load_runtime(runtime).emulates is not None
        golden = golden_samples(bundle)
        side = Side(str(path), bundle.runnable_path, runtime, bundle.signature, bundle.preprocessing, golden, emulated)
    else:
        summary = summarize(path)
        runtime = HOST_RUNTIMES[summary.format]
        emulated = load_runtime(runtime).emulates is not None
        side = Side(str(path), path, runtime, summary.signature, None, (), emulated)
    if (reason := load_runtime(side.runtime).unavailable()) is not None:
        raise MissingError(reason, where=str(path))
    return side


def in_terms_of(ours: Signature, theirs: Signature, where: str) -> Signature:
    """Their signature with our tensor names and model terms, so that both files take the same samples.

    Tensors are paired by name where all names agree, else by position; a differing order of axes is found by size.
    Raises UsageError when the two don't fit, `where` being the name of their file.
    """
    return Signature(
        _matched(ours.inputs, theirs.inputs, "inputs", where), _matched(ours.outputs, theirs.outputs, "outputs", where)
    )


def _matched(
    ours: tuple[SignatureTensor, ...], theirs: tuple[SignatureTensor, ...], kind: str, where: str
) -> tuple[SignatureTensor, ...]:
    if len(ours) != len(theirs):
        raise UsageError(f"has {len(theirs)} {kind}, the other file has {len(ours)}", where=where)
    by_name = {tensor.name: tensor for tensor in theirs}
    partners = [by_name[t.name] for t in ours] if by_name.keys() == {t.name for t in ours} else theirs
    return tuple(_paired(a, b, where) for a, b in zip(ours, partners, strict=True))


def _paired(ours: SignatureTensor, theirs: SignatureTensor, where: str) -> SignatureTensor:
    wanted = model_terms(ours).shape
    if _fits(model_terms(theirs).shape, wanted):
        return replace(theirs, name=ours.name, model_dtype=ours.model_dtype)
    for order in permutations(range(len(wanted))):
        if len(theirs.shape) == len(wanted) and _fits(theirs.shape, tuple(wanted[axis] for axis in order)):
            return replace(theirs, name=ours.name, model_dtype=ours.model_dtype, permutation=order)
    raise UsageError(
        f"the tensor {theirs.native_name!r} has the shape {_text(theirs.shape)}, the other file's "
        f"{ours.native_name!r} {_text(wanted)}",
        where=where,
    )


def _fits(shape: tuple[int | str | Dim, ...], wanted: tuple[int | str | Dim, ...]) -> bool:
    """Equal where both sides are fixed."""
    return len(shape) == len(wanted) and all(
        x == y or not (isinstance(x, int) and isinstance(y, int)) for x, y in zip(shape, wanted, strict=True)
    )


def _text(shape: tuple[int | str | Dim, ...]) -> str:
    return "[" + ", ".join(d.name if isinstance(d, Dim) else str(d) for d in shape) + "]"


def inputs_for(first: Side, second: Side, data: str | None) -> Sequence[Sample] | Dataset:
    """Samples for both, in the first one's terms: from `data`, else the golden vectors of either, else made up."""
    if data is not None:
        from edgeopt.datasets import open_dataset

        specs = tuple(model_terms(tensor) for tensor in first.signature.inputs)
        return open_dataset(data, specs, first.preprocessing or second.preprocessing)
    names = {tensor.name for tensor in first.signature.inputs}
    for golden in (first.golden, second.golden):
        if golden and golden[0].inputs.keys() == names:
            return golden
    random = np.random.default_rng(0)
    return [
        Sample({t.name: _made_up(model_terms(t), random) for t in first.signature.inputs}, None, f"made-up input {k}")
        for k in range(MADE_UP_SAMPLES)
    ]


def _made_up(spec: TensorSpec, random: np.random.Generator) -> Array:
    shape = [DYNAMIC_SIZE if isinstance(d, Dim) else d for d in spec.shape]
    if spec.dtype.startswith("float"):
        return random.standard_normal(shape).astype(spec.dtype)
    return random.integers(0, 2, shape).astype(spec.dtype)
