"""Running two instrumented files over the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.bundle import open_bundle
from edgeopt.comparison import Side, in_terms_of, inputs_for, open_side
from edgeopt.debugging.matching import Layouts, Pairing, Trace, pair
from edgeopt.debugging.results import Debugging, LayerError, against_inputs, first_divergence
from edgeopt.debugging.sums import ErrorSums
from edgeopt.errors import DataError, UsageError
from edgeopt.formats.probe import Probed, ProbePoint, add_probes
from edgeopt.progress import Progress, Silent
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Sample
from edgeopt.validation.fidelity import SQNR_CAP_DB, Fidelity

if TYPE_CHECKING:
    from edgeopt.datasets.base import Dataset

DEFAULT_SAMPLES = 32
#: Below 10 dB the error is a third of the signal; int8 layers of healthy networks keep 15 to 40 dB.
DEFAULT_THRESHOLD_DB = 10.0
#: 10 dB less is ten times the power of the error; layers of healthy int8 networks lose up to 7 dB, and win them back.
DEFAULT_MAX_DROP_DB = 10.0

Outputs = Mapping[str, Array]


def debug(
    a: Path,
    b: Path | None = None,
    *,
    data: str | None = None,
    num_samples: int = DEFAULT_SAMPLES,
    threshold_db: float = DEFAULT_THRESHOLD_DB,
    max_drop_db: float = DEFAULT_MAX_DROP_DB,
    threads: int = 1,
    progress: Progress | None = None,
) -> Debugging:
    """Hold the results of B's layers against A's: each in its own runtime, layers matched by their source.

    Args:
        a: a bundle or a model file, the reference.
        b: what to hold against it. None: `a` is a bundle, and its file is held against its float twin.
        data: inputs, as for `edgeopt.comparison.compare`.
        num_samples: how many of them at most.
        threshold_db, max_drop_db: what counts as a divergence, see `results.first_divergence`.

    Raises:
        UsageError: a file can't be read or instrumented, the two are not the same model, or no layer of one is found
            in the other. MissingError: a runtime is not on this machine. DataError: there are no samples.
    """
    progress = progress or Silent()
    first, second = map(_on_the_host, _with_twin(a) if b is None else (open_side(a), open_side(b)))
    second = replace(second, signature=in_terms_of(first.signature, second.signature, second.name))
    samples = inputs_for(first, second, data)
    count = min(len(samples), num_samples)
    progress.step("Adding probes")
    with TemporaryDirectory(prefix="edgeopt-") as folder, ExitStack() as stack:
        left = _Probe.open(first, Path(folder, "a"), threads, stack)
        right = _Probe.open(second, Path(folder, "b"), threads, stack)
        return _compared(left, right, samples, count, (threshold_db, max_drop_db), progress)


#: An emulator takes no outputs that its file never had; these kernels have its arithmetic within a step or two.
_KERNELS: dict[str, str] = {"tosa": "litert-reference", "qnn-htp": "onnxruntime"}


def _on_the_host(side: Side) -> Side:
    return replace(side, runtime=_KERNELS.get(side.runtime, side.runtime))


def _with_twin(path: Path) -> tuple[Side, Side]:
    """A bundle's float twin and its file."""
    if not path.exists():
        raise UsageError("no such file or bundle", where=str(path))
    if not path.is_dir():
        raise UsageError("is one file, with nothing to hold it against", where=str(path), fix="give a second file")
    side, bundle = open_side(path), open_bundle(path)
    if bundle.float_path is None or bundle.float_signature is None:
        raise UsageError(
            "has no float twin to hold its file against",
            where=str(path),
            fix="give a second file or bundle, or export it with --float-twin",
        )
    # An emulator of an accelerator would cost the float file its exactness.
    runtime = HOST_RUNTIMES[bundle.format] if side.emulated else side.runtime
    twin = Side(
        f"{path} (float twin)", bundle.float_path, runtime, bundle.float_signature, side.preprocessing, side.golden
    )
    return twin, side


@dataclass(frozen=True, slots=True)
class _Probe:
    """One side, with its instrumented copy opened."""

    side: Side
    probed: Probed
    session: Session
    threads: int

    @classmethod
    def open(cls, side: Side, copy: Path, threads: int, stack: ExitStack) -> _Probe:
        probed = add_probes(side.path, side.signature, copy.with_suffix(side.path.suffix))
        if not probed.points:
            raise UsageError("has no layers to look at", where=str(side.path))
        runtime = load_runtime(side.runtime)
        return cls(side, probed, stack.enter_context(runtime.open(probed.path, probed.signature, threads)), threads)

    @property
    def points(self) -> tuple[ProbePoint, ...]:
        return self.probed.points

    def results(self, outputs: Outputs) -> list[Array]:
        return [outputs[point.tensor.name] for point in self.points]

    def own_outputs(self, outputs: Outputs) -> dict[str, Array]:
        return {tensor.name: outputs[tensor.name] for tensor in self.side.signature.outputs}

    def instrumented_db(self, sample: Sample, outputs: Outputs) -> float:
        """How close the copy's outputs are to the file's own, on one sample."""
        with load_runtime(self.side.runtime).open(self.side.path, self.side.signature, self.threads) as original:
            expected = original.run(sample.inputs)
        fidelity = Fidelity()
        fidelity.update(expected, self.own_outputs(outputs))
        return min((o.sqnr_db for o in fidelity.results() if o.sqnr_db is not None), default=SQNR_CAP_DB)


