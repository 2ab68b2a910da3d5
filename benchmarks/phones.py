"""Exported files on emulated Arm cores: the same answers as on this machine, and how many instructions they take.

    python benchmarks/phones.py BUNDLE ... --pictures FOLDER [--core NAME ...] [--samples N] [--float-samples N]

FOLDER holds pictures with labels.csv, as benchmarks/imagenet_halves.py makes it. Prints two Markdown tables: answers,
then instructions, where every row holds the file of a bundle beside its float twin on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgeopt.bundle import LoadedBundle, open_bundle
from edgeopt.datasets import match_labels, open_dataset, select
from edgeopt.datasets.base import Dataset
from edgeopt.emulator.cores import core_for
from edgeopt.emulator.counting import InstructionCount, count
from edgeopt.report.units import quantity
from edgeopt.revalidation import model_terms
from edgeopt.runtimes import HOST_RUNTIMES, load_runtime
from edgeopt.runtimes.base import encode
from edgeopt.types import Sample, Signature
from edgeopt.validation.fidelity import Fidelity

CORES = ("cortex-a53", "cortex-a72", "cortex-a76", "cortex-a710")


@dataclass(frozen=True)
class File:
    bundle: LoadedBundle
    path: Path
    signature: Signature
    precision: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--core", nargs="*", default=CORES)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--float-samples", type=int, default=20)
    parser.add_argument("--counts-only", action="store_true")
    args = parser.parse_args()
    bundles = [open_bundle(path) for path in args.bundles]
    first = next(iter(samples_of(bundles[0], args.pictures, 1)))
    print("| file | core | instructions, float | shipped | ratio | ratio of estimated cycles | shipped, by class |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for bundle in bundles:
        for core in args.core:
            print(counted(bundle, core, first), flush=True)
    if args.counts_only:
        return
    print("\n| file | precision | core | pictures | identical | answers as on x86 | SQNR to x86 | s per picture |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for bundle in bundles:
        shipped, twin = files_of(bundle)
        for file, number in ((shipped, args.samples), (twin, args.float_samples)):
            samples = tuple(samples_of(bundle, args.pictures, number))
            for core in args.core:
                print(compared(file, core, samples), flush=True)


def samples_of(bundle: LoadedBundle, pictures: Path, number: int) -> Dataset:
    """The same choice for every bundle."""
    specs = tuple(model_terms(tensor) for tensor in bundle.signature.inputs)
    return select(match_labels(open_dataset(str(pictures), specs, bundle.preprocessing), bundle.labels), number, 0)


def files_of(bundle: LoadedBundle) -> tuple[File, File]:
    assert bundle.float_path is not None
    assert bundle.float_signature is not None
    return (
        File(bundle, bundle.model_path, bundle.signature, bundle.precision),
        File(bundle, bundle.float_path, bundle.float_signature, "fp32"),
    )


def compared(file: File, core: str, samples: Sequence[Sample]) -> str:
    fidelity, identical, seconds = Fidelity(), 0, 0.0
    format_ = file.bundle.format
    host = load_runtime(HOST_RUNTIMES[format_]).open(file.path, file.signature)
    phone = load_runtime(f"phone:{core}").open(file.path, file.signature)
    with host, phone:
        for sample in samples:
            native = host.encode(sample.inputs)
            expected = host.run_native(native)
            start = time.monotonic()
            found = phone.run_native(native)
            seconds += time.monotonic() - start
            identical += all(np.array_equal(found[name], expected[name]) for name in expected)
            fidelity.update(host.decode(expected), host.decode(found))
    (output,) = islice(fidelity.results(), 1)
    cells = (
        file.bundle.target.name,
        file.precision,
        core,
        str(len(samples)),
        str(identical),
        quantity(output.agreement, "fraction"),
        quantity(output.sqnr_db, "dB"),
        f"{seconds / len(samples):.2f}",
    )
    return f"| {' | '.join(cells)} |"


def counted(bundle: LoadedBundle, core: str, sample: Sample) -> str:
    shipped, twin = files_of(bundle)
    found, reference = (count_file(file, core, sample) for file in (shipped, twin))
    cycles = "-"
    if found.cycles and reference.cycles:
        cycles = f"{reference.cycles / found.cycles:.2f}x ({found.cycles_model})"
    classes = ", ".join(f"{kind} {quantity(n, 'instructions')}" for kind, n in found.classes.items() if n)
    cells = (
        bundle.target.name,
        core,
        quantity(reference.total, "instructions"),
        quantity(found.total, "instructions"),
        f"{reference.total / found.total:.2f}x",
        cycles,
        classes,
    )
    return f"| {' | '.join(cells)} |"


def count_file(file: File, core: str, sample: Sample) -> InstructionCount:
    native = {tensor.name: encode(sample.inputs[tensor.name], tensor) for tensor in file.signature.inputs}
    start = time.monotonic()
    found = count(file.path, file.bundle.format, file.signature, native, core_for(core))
    print(f"{file.bundle.target.name} {file.precision} {core}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