def _compared(
    left: _Probe,
    right: _Probe,
    samples: Sequence[Sample] | Dataset,
    count: int,
    limits: tuple[float, float],
    progress: Progress,
) -> Debugging:
    stream = islice(iter(samples), count)
    first = next(stream, None)
    if first is None:
        raise DataError("holds no samples", where="the data")
    outputs_a, outputs_b = left.session.run(first.inputs), right.session.run(first.inputs)
    instrumented = left.instrumented_db(first, outputs_a), right.instrumented_db(first, outputs_b)
    pairing = pair(_traces(left, outputs_a), _traces(right, outputs_b))
    if not pairing.pairs:
        raise UsageError(
            f"none of its {len(right.points)} layers has a counterpart among the {len(left.points)} of the other file",
            where=right.side.name,
            fix="give two exports of one model",
        )
    sums, fidelity = _accumulate(
        left, right, pairing, progress.track(chain((first,), stream), "Comparing layers", count)
    )
    layers = _layers(left.points, right.points, pairing, sums)
    return Debugging(
        a=left.side.name,
        b=right.side.name,
        runtime_a=left.side.runtime,
        runtime_b=right.side.runtime,
        layers=layers,
        first_divergence=first_divergence(layers, *limits),
        threshold_db=limits[0],
        max_drop_db=limits[1],
        outputs=fidelity.results(),
        matched_by=pairing.matched_by,
        unmatched_a=_unmatched(left.points, {i for i, _ in pairing.pairs}),
        unmatched_b=_unmatched(right.points, {j for _, j in pairing.pairs}),
        instrumented_db_a=instrumented[0],
        instrumented_db_b=instrumented[1],
        samples=count,
    )


def _traces(probe: _Probe, outputs: Outputs) -> list[Trace]:
    return [Trace.of(p.layer, r) for p, r in zip(probe.points, probe.results(outputs), strict=True)]


def _accumulate(
    left: _Probe, right: _Probe, pairing: Pairing, samples: Iterable[Sample]
) -> tuple[list[ErrorSums], Fidelity]:
    sums, layouts, fidelity = [ErrorSums() for _ in pairing.pairs], Layouts(), Fidelity()
    for sample in samples:
        outputs_a, outputs_b = left.session.run(sample.inputs), right.session.run(sample.inputs)
        fidelity.update(left.own_outputs(outputs_a), right.own_outputs(outputs_b))
        results_a, results_b = left.results(outputs_a), right.results(outputs_b)
        for key, (i, j) in enumerate(pairing.pairs):
            aligned = layouts.aligned(key, results_a[i], results_b[j])
            if aligned is None:
                raise DataError(
                    f"the layer {left.points[i].layer!r} gives the shapes {results_a[i].shape} and "
                    f"{results_b[j].shape}, which fitted in the first sample",
                    where=sample.name,
                )
            sums[key].add(*aligned)
    return sums, fidelity


def _layers(
    a: Sequence[ProbePoint], b: Sequence[ProbePoint], pairing: Pairing, sums: Sequence[ErrorSums]
) -> tuple[LayerError, ...]:
    rows = {i: row for row, (i, _) in enumerate(pairing.pairs)}
    seen: Counter[str] = Counter()
    layers = []
    for (i, j), found in zip(pairing.pairs, sums, strict=True):
        layer = a[i].layer or b[j].layer
        inputs = sorted(_input_rows(a, i, rows))
        input_sqnr_db, drop_db, introduced = against_inputs(found.sqnr_db, [sums[row].sqnr_db for row in inputs])
        layers.append(
            LayerError(
                layer=layer,
                occurrence=seen[layer],
                type_a=a[i].type,
                type_b=b[j].type,
                sqnr_db=found.sqnr_db,
                max_abs_error=found.largest,
                mean_error=found.mean_error,
                range_a=found.range_a,
                range_b=found.range_b,
                input_sqnr_db=input_sqnr_db,
                drop_db=drop_db,
                inputs=tuple(inputs),
                introduced=introduced,
            )
        )
        seen[layer] += 1
    return tuple(layers)


def _input_rows(points: Sequence[ProbePoint], index: int, rows: Mapping[int, int]) -> set[int]:
    """Rows of the results that a point computes from, past those that have no counterpart.

    Where the format doesn't tell, the result before it stands for them.
    """
    found: set[int] = set()
    waiting, seen = [index], {index}
    while waiting:
        point = waiting.pop()
        known = points[point].inputs
        for before in known if known is not None else range(max(point - 1, 0), point):
            if before in rows:
                found.add(rows[before])
            elif before not in seen:
                seen.add(before)
                waiting.append(before)
    return found


def _unmatched(points: Sequence[ProbePoint], matched: set[int]) -> tuple[str, ...]:
    def names() -> Iterator[str]:
        for index, point in enumerate(points):
            if index not in matched:
                yield point.layer or point.type

    return tuple(dict.fromkeys(names()))
